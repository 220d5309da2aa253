#include "payload.h"

#include <cstring>

namespace hybridcomm::kernels {
namespace {

// The checksum's own two words are counted as zero.
uint64_t checksum_of(const SharedKernels& shared, const uint8_t* payload, size_t nbytes) {
  constexpr size_t kOwn = offsetof(Header, checksum) / 4;
  uint64_t sum = shared.weigh(payload, nbytes / 4);
  for (size_t i = kOwn; i < kOwn + 2; ++i) {
    uint32_t word;
    std::memcpy(&word, payload + 4 * i, 4);
    sum -= uint64_t{word} * static_cast<uint32_t>(2 * i + 1);
  }
  return sum;
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

void write_header(const CodecParams& params, const Layout& layout, size_t numel, uint64_t digest,
                  uint32_t flags, uint64_t seed, uint8_t* payload) {
  Header head{};
  head.magic = kMagic;
  head.version = kVersion;
  head.codec = static_cast<uint8_t>(params.codec);
  head.value_bits = params.value_bits;
  head.variant = params.variant;
  head.block = params.block;
  head.k = params.k;
  head.numel = numel;
  head.nbytes = layout.nbytes;
  head.digest = digest;
  head.flags = flags;
  head.seed = seed;
  std::memcpy(payload, &head, sizeof head);
}

void write_checksum(const SharedKernels& shared, uint8_t* payload, size_t nbytes) {
  const uint64_t sum = checksum_of(shared, payload, nbytes);
  std::memcpy(payload + offsetof(Header, checksum), &sum, sizeof sum);
}

Status check_payload(const CodecRow& row, const SharedKernels& shared, const CodecParams& params,
                     const uint8_t* payload, size_t numel, uint64_t digest, uint32_t* flags) {
  Header head;
  std::memcpy(&head, payload, sizeof head);
  const Layout layout = row.layout(params, numel);
  if (head.magic != kMagic || head.version != kVersion || head.codec != static_cast<uint8_t>(params.codec) ||
      head.reserved[0] != 0 || head.reserved[1] != 0 || head.reserved[2] != 0 ||
      (head.seed != 0 && !row.seeded) || (head.flags & ~kFlagNonFinite) != 0) {
    return Status::bad_header;
  }
  if (head.digest != digest) return Status::bad_digest;
  if (head.block != params.block || head.k != params.k || head.value_bits != params.value_bits ||
      head.variant != params.variant)
    return Status::bad_layout;
  if (head.numel != numel) return Status::bad_numel;
  if (head.nbytes != layout.nbytes) return Status::bad_nbytes;
  if (head.checksum != checksum_of(shared, payload, layout.nbytes)) return Status::bad_checksum;
  if (head.flags == 0 && !row.check(params, layout, payload, numel)) return Status::bad_record;
  *flags |= head.flags;
  return Status::ok;
}

}  // namespace hybridcomm::kernels
