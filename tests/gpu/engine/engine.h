// Stands for the host's engine where the GPU engine is built alone: of that, it calls nothing but this.
#pragma once

#include <pybind11/pybind11.h>

namespace hybridcomm {

class Engine {
 public:
  // `callback` is never let go, since the last owner of this may not have the interpreter's lock.
  explicit Engine(const pybind11::object& callback) : callback_(callback) { callback_.inc_ref(); }
  void abort() {
    const pybind11::gil_scoped_acquire gil;
    callback_();
  }

 private:
  pybind11::handle callback_;
};

}  // namespace hybridcomm
