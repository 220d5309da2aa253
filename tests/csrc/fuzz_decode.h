// The input of the decoders' fuzz target: a case, and bytes that become a payload's body or a gradient.
#pragma once

#include <cstdint>

namespace hybridcomm::kernels::test {

enum Mode : uint8_t {
  kBodyA = 0,  // header and checksum are right, the body is the input: twice, since it is what matters most
  kBodyB = 1,
  kRaw = 2,     // everything is the input
  kEncode = 3,  // the input is a gradient and its residual: what encoders write must be accepted
  kKind = 3,
  kSpoilHeader = 4,    // one byte, before the checksum
  kSpoilAnywhere = 8,  // one byte, after the checksum
  kFlagged = 16,
  kAfterGoodOne = 32,  // the second of two payloads: nothing of the first may have been added
  kInPlace = 64,
  kMemoryless = 128,
};

struct Case {
  uint16_t params = 0;  // position in the list of valid ones
  uint16_t numel = 0;   // see numel_of
  uint8_t mode = 0;
  uint8_t spoil = 0;
  uint16_t spoil_at = 0;
  uint64_t seed = 0;
};
static_assert(sizeof(Case) == 16, "the input begins with it");

// Small regions unless the highest bit is set, which says two blocks and a tail at most: speed is coverage.
constexpr uint16_t kLarge = 0x8000;
inline uint16_t numel_of(const Case& one, uint32_t block) {
  const uint32_t limit = (one.numel & kLarge) == 0      ? 130
                         : block >= 16 && block <= 4096 ? 2 * block + 66
                                                        : 700;
  return static_cast<uint16_t>((one.numel & ~kLarge) % limit);
}

}  // namespace hybridcomm::kernels::test
