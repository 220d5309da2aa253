// The quantising codecs in AVX2.
#if defined(__x86_64__)
#include "lanes_avx2.h"
#include "quant_region.h"

namespace hybridcomm::kernels {

const QuantKernels kQuantAvx2 = quant_kernels<Avx2Lanes>();

}  // namespace hybridcomm::kernels
#endif
