// The kernels of the sparse and low-rank codecs beside block-wise top-k.
#pragma once

#include "kernels.h"

namespace hybridcomm::kernels {

struct SparseKernels {
  Kernels gtop1, gtopk, randk, powersgd;
};
extern const SparseKernels kSparseScalar;
#if defined(__x86_64__)
extern const SparseKernels kSparseAvx2, kSparseAvx512;
#endif

#define SPARSE_KERNELS(codec) \
  {&kSparseScalar.codec, X86_ONLY(&kSparseAvx2.codec), X86_ONLY(&kSparseAvx512.codec)}

}  // namespace hybridcomm::kernels
