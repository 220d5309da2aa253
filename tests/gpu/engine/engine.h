// Stands for the host's engine where the GPU engine is built alone: of that, it calls nothing but these.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "common.h"

namespace hybridcomm {

class Engine {
 public:
  // Neither is ever let go, since the last owner of this may not have the interpreter's lock.
  Engine(const pybind11::object& abort, const pybind11::object& listen) : abort_(abort), listen_(listen) {
    abort_.inc_ref();
    listen_.inc_ref();
  }
  void abort() {
    const pybind11::gil_scoped_acquire gil;
    abort_();
  }
  std::optional<Error> listen() {
    const pybind11::gil_scoped_acquire gil;
    try {
      listen_();
      return std::nullopt;
    } catch (pybind11::error_already_set& raised) {
      const bool lost = pybind11::hasattr(raised.value(), "rank");
      const std::string what = pybind11::str(raised.value());
      return Error(lost ? Code::peer_lost : Code::aborted, what,
                   lost ? raised.value().attr("rank").cast<int>() : -1);
    }
  }

 private:
  pybind11::handle abort_, listen_;
};

}  // namespace hybridcomm
