// Every codec that the kernels accept, found by asking codec_valid: new codecs are covered without an edit here.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "codec.h"

namespace hybridcomm::kernels::test {

constexpr int kCodecCodes = 32;  // more than there are, so that later ones are found
constexpr size_t kHeaderNbytes = 64;
constexpr size_t kSeedAt = 56;

inline const std::vector<CodecParams>& valid_params(int code) {
  static std::array<std::vector<CodecParams>, kCodecCodes> found;
  auto& params = found[static_cast<size_t>(code)];
  if (!params.empty()) return params;
  constexpr uint32_t kBlocks[] = {0,  1,   2,   3,   4,   7,   8,    10,   16,   24,   32,   48,    64,
                                  96, 100, 128, 192, 256, 512, 1000, 1024, 2048, 4096, 8192, 16384, 65536};
  constexpr uint32_t kKs[] = {0,  1,  2,  3,  4,   5,   6,   7,   8,    10,   12,   13,    16,   20,
                              32, 39, 41, 64, 100, 128, 256, 512, 1000, 1024, 4096, 10000, 65536};
  for (int value_bits = 0; value_bits <= 32; ++value_bits) {
    for (int variant = 0; variant < 32; ++variant) {
      for (const uint32_t block : kBlocks) {
        for (const uint32_t k : kKs) {
          const CodecParams one{static_cast<Codec>(code),
                                static_cast<uint8_t>(value_bits),
                                static_cast<uint8_t>(variant),
                                0,
                                block,
                                k};
          if (codec_valid(one) && codec_nbytes(one, 100) != 0) params.push_back(one);
        }
      }
    }
  }
  return params;
}

inline std::vector<Isa> isas() {
  std::vector<Isa> found;
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (isa_available(isa)) found.push_back(isa);
  }
  return found;
}

// Heap memory of exactly that size, so that AddressSanitizer sees the first byte beyond it.
template <class T>
class Exact {
 public:
  explicit Exact(size_t count) : count_(count), data_(new T[count]()) {}
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  size_t nbytes() const { return count_ * sizeof(T); }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  bool same_bytes(const Exact& other) const {
    return nbytes() == 0 || std::memcmp(data(), other.data(), nbytes()) == 0;
  }

 private:
  size_t count_;
  std::unique_ptr<T[]> data_;
};

// docs/payload.md, anew: the sum of word[i] * (2 i + 1), the checksum's own words counted as zero.
inline void seal(Exact<uint8_t>& payload) {
  constexpr size_t kChecksumAt = 48;
  uint64_t sum = 0;
  for (size_t i = 0; i < payload.nbytes() / 4; ++i) {
    uint32_t word;
    std::memcpy(&word, payload.data() + 4 * i, 4);
    if (i != kChecksumAt / 4 && i != kChecksumAt / 4 + 1) sum += uint64_t{word} * (2 * i + 1);
  }
  std::memcpy(payload.data() + kChecksumAt, &sum, sizeof sum);
}

// The header that an encoder writes, without its checksum.
inline void write_header(Exact<uint8_t>& payload, const CodecParams& params, size_t numel, uint64_t digest,
                         uint64_t seed, uint32_t flags) {
  const auto put = [&payload](size_t at, auto value) {
    std::memcpy(payload.data() + at, &value, sizeof value);
  };
  std::memset(payload.data(), 0, kHeaderNbytes);
  put(0, uint32_t{0x4C504348});
  put(4, uint16_t{1});
  put(6, static_cast<uint8_t>(params.codec));
  put(7, params.value_bits);
  put(8, params.block);
  put(12, params.k);
  put(16, uint64_t{numel});
  put(24, uint64_t{payload.nbytes()});
  put(32, digest);
  put(40, flags);
  put(44, params.variant);
  put(kSeedAt, seed);
}

// Whether encoders write the seed they are given.
inline bool seeded(const CodecParams& params) {
  const Exact<float> grad(16);
  Exact<uint8_t> payload(codec_nbytes(params, 16));
  EncodeInput input{grad.data(), nullptr, nullptr};
  input.seed = 5;
  codec_encode(params, input, payload.data(), 16, 0);
  return payload[kSeedAt] != 0;
}

inline bool same_number(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

inline bool same_numbers(const Exact<float>& a, const Exact<float>& b) {
  for (size_t i = 0; i < a.nbytes() / sizeof(float); ++i) {
    if (!same_number(a[i], b[i])) return false;
  }
  return true;
}

}  // namespace hybridcomm::kernels::test
