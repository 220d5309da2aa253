// One binding file per header; each registers its part of the module here.
#pragma once

#include <pybind11/pybind11.h>

namespace hybridcomm {

void bind_errors(pybind11::module_& module);
void bind_program(pybind11::module_& module);
void bind_custom(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_prepared(pybind11::module_& module);
void bind_handshake(pybind11::module_& module);
void bind_reduce(pybind11::module_& module);
void bind_gpu(pybind11::module_& module);

}  // namespace hybridcomm
