// Steps 4 and 6 of 7 by a caller's own code instead of the kernels; bind_custom.cpp has Python's.
#pragma once

#include <cstdint>
#include <vector>

#include "codec.h"

namespace hybridcomm {

// Same contract as kernels::codec_encode and codec_decode, for payloads of a length that the plan says. Runs on the
// executor's thread. Throws Error with the code `compressor` or `payload`, which ends the call on every rank.
class CustomCodec {
 public:
  CustomCodec() = default;
  CustomCodec(const CustomCodec&) = delete;
  CustomCodec& operator=(const CustomCodec&) = delete;
  virtual ~CustomCodec() = default;

  virtual uint32_t encode(const kernels::EncodeInput& input, uint8_t* payload, size_t numel,
                          uint64_t digest) const = 0;
  virtual void decode(const std::vector<const uint8_t*>& payloads, float* out, size_t numel, float weight,
                      uint64_t digest) const = 0;
};

}  // namespace hybridcomm
