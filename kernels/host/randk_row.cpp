// randk: what holds on every instruction set. Sections: scales, codes.
#include "payload.h"
#include "randk.h"
#include "sparse.h"

namespace hybridcomm::kernels {
namespace {

bool valid(const CodecParams& params) {
  const uint32_t block = params.block, k = params.k;
  if (params.variant > 1 || params.value_bits != 8 || k == 0 || k % 16 != 0) return false;
  return block <= kMaxBlock && block % k == 0 && block / k >= 2 && block / k <= 256;
}

Layout layout_of(const CodecParams& params, size_t numel) {
  Layout layout{};
  layout.nblocks = numel / params.block + (numel % params.block != 0);
  layout.sections[0] = {sizeof(Header), layout.nblocks};
  layout.sections[1] = {sizeof(Header) + align16(layout.nblocks), params.k * layout.nblocks};
  layout.nbytes = layout.sections[1].offset + align16(layout.sections[1].used);
  return layout;
}

bool check(const CodecParams& params, const Layout& layout, const uint8_t* payload, size_t numel) {
  const uint8_t* scales = payload + layout.sections[0].offset;
  const uint8_t* codes = payload + layout.sections[1].offset;
  const uint32_t most = params.variant == 1 ? kUnbiasedMaxScale : 248;
  bool good = true;
  for (size_t b = 0; b < layout.nblocks; ++b) good &= scales[b] >= 1 && scales[b] <= most;
  for (size_t i = 0; i < layout.sections[1].used; ++i) good &= codes[i] != 0x80;
  const size_t tail = numel % params.block;
  if (tail == 0) return good;
  uint64_t seed;
  std::memcpy(&seed, payload + offsetof(Header, seed), sizeof seed);
  const uint32_t k = params.k, rows = params.block / k;
  const uint64_t first = uint64_t{layout.nblocks - 1} * k;
  for (uint32_t j = 0; j < k; ++j) {
    const bool beyond = j * rows + element_of(draw(seed, first + j), rows) >= tail;
    good &= !beyond || codes[first + j] == 0;
  }
  return good;
}

}  // namespace

extern const CodecRow kRandkRow;
const CodecRow kRandkRow = {valid, layout_of, check, false, true, SPARSE_KERNELS(randk)};

}  // namespace hybridcomm::kernels
