// The sparse codecs in AVX-512.
#if defined(__x86_64__)
#include "lanes_avx512.h"
#include "sparse_region.h"

namespace hybridcomm::kernels {

const SparseKernels kSparseAvx512 = sparse_kernels<Avx512Lanes>();

}  // namespace hybridcomm::kernels
#endif
