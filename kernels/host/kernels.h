// The tables behind a call: one row per codec, and in it one set of kernels per instruction set.
//
// A codec is a row in table.cpp, made by <family>_row.cpp with what holds everywhere (sizes, checks) and by
// <family>_<isa>.cpp with the kernels. Header, checksum and flags are shared: payload.cpp, dispatch.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec.h"

namespace hybridcomm::kernels {

constexpr size_t kMaxSections = 2;

// A part of the body; what lies between `used` and the next section is zero.
struct Section {
  size_t offset, used;  // bytes, from the payload's beginning
};

struct Layout {
  size_t nblocks;
  Section sections[kMaxSections];  // in order; those that a codec lacks have used == 0
  size_t nbytes;                   // of the whole payload
};

struct EncodeArgs {
  CodecParams params;
  Layout layout;
  const float* grad;
  const float* e_in;  // may be null
  float* e_out;       // may be null
  float decay;
  uint64_t seed;
  uint8_t* payload;
  size_t numel;
  bool stream;  // write e_out past the caches
};

struct DecodeArgs {
  CodecParams params;
  Layout layout;
  const uint8_t* const* payloads;
  size_t count;
  float* out;
  size_t numel;
  float weight;
  bool clear;
};

struct Kernels {
  bool (*encode)(
      const EncodeArgs&);  // fills the sections; false: met a non-finite value, outputs half written
  void (*decode)(const DecodeArgs&);
};

struct CodecRow {
  bool (*valid)(const CodecParams&);
  Layout (*layout)(const CodecParams&, size_t numel);
  // Whether an encoder could have written these sections; header, length and checksum are right.
  bool (*check)(const CodecParams&, const Layout&, const uint8_t* payload, size_t numel);
  bool whole_region;
  bool seeded;
  const Kernels* kernels[3];  // scalar, avx2, avx512
};

// Kernels that exist on x86-64 only.
#if defined(__x86_64__)
#define X86_ONLY(kernels) (kernels)
#else
#define X86_ONLY(kernels) nullptr
#endif

// Null for a codec that has no row.
const CodecRow* row_of(Codec codec);

// What all codecs share.
struct SharedKernels {
  bool (*finite)(const EncodeArgs&);  // whether grad + decay * e_in is finite throughout
  // Sum of word[i] * (2 i + 1 modulo 2^32) modulo 2^64 over `count` u32 words.
  uint64_t (*weigh)(const uint8_t* words, size_t count);
};
extern const SharedKernels kSharedScalar;
#if defined(__x86_64__)
extern const SharedKernels kSharedAvx2, kSharedAvx512;
#endif

}  // namespace hybridcomm::kernels
