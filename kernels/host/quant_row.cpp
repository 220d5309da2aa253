// The quantising codecs: what holds on every instruction set. Sections: scales, codes.
#include <cstring>

#include "payload.h"
#include "quant.h"

namespace hybridcomm::kernels {
namespace {

bool valid_cast(const CodecParams& p) {
  return p.value_bits == 16 && p.variant == 0 && p.block == kCastBlock && p.k == 0;
}

template <uint32_t kBits, uint32_t kVariants>
bool valid_group(const CodecParams& p) {
  return p.value_bits == kBits && p.variant < kVariants && p.k == 0 && p.block >= 16 &&
         p.block <= kMaxBlock && (p.block & (p.block - 1)) == 0;
}

template <uint32_t kScaleBytes>
Layout layout_of(const CodecParams& params, size_t numel) {
  Layout layout{};
  layout.nblocks = numel / params.block + (numel % params.block != 0);
  layout.sections[0] = {sizeof(Header), kScaleBytes * layout.nblocks};
  const size_t codes = numel / 8 * params.value_bits + (numel % 8 * params.value_bits + 7) / 8;
  layout.sections[1] = {sizeof(Header) + align16(layout.sections[0].used), codes};
  layout.nbytes = layout.sections[1].offset + align16(codes);
  return layout;
}

// Every code is one that an encoder writes, and so are the bits after the last one.
bool check_halves(const CodecParams& params, const Layout& layout, const uint8_t* payload, size_t numel) {
  const int16_t largest = params.codec == Codec::fp16 ? 0x7BFF : 0x7F7F;
  const uint8_t* codes = payload + layout.sections[1].offset;
  int16_t most = 0;
  for (size_t i = 0; i < numel; ++i) {
    int16_t code;
    std::memcpy(&code, codes + 2 * i, 2);
    const int16_t size = static_cast<int16_t>(code & 0x7FFF);
    most = size > most ? size : most;
  }
  return most <= largest;
}

bool scales_within(const Layout& layout, const uint8_t* payload, uint32_t largest) {
  const uint8_t* scales = payload + layout.sections[0].offset;
  bool good = true;
  for (size_t b = 0; b < layout.nblocks; ++b) good &= scales[b] >= 1 && scales[b] <= largest;
  return good;
}

bool check_fp8(const CodecParams& params, const Layout& layout, const uint8_t* payload, size_t numel) {
  const uint8_t* codes = payload + layout.sections[1].offset;
  uint8_t most = 0;
  for (size_t i = 0; i < numel; ++i) {
    const uint8_t size = codes[i] & 0x7F;
    most = size > most ? size : most;
  }
  return most <= 0x77 && scales_within(layout, payload, params.variant == 0 ? 247 : 240);
}

bool check_int8(const CodecParams&, const Layout& layout, const uint8_t* payload, size_t numel) {
  const uint8_t* codes = payload + layout.sections[1].offset;
  uint8_t reserved = 0;
  for (size_t i = 0; i < numel; ++i) reserved |= static_cast<uint8_t>(codes[i] == 0x80);
  return reserved == 0 && scales_within(layout, payload, 248);
}

bool check_int4(const CodecParams&, const Layout& layout, const uint8_t* payload, size_t numel) {
  const uint8_t* codes = payload + layout.sections[1].offset;
  uint8_t reserved = numel % 2 != 0 && codes[numel / 2] >> 4 != 0;
  const size_t nbytes = layout.sections[1].used;
  for (size_t i = 0; i < nbytes; ++i) {
    reserved |= static_cast<uint8_t>((codes[i] & 0x0F) == 0x08);
    reserved |= static_cast<uint8_t>((codes[i] & 0xF0) == 0x80);
  }
  return reserved == 0 && scales_within(layout, payload, 252);
}

bool check_sign1(const CodecParams&, const Layout& layout, const uint8_t* payload, size_t numel) {
  const uint8_t* scales = payload + layout.sections[0].offset;
  bool good = true;
  for (size_t b = 0; b < layout.nblocks; ++b) {
    const uint32_t scale = scales[2 * b] | uint32_t{scales[2 * b + 1]} << 8;
    good &= scale == 0 || (scale >= 0x0080 && scale <= 0x7F7F);
  }
  const uint8_t* codes = payload + layout.sections[1].offset;
  return good && (numel % 8 == 0 || codes[numel / 8] >> numel % 8 == 0);
}

}  // namespace

extern const CodecRow kFp16Row, kBf16Row, kFp8Row, kInt8Row, kInt4Row, kSign1Row;

#define KERNELS_OF(codec) {&kQuantScalar.codec, X86_ONLY(&kQuantAvx2.codec), X86_ONLY(&kQuantAvx512.codec)}

const CodecRow kFp16Row = {valid_cast, layout_of<0>, check_halves, false, false, KERNELS_OF(fp16)};
const CodecRow kBf16Row = {valid_cast, layout_of<0>, check_halves, false, false, KERNELS_OF(bf16)};
const CodecRow kFp8Row = {valid_group<8, 2>, layout_of<1>, check_fp8, false, false, KERNELS_OF(fp8)};
const CodecRow kInt8Row = {valid_group<8, 1>, layout_of<1>, check_int8, false, false, KERNELS_OF(int8)};
const CodecRow kInt4Row = {valid_group<4, 1>, layout_of<1>, check_int4, false, false, KERNELS_OF(int4)};
const CodecRow kSign1Row = {valid_group<1, 1>, layout_of<2>, check_sign1, false, false, KERNELS_OF(sign1)};

}  // namespace hybridcomm::kernels
