// The sparse codecs in AVX2.
#if defined(__x86_64__)
#include "lanes_avx2.h"
#include "sparse_region.h"

namespace hybridcomm::kernels {

const SparseKernels kSparseAvx2 = sparse_kernels<Avx2Lanes>();

}  // namespace hybridcomm::kernels
#endif
