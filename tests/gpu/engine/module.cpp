// The GPU engine as a Python module of its own, which builds in seconds: to plant bugs in.
#include <memory>

#include "bindings.h"
#include "engine.h"

PYBIND11_MODULE(_gpu, module) {
  pybind11::class_<hybridcomm::Engine, std::shared_ptr<hybridcomm::Engine>>(module, "Host")
      .def(pybind11::init<const pybind11::object&, const pybind11::object&>());
  hybridcomm::bind_errors(module);
  hybridcomm::bind_gpu(module);
}
