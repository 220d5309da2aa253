// reduce() by a chosen instruction set, for tests; scale() for the inputs of a premul_sum.
#include <pybind11/stl.h>

#include "bindings.h"
#include "common.h"
#include "reduce.h"

namespace py = pybind11;

namespace hybridcomm {

void bind_reduce(py::module_& module) {
  module.def("best_isa", &best_isa);
  module.def(
      "reduce",
      [](uint8_t dtype, uint8_t op, uintptr_t out, const std::vector<uintptr_t>& sources, size_t numel,
         uint32_t divisor, int isa) {
        if (isa > best_isa()) throw Error(Code::invalid, "this CPU lacks that instruction set");
        std::vector<const void*> from;
        for (uintptr_t source : sources) from.push_back(reinterpret_cast<const void*>(source));
        reduce_by(isa, static_cast<Dtype>(dtype), static_cast<Reduction>(op), reinterpret_cast<void*>(out),
                  from.data(), static_cast<int>(from.size()), numel, divisor);
      },
      py::arg("dtype"), py::arg("op"), py::arg("out"), py::arg("sources"), py::arg("numel"), py::kw_only(),
      py::arg("divisor") = 1, py::arg("isa"));
  module.def(
      "scale",
      [](uint8_t dtype, uintptr_t data, size_t numel, double factor) {
        const py::gil_scoped_release no_gil;
        scale(static_cast<Dtype>(dtype), reinterpret_cast<void*>(data), numel, factor);
      },
      py::arg("dtype"), py::arg("data"), py::arg("numel"), py::arg("factor"));
}

}  // namespace hybridcomm
