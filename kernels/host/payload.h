// The payload's bytes (docs/payload.md): header, offsets, checksum. Little endian hosts only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "payloads are little endian and are read in place"
#endif

namespace hybridcomm::kernels {

struct Header {
  uint32_t magic;
  uint16_t version;
  uint8_t codec;
  uint8_t value_bits;
  uint32_t block;
  uint32_t k;
  uint64_t numel;
  uint64_t nbytes;
  uint64_t digest;
  uint32_t flags;
  uint8_t variant;
  uint8_t reserved[3];
  uint64_t checksum;
  uint64_t seed;  // zero where the codec has none
};
static_assert(sizeof(Header) == 64, "the header is 64 bytes without padding");

constexpr uint32_t kMagic = 0x4C504348u;  // "HCPL"
constexpr uint16_t kVersion = 1;
constexpr uint32_t kMaxBlock = 4096;

// `nbytes` rounded up to a whole section.
inline size_t align16(size_t nbytes) { return (nbytes + 15) / 16 * 16; }

// Of topk and gtop1: per block a scale, one byte, and k records of 16 bits.
inline Layout record_sections(const CodecParams& params, size_t numel) {
  Layout layout{};
  layout.nblocks = numel / params.block + (numel % params.block != 0);
  layout.sections[0] = {sizeof(Header), layout.nblocks};
  layout.sections[1] = {sizeof(Header) + align16(layout.nblocks), 2 * size_t{params.k} * layout.nblocks};
  layout.nbytes = layout.sections[1].offset + align16(layout.sections[1].used);
  return layout;
}

void write_header(const CodecParams& params, const Layout& layout, size_t numel, uint64_t digest,
                  uint32_t flags, uint64_t seed, uint8_t* payload);
void write_checksum(const SharedKernels& shared, uint8_t* payload, size_t nbytes);

// Everything that can be refused, before anything is used; *flags gets the payload's flags.
Status check_payload(const CodecRow& row, const SharedKernels& shared, const CodecParams& params,
                     const uint8_t* payload, size_t numel, uint64_t digest, uint32_t* flags);

}  // namespace hybridcomm::kernels
