// What all codecs share, in plain C++: is a compensated gradient finite (asked before a residual is overwritten in
// place), and the sum behind the checksum.
#include "bits.h"
#include "kernels.h"

namespace hybridcomm::kernels {
namespace {

bool finite(const EncodeArgs& a) {
  uint32_t largest = 0;
  for (size_t i = 0; i < a.numel; ++i) {
    const uint32_t key = bits_of(compensate(a.grad, a.e_in, a.decay, i)) & kMagnitude;
    largest = key > largest ? key : largest;
  }
  return largest < kInfKey;
}

uint64_t weigh(const uint8_t* words, size_t count) {
  uint64_t sum = 0;
  for (size_t i = 0; i < count; ++i) {
    uint32_t word;
    std::memcpy(&word, words + 4 * i, 4);
    sum += uint64_t{word} * static_cast<uint32_t>(2 * i + 1);
  }
  return sum;
}

}  // namespace

const SharedKernels kSharedScalar = {finite, weigh};

}  // namespace hybridcomm::kernels
