// The quantising codecs in plain C++, on every machine.
#include "lanes_scalar.h"
#include "quant_region.h"

namespace hybridcomm::kernels {

const QuantKernels kQuantScalar = quant_kernels<ScalarLanes>();

}  // namespace hybridcomm::kernels
