// The quantising codecs in AVX-512.
#if defined(__x86_64__)
#include "lanes_avx512.h"
#include "quant_region.h"

namespace hybridcomm::kernels {

const QuantKernels kQuantAvx512 = quant_kernels<Avx512Lanes>();

}  // namespace hybridcomm::kernels
#endif
