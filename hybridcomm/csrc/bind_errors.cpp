// The engine's error codes as the classes of hybridcomm.errors.
#include <pybind11/stl.h>

#include "bindings.h"
#include "common.h"

namespace py = pybind11;

namespace hybridcomm {
namespace {

const char* class_name(Code code) {
  switch (code) {
    case Code::bootstrap:
      return "BootstrapError";
    case Code::shared_memory:
      return "SharedMemoryError";
    case Code::peer_lost:
      return "PeerLostError";
    case Code::stall:
      return "StallError";
    case Code::mismatch:
      return "PlanMismatchError";
    case Code::payload:
      return "PayloadError";
    case Code::aborted:
      return "AbortedError";
    case Code::invalid:
      return "UnsupportedError";
    case Code::compressor:
      return "CompressorError";
  }
  return "HybridCommError";
}

py::object make(const Error& error, const py::object& type) {
  if (error.code == Code::peer_lost) return type(error.what(), error.rank);
  if (error.code == Code::stall) return type(error.what(), py::tuple(py::cast(error.missing)));
  return type(error.what());
}

}  // namespace

void bind_errors(py::module_&) {
  py::register_local_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const Error& error) {
      const py::object type = py::module_::import("hybridcomm.errors").attr(class_name(error.code));
      const py::object instance = make(error, type);
      PyErr_SetObject(type.ptr(), instance.ptr());
    }
  });
}

}  // namespace hybridcomm
