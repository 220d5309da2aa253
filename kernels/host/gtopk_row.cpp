// gtopk: what holds on every instruction set. Sections: scales, records, counts.
#include "gtopk.h"
#include "payload.h"
#include "sparse.h"

namespace hybridcomm::kernels {
namespace {

bool valid(const CodecParams& params) {
  const uint32_t block = params.block;
  if (params.variant != 0 || block < 16 || block > kMaxBlock || (block & (block - 1)) != 0) return false;
  uint32_t index_bits = 0;
  while ((1u << index_bits) < block) ++index_bits;
  return params.k >= 1 && params.k <= block && params.value_bits >= 3 && params.value_bits <= 16 - index_bits;
}

Layout layout_of(const CodecParams& params, size_t numel) {
  const size_t kept = gtopk_kept(params, numel);
  Layout layout{};
  layout.nblocks = numel / params.block + (numel % params.block != 0);
  const size_t used[kMaxSections] = {(kept + kGtopkGroup - 1) / kGtopkGroup, 2 * kept,
                                     (kept + layout.nblocks + 7) / 8};
  layout.nbytes = sizeof(Header);
  for (size_t i = 0; i < kMaxSections; ++i) {
    layout.sections[i] = {layout.nbytes, used[i]};
    layout.nbytes += align16(used[i]);
  }
  return layout;
}

// One pass over the counts' bits, which finds each record's block on the way.
bool check(const CodecParams& params, const Layout& layout, const uint8_t* payload, size_t numel) {
  const size_t kept = gtopk_kept(params, numel), bits = kept + layout.nblocks;
  const uint8_t* scales = payload + layout.sections[0].offset;
  const uint8_t* records = payload + layout.sections[1].offset;
  const uint8_t* counts = payload + layout.sections[2].offset;
  bool good = true;
  for (size_t g = 0; g < layout.sections[0].used; ++g) {
    good &= scales[g] >= 1 && scales[g] <= 256 - params.value_bits;
  }
  const uint32_t low = (1u << (16 - params.value_bits)) - 1;
  const int32_t reserved = -(1 << (params.value_bits - 1));
  size_t r = 0, block = 0, next = 0;  // the least index that the next record may have
  for (size_t bit = 0; bit < bits; ++bit) {
    if ((counts[bit / 8] >> bit % 8 & 1) == 0) {
      ++block;
      continue;
    }
    if (r == kept || block == layout.nblocks) return false;
    uint16_t record;
    std::memcpy(&record, records + 2 * r++, 2);
    const size_t index = block * params.block + (record & low);
    good &= (record & low) < params.block && index >= next && index < numel;
    good &= static_cast<int16_t>(record) >> (16 - params.value_bits) != reserved;
    next = index + 1;
  }
  for (size_t bit = bits; bit % 8 != 0; ++bit) good &= (counts[bit / 8] >> bit % 8 & 1) == 0;
  return good && r == kept;
}

}  // namespace

extern const CodecRow kGtopkRow;
const CodecRow kGtopkRow = {valid, layout_of, check, true, false, SPARSE_KERNELS(gtopk)};

}  // namespace hybridcomm::kernels
