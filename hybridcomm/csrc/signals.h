// Ctrl-C during a long wait: the engine calls this now and then, without the GIL.
#pragma once

#include <pybind11/pybind11.h>

namespace hybridcomm {

inline void raise_pending_signals() {
  const pybind11::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

}  // namespace hybridcomm
