// BLAKE2s (RFC 7693) with a key: the message authentication code of the handshake.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace hybridcomm {

using Digest = std::array<uint8_t, 32>;

// A key has at most 32 bytes; without one it is the plain hash.
Digest blake2s(const uint8_t* key, size_t key_nbytes, const uint8_t* data, size_t nbytes);

}  // namespace hybridcomm
