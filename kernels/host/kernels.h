// The table behind run-time dispatch: one row per instruction set, filled by topk_<isa>.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec.h"

namespace hybridcomm::kernels {

struct EncodeArgs {
  CodecParams params;
  const float* grad;
  const float* e_in;  // may be null
  float* e_out;       // may be null
  float decay;
  uint8_t* scales;
  uint8_t* records;
  size_t numel;
  bool stream;  // write e_out past the caches
};

struct DecodeArgs {
  CodecParams params;
  const uint8_t* const* payloads;
  size_t count;
  float* out;
  size_t numel;
  float weight;
  bool clear;
};

struct Kernels {
  bool (*encode)(const EncodeArgs&);  // false: met a non-finite value, outputs half written
  void (*decode)(const DecodeArgs&);
  bool (*finite)(const EncodeArgs&);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace hybridcomm::kernels
