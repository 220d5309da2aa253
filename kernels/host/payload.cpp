#include "payload.h"

#include <cstring>

namespace hybridcomm::kernels {
namespace {

size_t align16(size_t nbytes) { return (nbytes + 15) / 16 * 16; }

// Sum of word[i] * (2 i + 1) modulo 2^64, the checksum's own two words counted as zero.
uint64_t checksum_of(const uint8_t* payload, size_t nbytes) {
  constexpr size_t kOwn = offsetof(Header, checksum) / 4;
  uint64_t sum = 0;
  for (size_t i = 0; i < nbytes / 4; ++i) {
    uint32_t word;
    std::memcpy(&word, payload + 4 * i, 4);
    sum += uint64_t{word} * static_cast<uint32_t>(2 * i + 1);
  }
  for (size_t i = kOwn; i < kOwn + 2; ++i) {
    uint32_t word;
    std::memcpy(&word, payload + 4 * i, 4);
    sum -= uint64_t{word} * static_cast<uint32_t>(2 * i + 1);
  }
  return sum;
}

bool records_in_range(const CodecParams& params, const uint8_t* payload, size_t numel, const Layout& layout) {
  const uint8_t* scales = payload + sizeof(Header);
  bool good = true;
  for (size_t b = 0; b < layout.nblocks; ++b) good &= scales[b] >= 1 && scales[b] <= 256 - params.value_bits;
  const size_t tail = numel % params.block;
  if (tail == 0 || !good) return good;
  const uint8_t* last = payload + layout.records_offset + 2 * params.k * (layout.nblocks - 1);
  for (uint32_t j = 0; j < params.k; ++j) {
    uint16_t record;
    std::memcpy(&record, last + 2 * j, 2);
    good &= (record & (params.block - 1)) < tail;
  }
  return good;
}

}  // namespace

const char* status_text(Status status) {
  switch (status) {
    case Status::ok:
      return "ok";
    case Status::bad_params:
      return "invalid codec, block, k, value_bits or variant";
    case Status::bad_header:
      return "not a payload of this version and codec";
    case Status::bad_digest:
      return "made under another plan";
    case Status::bad_layout:
      return "another block, k, value_bits or variant";
    case Status::bad_numel:
      return "another number of elements";
    case Status::bad_nbytes:
      return "another length";
    case Status::bad_checksum:
      return "checksum mismatch: bits changed on the way";
    case Status::bad_record:
      return "a scale, an index or a code that no encoder writes";
  }
  return "unknown status";
}

bool codec_valid(const CodecParams& params) {
  if (params.codec != Codec::topk || params.variant != 0 || params.reserved != 0) return false;
  const uint32_t block = params.block;
  if (block < 16 || block > kMaxBlock || (block & (block - 1)) != 0) return false;
  uint32_t index_bits = 0;
  while ((1u << index_bits) < block) ++index_bits;
  return params.k >= 1 && params.k <= block && params.value_bits >= 3 && params.value_bits <= 16 - index_bits;
}

Layout layout_of(const CodecParams& params, size_t numel) {
  Layout layout;
  layout.nblocks = numel / params.block + (numel % params.block != 0);
  layout.records_offset = sizeof(Header) + align16(layout.nblocks);
  layout.nbytes = layout.records_offset + align16(2 * size_t{params.k} * layout.nblocks);
  return layout;
}

size_t codec_nbytes(const CodecParams& params, size_t numel) {
  return codec_valid(params) ? layout_of(params, numel).nbytes : 0;
}

void write_header(const CodecParams& params, size_t numel, uint64_t digest, uint32_t flags,
                  uint8_t* payload) {
  Header head{};
  head.magic = kMagic;
  head.version = kVersion;
  head.codec = static_cast<uint8_t>(params.codec);
  head.value_bits = params.value_bits;
  head.variant = params.variant;
  head.block = params.block;
  head.k = params.k;
  head.numel = numel;
  head.nbytes = layout_of(params, numel).nbytes;
  head.digest = digest;
  head.flags = flags;
  std::memcpy(payload, &head, sizeof head);
}

void write_checksum(uint8_t* payload, size_t nbytes) {
  const uint64_t sum = checksum_of(payload, nbytes);
  std::memcpy(payload + offsetof(Header, checksum), &sum, sizeof sum);
}

Status check_payload(const CodecParams& params, const uint8_t* payload, size_t numel, uint64_t digest,
                     uint32_t* flags) {
  Header head;
  std::memcpy(&head, payload, sizeof head);
  const Layout layout = layout_of(params, numel);
  if (head.magic != kMagic || head.version != kVersion || head.codec != static_cast<uint8_t>(params.codec) ||
      head.reserved[0] != 0 || head.reserved[1] != 0 || head.reserved[2] != 0 || head.seed != 0 ||
      (head.flags & ~kFlagNonFinite) != 0) {
    return Status::bad_header;
  }
  if (head.digest != digest) return Status::bad_digest;
  if (head.block != params.block || head.k != params.k || head.value_bits != params.value_bits ||
      head.variant != params.variant)
    return Status::bad_layout;
  if (head.numel != numel) return Status::bad_numel;
  if (head.nbytes != layout.nbytes) return Status::bad_nbytes;
  if (head.checksum != checksum_of(payload, layout.nbytes)) return Status::bad_checksum;
  if (head.flags == 0 && !records_in_range(params, payload, numel, layout)) return Status::bad_record;
  *flags |= head.flags;
  return Status::ok;
}

}  // namespace hybridcomm::kernels
