// Writes what the decoders' fuzz target starts from: DIRECTORY/<codec's code>/<case>, made by the encoders.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <random>

#include "codec_table.h"
#include "fuzz_decode.h"

namespace hybridcomm::kernels::test {
namespace {

namespace fs = std::filesystem;

void write(const fs::path& path, const Case& one, const uint8_t* data, size_t nbytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&one), sizeof one);
  file.write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(nbytes));
  if (!file) std::perror(path.c_str());
}

void seeds(const fs::path& folder, int code) {
  const auto& table = valid_params(code);
  std::mt19937 random(static_cast<unsigned>(code));
  std::normal_distribution<float> normal;
  const size_t stride = table.size() / 24 + 1;
  for (size_t p = 0; p < table.size(); p += stride) {
    for (const uint32_t wanted : {0u, 1u, 17u, kLarge | (table[p].block + 5)}) {
      Case one;
      one.params = static_cast<uint16_t>(p);
      one.numel = static_cast<uint16_t>(wanted);
      one.seed = p;  // also the weight and the instruction set
      const size_t numel = numel_of(one, table[p].block), nbytes = codec_nbytes(table[p], numel);
      if (nbytes < kHeaderNbytes || nbytes > 4096) continue;
      Exact<float> grad(numel);
      for (size_t i = 0; i < numel; ++i) grad[i] = normal(random);
      Exact<uint8_t> payload(nbytes);
      codec_encode(table[p], {grad.data(), nullptr, nullptr}, payload.data(), numel, 0);
      const std::string name = std::to_string(p) + "-" + std::to_string(numel);
      write(folder / (name + "-body"), one, payload.data() + kHeaderNbytes, nbytes - kHeaderNbytes);
      one.mode = kEncode;
      write(folder / (name + "-encode"), one, reinterpret_cast<uint8_t*>(grad.data()), grad.nbytes());
    }
  }
}

}  // namespace
}  // namespace hybridcomm::kernels::test

int main(int argc, char** argv) {
  using namespace hybridcomm::kernels::test;
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s DIRECTORY\n", argv[0]);
    return EXIT_FAILURE;
  }
  for (int code = 0; code < kCodecCodes; ++code) {
    if (valid_params(code).empty()) continue;
    const auto folder = fs::path(argv[1]) / std::to_string(code);
    fs::create_directories(folder);
    seeds(folder, code);
  }
  return EXIT_SUCCESS;
}
