// gtop1: what holds on every instruction set. Sections: scales, records.
#include <cstring>

#include "payload.h"
#include "sparse.h"

namespace hybridcomm::kernels {
namespace {

uint32_t row_bits_of(const CodecParams& params) {
  uint32_t bits = 0;
  while ((1u << bits) < params.block / params.k) ++bits;
  return bits;
}

bool valid(const CodecParams& params) {
  const uint32_t block = params.block, k = params.k;
  if (params.variant != 0 || k == 0 || k % 16 != 0 || block > kMaxBlock || block % k != 0) return false;
  const uint32_t rows = block / k;
  return rows >= 2 && rows <= 256 && params.value_bits >= 3 && params.value_bits <= 16 - row_bits_of(params);
}

bool check(const CodecParams& params, const Layout& layout, const uint8_t* payload, size_t numel) {
  const uint8_t* scales = payload + layout.sections[0].offset;
  bool good = true;
  for (size_t b = 0; b < layout.nblocks; ++b) good &= scales[b] >= 1 && scales[b] <= 256 - params.value_bits;
  const uint32_t low = (1u << (16 - params.value_bits)) - 1, k = params.k, rows = params.block / k;
  const uint8_t* from = payload + layout.sections[1].offset;
  const int32_t reserved = -(1 << (params.value_bits - 1));
  for (size_t b = 0; b < layout.nblocks; ++b) {
    const size_t left = numel - b * params.block;
    const size_t elements = left < params.block ? left : params.block;
    for (uint32_t j = 0; j < k; ++j, from += 2) {
      uint16_t record;
      std::memcpy(&record, from, 2);
      const uint32_t row = record & low;
      const bool inside = row < rows && size_t{row} * k + j < elements;
      good &= inside ? static_cast<int16_t>(record) >> (16 - params.value_bits) != reserved
                     : j >= elements && record == 0;
    }
  }
  return good;
}

}  // namespace

extern const CodecRow kGtop1Row;
const CodecRow kGtop1Row = {valid, record_sections, check, false, false, SPARSE_KERNELS(gtop1)};

}  // namespace hybridcomm::kernels
