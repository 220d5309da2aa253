// powersgd: what holds on every instruction set. Sections: scale, P, Q.
#include "powersgd.h"

#include "payload.h"
#include "sparse.h"

namespace hybridcomm::kernels {
namespace {

bool valid(const CodecParams& params) {
  const uint32_t block = params.block;
  if (params.variant != 0 || params.value_bits != 32 || params.k < 1 || params.k > kMaxRank) return false;
  return block >= 16 && block <= kMaxBlock && (block & (block - 1)) == 0;
}

Layout layout_of(const CodecParams& params, size_t numel) {
  Layout layout{};
  layout.nblocks = numel / params.block + (numel % params.block != 0);
  const size_t rank = numel == 0 ? 0 : params.k;
  const size_t used[kMaxSections] = {numel == 0 ? 0u : 1u, 4 * rank * layout.nblocks,
                                     4 * rank * params.block};
  layout.nbytes = sizeof(Header);
  for (size_t i = 0; i < kMaxSections; ++i) {
    layout.sections[i] = {layout.nbytes, used[i]};
    layout.nbytes += align16(used[i]);
  }
  return layout;
}

// No float beyond `most` in magnitude, as bits.
bool within(const uint8_t* payload, const Section& section, uint32_t most) {
  bool good = true;
  for (size_t i = 0; i < section.used / 4; ++i) {
    good &= (bits_of(get(payload + section.offset, i)) & kMagnitude) <= most;
  }
  return good;
}

bool check(const CodecParams&, const Layout& layout, const uint8_t* payload, size_t numel) {
  if (numel == 0) return true;
  const uint32_t scale = payload[layout.sections[0].offset];
  if (scale == 0) {
    uint8_t any = 0;
    for (size_t part = 1; part < kMaxSections; ++part) {
      const Section& section = layout.sections[part];
      for (size_t i = 0; i < section.used; ++i) any |= payload[section.offset + i];
    }
    return any == 0;
  }
  return scale <= kPowersgdMaxScale && within(payload, layout.sections[1], bits_of(2.0f)) &&
         within(payload, layout.sections[2], bits_of(0x1p20f));
}

}  // namespace

extern const CodecRow kPowersgdRow;
const CodecRow kPowersgdRow = {valid, layout_of, check, false, true, SPARSE_KERNELS(powersgd)};

}  // namespace hybridcomm::kernels
