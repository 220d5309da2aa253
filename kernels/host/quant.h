// The kernels of the quantising codecs, which all have two sections: scales (none for casts) and codes.
#pragma once

#include "kernels.h"

namespace hybridcomm::kernels {

struct QuantKernels {
  Kernels fp16, bf16, fp8, int8, int4, sign1;
};
extern const QuantKernels kQuantScalar;
#if defined(__x86_64__)
extern const QuantKernels kQuantAvx2, kQuantAvx512;
#endif

constexpr uint32_t kCastBlock = 16;  // elements; casts have no groups, a region begins at a cache line

}  // namespace hybridcomm::kernels
