// Is the compensated gradient finite? Asked before a residual is overwritten in place; on every machine.
#include "bits.h"
#include "kernels.h"

namespace hybridcomm::kernels {

bool finite_scalar(const EncodeArgs& a) {
  uint32_t largest = 0;
  for (size_t i = 0; i < a.numel; ++i) {
    const uint32_t key = bits_of(compensate(a.grad, a.e_in, a.decay, i)) & kMagnitude;
    largest = key > largest ? key : largest;
  }
  return largest < kInfKey;
}

}  // namespace hybridcomm::kernels
