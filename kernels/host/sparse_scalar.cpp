// The sparse codecs in plain C++, on every machine.
#include "lanes_scalar.h"
#include "sparse_region.h"

namespace hybridcomm::kernels {

const SparseKernels kSparseScalar = sparse_kernels<ScalarLanes>();

}  // namespace hybridcomm::kernels
