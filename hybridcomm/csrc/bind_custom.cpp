// Compressors written in Python: custom.py has their protocol and does the payload's header.
#include "bindings.h"
#include "common.h"
#include "custom_codec.h"
#include "program.h"

namespace py = pybind11;

namespace hybridcomm {
namespace {

bool interpreter_ends() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

py::object bytes_at(const void* data, size_t nbytes) {
  return py::memoryview::from_memory(data, static_cast<py::ssize_t>(nbytes));
}

py::object bytes_at(void* data, size_t nbytes) {
  if (data == nullptr) return py::none();
  return py::memoryview::from_memory(data, static_cast<py::ssize_t>(nbytes));
}

// Holds the GIL for as long as Python works. A Program may be the last to let go of its codec on a thread without it.
class PythonCodec final : public CustomCodec {
 public:
  explicit PythonCodec(py::object codec)
      : codec_(std::move(codec)), name_(py::str(codec_)), spec_nbytes_(codec_.attr("nbytes")) {}

  ~PythonCodec() override {
    if (Py_IsInitialized() == 0 ||
        interpreter_ends()) {  // no GIL to be had any more: the process takes it along
      codec_.release();
      spec_nbytes_.release();
      return;
    }
    const py::gil_scoped_acquire gil;
    codec_ = py::object();
    spec_nbytes_ = py::object();
  }

  uint32_t encode(const kernels::EncodeInput& input, uint8_t* payload, size_t numel,
                  uint64_t digest) const override {
    return in_python([&] {
      const size_t nbytes = numel * sizeof(float);
      const py::object e_in = input.e_in == nullptr ? py::none() : bytes_at(input.e_in, nbytes);
      const auto size = spec_nbytes_(numel).cast<size_t>();
      return codec_
          .attr("encode_payload")(bytes_at(input.grad, nbytes), e_in, bytes_at(input.e_out, nbytes),
                                  bytes_at(payload, size), digest, input.decay)
          .cast<uint32_t>();
    });
  }

  void decode(const std::vector<const uint8_t*>& payloads, float* out, size_t numel, float weight,
              uint64_t digest) const override {
    in_python([&] {
      const auto size = spec_nbytes_(numel).cast<size_t>();
      py::list views;
      for (const uint8_t* payload : payloads) views.append(bytes_at(static_cast<const void*>(payload), size));
      codec_.attr("decode_payloads")(views, bytes_at(out, numel * sizeof(float)), weight, digest);
    });
  }

 private:
  template <typename Call>
  auto in_python(const Call& call) const -> decltype(call()) {
    if (interpreter_ends()) throw Error(Code::aborted, "the interpreter ends, " + name_ + " cannot run");
    const py::gil_scoped_acquire gil;
    try {
      return call();
    } catch (const py::error_already_set& error) {
      if (!error.matches(PyExc_Exception)) throw;  // Ctrl-C, SystemExit: on their way to the caller
      const bool refused = error.matches(py::module_::import("hybridcomm.errors").attr("PayloadError"));
      throw Error(refused ? Code::payload : Code::compressor, name_ + " raised " + error.what());
    } catch (const py::cast_error& error) {
      throw Error(Code::compressor, name_ + ": " + error.what());
    }
  }

  py::object codec_;
  std::string name_;
  py::object spec_nbytes_;
};

}  // namespace

void bind_custom(py::module_& module) {
  module.def(
      "set_custom",
      [](Program& program, py::object codec) {
        program.custom = std::make_shared<PythonCodec>(std::move(codec));
      },
      py::arg("program"), py::arg("codec"));
}

}  // namespace hybridcomm
