#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "program.h"

namespace py = pybind11;

namespace hybridcomm {
namespace {

using CodecTuple = std::tuple<uint8_t, uint8_t, uint8_t, uint32_t, uint32_t>;

}  // namespace

void bind_program(py::module_& module) {
  py::enum_<Kind>(module, "Kind")
      .value("put", Kind::put)
      .value("reduce", Kind::reduce)
      .value("encode", Kind::encode)
      .value("send", Kind::send)
      .value("receive", Kind::receive)
      .value("sum", Kind::sum)
      .value("decode", Kind::decode)
      .value("publish", Kind::publish)
      .value("get", Kind::get)
      .value("share", Kind::share)
      .value("collect", Kind::collect)
      .value("decode_add", Kind::decode_add);
  module.attr("OWN_REGION") = kOwnRegion;
  module.def("describe", [](uint8_t collective, uint8_t dtype, uint8_t op, uint8_t codec, uint64_t numel) {
    Tag tag;
    tag.collective = collective;
    tag.dtype = dtype;
    tag.op = op;
    tag.codec = codec;
    tag.numel = numel;
    return describe(tag);
  });
  py::class_<Program, std::shared_ptr<Program>>(module, "Program")
      .def(py::init([](uint64_t digest, uint64_t numel, uint8_t collective, uint8_t dtype, uint8_t op,
                       const std::vector<CodecTuple>& codecs, uint64_t group, const std::string& members) {
             auto program = std::make_shared<Program>();
             program->tag.digest = digest;
             program->group = group;
             program->members = members;
             program->tag.numel = numel;
             program->tag.collective = collective;
             program->tag.dtype = dtype;
             program->tag.op = op;
             program->dtype = static_cast<Dtype>(dtype);
             program->op = static_cast<Reduction>(op);
             for (size_t i = 0; i < std::min(codecs.size(), program->codecs.size()); ++i) {
               const auto& [code, value_bits, variant, block, k] = codecs[i];
               program->codecs[i] = {static_cast<kernels::Codec>(code), value_bits, variant, 0, block, k};
             }
             program->tag.codec = static_cast<uint8_t>(program->codecs[0].codec);
             return program;
           }),
           py::kw_only(), py::arg("digest"), py::arg("numel"), py::arg("collective"), py::arg("dtype"),
           py::arg("op"), py::arg("codecs") = std::vector<CodecTuple>{}, py::arg("group") = 0,
           py::arg("members") = "")
      .def(
          "add",
          [](Program& program, Kind kind, uint32_t stream, uint32_t step, int peer, uint64_t begin,
             uint64_t count, bool in_scratch, uint64_t offset, uint64_t nbytes, uint64_t residual,
             uint32_t divisor, bool deliver, std::vector<uint32_t> after, std::vector<int64_t> sources,
             uint8_t codec, bool momentum) {
            program.ops.push_back({kind, in_scratch ? Memory::scratch : Memory::tensor, stream, step, peer,
                                   begin, count, offset, nbytes, residual, divisor, deliver, std::move(after),
                                   std::move(sources), codec, momentum});
            if (stream >= program.stream_count) program.stream_count = stream + 1;
            return program.ops.size() - 1;
          },
          py::arg("kind"), py::kw_only(), py::arg("stream"), py::arg("step"), py::arg("peer") = -1,
          py::arg("begin") = 0, py::arg("count") = 0, py::arg("in_scratch") = false, py::arg("offset") = 0,
          py::arg("nbytes") = 0, py::arg("residual") = 0, py::arg("divisor") = 1, py::arg("deliver") = false,
          py::arg("after") = std::vector<uint32_t>{}, py::arg("sources") = std::vector<int64_t>{},
          py::arg("codec") = 0, py::arg("momentum") = false)
      .def_readwrite("scratch_nbytes", &Program::scratch_nbytes)
      .def_property_readonly("size", [](const Program& program) { return program.ops.size(); });
}

}  // namespace hybridcomm
