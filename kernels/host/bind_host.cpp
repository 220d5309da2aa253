// hybridcomm.kernels._host: the host kernels on numpy buffers, for tests, benchmarks and the Python
// interface. Checks lengths and types before the kernels see a pointer; the GIL is released while they run.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "codec.h"

namespace py = pybind11;

namespace hybridcomm::kernels {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

const std::vector<std::pair<const char*, Isa>>& isa_names() {
  static const std::vector<std::pair<const char*, Isa>> names = {
      {"scalar", Isa::scalar}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}};
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const auto& [name, isa] : isa_names()) {
    if (isa_available(isa)) names.emplace_back(name);
  }
  return names;
}

Isa isa_of(const std::optional<std::string>& wanted) {
  if (!wanted) return Isa::automatic;
  for (const auto& [name, isa] : isa_names()) {
    if (*wanted == name && isa_available(isa)) return isa;
  }
  throw std::invalid_argument("isa '" + *wanted +
                              "' is unknown or not on this machine: see available_isas()");
}

// Codec, value_bits, variant, block, k: a spec's `params`.
using Params = std::tuple<uint8_t, uint8_t, uint8_t, uint32_t, uint32_t>;

CodecParams params_of(const Params& from) {
  const auto& [codec, value_bits, variant, block, k] = from;
  const CodecParams params{static_cast<Codec>(codec), value_bits, variant, 0, block, k};
  if (!codec_valid(params)) throw std::invalid_argument("invalid parameters: make a spec with spec.parse");
  return params;
}

void need(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

const float* data_of(const std::optional<Array<float>>& array, size_t numel, const char* message) {
  if (!array) return nullptr;
  need(static_cast<size_t>(array->size()) == numel, message);
  return array->data();
}

bool overlap(const void* a, const void* b, size_t nbytes_a, size_t nbytes_b) {
  const auto x = reinterpret_cast<uintptr_t>(a), y = reinterpret_cast<uintptr_t>(b);
  return x < y + nbytes_b && y < x + nbytes_a;
}

uint32_t encode(const Params& spec, const Array<float>& grad, const std::optional<Array<float>>& e_in,
                std::optional<Array<float>> e_out, Array<uint8_t> payload, uint64_t digest, float decay,
                uint64_t seed, const std::optional<std::string>& isa_name) {
  const CodecParams params = params_of(spec);
  const Isa isa = isa_of(isa_name);
  const size_t numel = static_cast<size_t>(grad.size()), nbytes = numel * sizeof(float);
  const float* from = data_of(e_in, numel, "e_in must have as many elements as grad");
  data_of(e_out, numel, "e_out must have as many elements as grad");
  float* to = e_out ? e_out->mutable_data() : nullptr;
  uint8_t* bytes = payload.mutable_data();
  const size_t payload_nbytes = static_cast<size_t>(payload.size());
  need(payload_nbytes == codec_nbytes(params, numel), "payload must have spec.nbytes(grad.size) bytes");
  if (to != nullptr && numel > 0) {
    need(!overlap(to, grad.data(), nbytes, nbytes), "e_out overlaps grad");
    need(from == nullptr || from == to || !overlap(to, from, nbytes, nbytes),
         "e_out overlaps e_in without being it");
  }
  need(!overlap(bytes, grad.data(), payload_nbytes, nbytes) &&
           (from == nullptr || !overlap(bytes, from, payload_nbytes, nbytes)) &&
           (to == nullptr || !overlap(bytes, to, payload_nbytes, nbytes)),
       "payload overlaps another buffer");
  const float* source = grad.data();
  py::gil_scoped_release release;
  return codec_encode(params, {source, from, to, decay, seed}, bytes, numel, digest, isa);
}

// Returns (status, flags or the refused payload's position).
std::pair<int, uint32_t> decode(const Params& spec, const std::vector<Array<uint8_t>>& payloads,
                                Array<float> out, float weight, uint64_t digest, bool clear,
                                const std::optional<std::string>& isa_name) {
  const CodecParams params = params_of(spec);
  const Isa isa = isa_of(isa_name);
  const size_t numel = static_cast<size_t>(out.size());
  float* target = out.mutable_data();
  std::vector<const uint8_t*> pointers;
  for (const auto& payload : payloads) {
    if (static_cast<size_t>(payload.size()) != codec_nbytes(params, numel)) {
      return {static_cast<int>(Status::bad_nbytes), static_cast<uint32_t>(pointers.size())};
    }
    pointers.push_back(payload.data());
  }
  uint32_t flags = 0;
  py::gil_scoped_release release;
  const auto run = clear ? codec_decode : codec_decode_add;
  const Status status =
      run(params, pointers.data(), pointers.size(), target, numel, weight, digest, &flags, isa);
  return {static_cast<int>(status), flags};
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host kernels; use hybridcomm.kernels.host, which knows specs and raises typed errors.";
  m.def("available_isas", &available_isas);
  m.def("active_isa", [] { return isa_names()[static_cast<size_t>(active_isa())].first; });
  m.def(
      "set_isa", [](const std::optional<std::string>& isa) { set_isa(isa_of(isa)); },
      py::arg("isa").none(true));
  m.def("nbytes", [](const Params& spec, size_t numel) { return codec_nbytes(params_of(spec), numel); });
  m.def("whole_region", [](const Params& spec) { return codec_whole_region(params_of(spec)); });
  m.def("encode", &encode, py::arg("params"), py::arg("grad").noconvert(),
        py::arg("e_in").noconvert().none(true), py::arg("e_out").noconvert().none(true),
        py::arg("payload").noconvert(), py::arg("digest"), py::arg("decay"), py::arg("seed"),
        py::arg("isa").none(true));
  m.def("decode", &decode, py::arg("params"), py::arg("payloads").noconvert(), py::arg("out").noconvert(),
        py::arg("weight"), py::arg("digest"), py::arg("clear"), py::arg("isa").none(true));
}

}  // namespace hybridcomm::kernels
