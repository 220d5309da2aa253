// Steps 4 and 6 of 7: compress and decompress, on the host.
//
// In: a shard of gradients and its residual; out: one payload (docs/payload.md) and the new residual. And
// back: payloads added into a shard. What is computed is fixed bit for bit by kernels/reference.py, whatever
// the instruction set. No Python, no exceptions, no allocation: the engine calls this from its own thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybridcomm::kernels {

// The numbers are the payload header's and the wire format's; kernels/payload.py has the same.
enum class Codec : uint8_t {
  none = 0,
  topk = 1,
  fp16 = 2,
  bf16 = 3,
  fp8 = 4,
  int8 = 5,
  int4 = 6,
  sign1 = 7,
  gtop1 = 8,
  gtopk = 9,
  randk = 10,
  powersgd = 11,
  custom = 12,
};

// What a Python spec's `params` says, in the same order.
struct CodecParams {
  Codec codec;
  uint8_t value_bits;
  uint8_t variant;
  uint8_t reserved;  // zero
  uint32_t block;    // elements per block: regions begin on multiples of it
  uint32_t k;
};

enum Flags : uint32_t {
  kFlagNonFinite = 1u,        // grad + e_in held NaN or Inf: body zero, e_out = e_in, decoding fills with NaN
  kFlagBadParams = 1u << 31,  // returned only, never written: the parameters are invalid, nothing was done
};

// Why a payload was refused, in the order of the checks; kernels/payload.py has the same numbers.
enum class Status : int {
  ok = 0,
  bad_params,  // the caller's own parameters
  bad_header,  // magic, version, codec, reserved bytes, unknown flags
  bad_digest,  // made under another plan
  bad_layout,  // another block, k, value_bits or variant
  bad_numel,
  bad_nbytes,
  bad_checksum,  // bits changed on the way
  bad_record,    // a scale, an index or a code that no encoder writes
};
const char* status_text(Status status);

enum class Isa : int { automatic = -1, scalar = 0, avx2 = 1, avx512 = 2 };
bool isa_available(Isa isa);
// What `automatic` means from now on, in the whole process; false (and no change) when this machine lacks it.
bool set_isa(Isa isa);
Isa active_isa();

bool codec_valid(const CodecParams& params);

// Bytes of the payload of `numel` elements: a pure function, a multiple of 16; 0 for invalid parameters.
size_t codec_nbytes(const CodecParams& params, size_t numel);

// True where the selection spans the region: such a shard must not be cut into chunks.
bool codec_whole_region(const CodecParams& params);

// acc = grad + decay * e_in, fp32, each operation rounded; decay == 1 multiplies by nothing.
struct EncodeInput {
  const float* grad;
  const float* e_in;  // null: memoryless
  float* e_out;       // null: what is not sent is dropped; may be e_in, and otherwise overlaps nothing
  float decay = 1.0f;
  uint64_t seed = 0;  // randk's; others take none and ignore it
};

// Encodes acc into payload (codec_nbytes bytes) and leaves in e_out what was not sent; returns the flags.
// On kFlagNonFinite e_out is e_in again (zero when memoryless).
uint32_t codec_encode(const CodecParams& params, const EncodeInput& input, uint8_t* payload, size_t numel,
                      uint64_t digest, Isa isa = Isa::automatic);

// out[i] += (value * scale) * weight for each payload in order; with a flagged payload all of out becomes NaN.
// Each payload must be codec_nbytes readable bytes; what they say is checked before anything is written, so
// any other status than ok leaves out as it was and puts the refused payload's position in *flags_out (else
// the or-ed flags).
Status codec_decode_add(const CodecParams& params, const uint8_t* const* payloads, size_t count, float* out,
                        size_t numel, float weight, uint64_t digest, uint32_t* flags_out,
                        Isa isa = Isa::automatic);

// The same into a region that is cleared first, block by block while it is in cache: out = 0 + sum.
Status codec_decode(const CodecParams& params, const uint8_t* const* payloads, size_t count, float* out,
                    size_t numel, float weight, uint64_t digest, uint32_t* flags_out,
                    Isa isa = Isa::automatic);

}  // namespace hybridcomm::kernels
