// Reductions of NCCL's types on the host: in rank order, 16-bit floats through fp32 and rounded once at the end.
#pragma once

#include <cstddef>
#include <vector>

#include "gpu_nccl_abi.h"

namespace sim {

size_t size_of(hybridcomm::gpu::ncclDataType_t type);  // 0: no such type
// out = inputs reduced, element by element; `factor` of a pre-multiplied sum, else 1.
void reduce(unsigned char* out, const std::vector<const unsigned char*>& inputs, size_t count,
            hybridcomm::gpu::ncclDataType_t type, hybridcomm::gpu::ncclRedOp_t op,
            const std::vector<double>& factors);

}  // namespace sim
