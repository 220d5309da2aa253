// Steps 4 and 6 of 7: compress and decompress, on the host.
//
// In: a shard of gradients and its residual; out: one payload (docs/payload.md) and the new residual. And
// back: payloads added into a shard. What is computed is fixed bit for bit by kernels/reference.py, whatever
// the instruction set. No Python, no exceptions, no allocation: the engine calls this from its own thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybridcomm::kernels {

struct TopKParams {
  uint32_t block;       // elements per block: a power of two from 16 to 4096
  uint32_t k;           // records per block: 1 to block
  uint32_t value_bits;  // 3 to 16 - log2(block)
};

enum Flags : uint32_t {
  kFlagNonFinite = 1u,        // grad + e_in held NaN or Inf: body zero, e_out = e_in, decoding fills with NaN
  kFlagBadParams = 1u << 31,  // returned only, never written: the parameters are invalid, nothing was done
};

// Why a payload was refused, in the order of the checks; kernels/spec.py has the same numbers.
enum class Status : int {
  ok = 0,
  bad_params,  // the caller's own parameters
  bad_header,  // magic, version, codec, reserved bytes, unknown flags
  bad_digest,  // made under another plan
  bad_layout,  // another block, k or value_bits
  bad_numel,
  bad_nbytes,
  bad_checksum,  // bits changed on the way
  bad_record,    // a scale or an index that no encoder writes
};
const char* status_text(Status status);

enum class Isa : int { automatic = -1, scalar = 0, avx2 = 1, avx512 = 2 };
bool isa_available(Isa isa);
// What `automatic` means from now on, in the whole process; false (and no change) when this machine lacks it.
bool set_isa(Isa isa);
Isa active_isa();

bool topk_valid(const TopKParams& params);

// Bytes of the payload of `numel` elements: a pure function, a multiple of 16; 0 for invalid parameters.
size_t topk_nbytes(const TopKParams& params, size_t numel);

// Encodes grad + e_in into payload (topk_nbytes bytes) and leaves in e_out what was not sent; returns the
// flags. e_in null: memoryless. e_out null: the rest is dropped. e_out may be e_in, and otherwise overlaps
// nothing. On kFlagNonFinite e_out is e_in again (zero when memoryless).
uint32_t topk_encode(const TopKParams& params, const float* grad, const float* e_in, float* e_out,
                     uint8_t* payload, size_t numel, uint64_t digest, Isa isa = Isa::automatic);

// out[i] += (q * scale) * weight for each payload in order; with a flagged payload all of out becomes NaN.
// Each payload must be topk_nbytes readable bytes; what they say is checked before anything is written, so
// any other status than ok leaves out as it was and puts the refused payload's position in *flags_out (else
// the or-ed flags).
Status topk_decode_add(const TopKParams& params, const uint8_t* const* payloads, size_t count, float* out,
                       size_t numel, float weight, uint64_t digest, uint32_t* flags_out,
                       Isa isa = Isa::automatic);

// The same into a region that is cleared first, block by block while it is in cache: out = 0 + sum.
Status topk_decode(const TopKParams& params, const uint8_t* const* payloads, size_t count, float* out,
                   size_t numel, float weight, uint64_t digest, uint32_t* flags_out,
                   Isa isa = Isa::automatic);

}  // namespace hybridcomm::kernels
