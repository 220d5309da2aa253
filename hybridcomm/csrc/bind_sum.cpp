// sum() by a chosen instruction set, for tests.
#include <pybind11/stl.h>

#include "bindings.h"
#include "common.h"
#include "sum.h"

namespace py = pybind11;

namespace hybridcomm {

void bind_sum(py::module_& module) {
  module.def("best_isa", &best_isa);
  module.def(
      "sum",
      [](uint8_t dtype, uintptr_t out, const std::vector<uintptr_t>& sources, size_t numel, uint32_t divisor,
         int isa) {
        if (isa > best_isa()) throw Error(Code::invalid, "this CPU lacks that instruction set");
        std::vector<const void*> from;
        for (uintptr_t source : sources) from.push_back(reinterpret_cast<const void*>(source));
        sum_by(isa, static_cast<Dtype>(dtype), reinterpret_cast<void*>(out), from.data(),
               static_cast<int>(from.size()), numel, divisor);
      },
      py::arg("dtype"), py::arg("out"), py::arg("sources"), py::arg("numel"), py::kw_only(),
      py::arg("divisor") = 1, py::arg("isa"));
}

}  // namespace hybridcomm
