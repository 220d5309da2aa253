// The handshake's hash, for tests against another implementation of it.
#include <string_view>

#include "bindings.h"
#include "blake2s.h"
#include "common.h"

namespace py = pybind11;

namespace hybridcomm {

void bind_handshake(py::module_& module) {
  module.def(
      "blake2s",
      [](const py::bytes& key, const py::bytes& data) {
        const std::string_view secret = key, text = data;
        if (secret.size() > 32) throw Error(Code::invalid, "a BLAKE2s key has at most 32 bytes");
        const auto at = [](std::string_view view) { return reinterpret_cast<const uint8_t*>(view.data()); };
        const Digest digest = blake2s(at(secret), secret.size(), at(text), text.size());
        return py::bytes(reinterpret_cast<const char*>(digest.data()), digest.size());
      },
      py::arg("key"), py::arg("data"));
}

}  // namespace hybridcomm
