#include "blake2s.h"

#include <algorithm>
#include <cstring>

namespace hybridcomm {
namespace {

constexpr size_t kBlock = 64;
constexpr std::array<uint32_t, 8> kInitial = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                                              0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};
constexpr uint8_t kSchedule[10][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                       {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
                                       {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
                                       {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
                                       {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
                                       {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
                                       {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
                                       {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
                                       {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
                                       {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

uint32_t rotate(uint32_t value, int bits) { return (value >> bits) | (value << (32 - bits)); }

struct Mixer {
  std::array<uint32_t, 16> v;
  void mix(size_t a, size_t b, size_t c, size_t d, uint32_t x, uint32_t y) {
    v[a] += v[b] + x;
    v[d] = rotate(v[d] ^ v[a], 16);
    v[c] += v[d];
    v[b] = rotate(v[b] ^ v[c], 12);
    v[a] += v[b] + y;
    v[d] = rotate(v[d] ^ v[a], 8);
    v[c] += v[d];
    v[b] = rotate(v[b] ^ v[c], 7);
  }
};

void compress(std::array<uint32_t, 8>& state, const uint8_t* block, uint64_t counted, bool last) {
  uint32_t words[16];
  std::memcpy(words, block, kBlock);  // little endian hosts only, as everything on the wire
  Mixer mixer;
  std::copy(state.begin(), state.end(), mixer.v.begin());
  std::copy(kInitial.begin(), kInitial.end(), mixer.v.begin() + 8);
  mixer.v[12] ^= static_cast<uint32_t>(counted);
  mixer.v[13] ^= static_cast<uint32_t>(counted >> 32);
  if (last) mixer.v[14] = ~mixer.v[14];
  for (const auto& s : kSchedule) {
    for (size_t i = 0; i < 4; ++i) mixer.mix(i, i + 4, i + 8, i + 12, words[s[2 * i]], words[s[2 * i + 1]]);
    for (size_t i = 0; i < 4; ++i) {
      mixer.mix(i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12, words[s[8 + 2 * i]],
                words[s[9 + 2 * i]]);
    }
  }
  for (size_t i = 0; i < 8; ++i) state[i] ^= mixer.v[i] ^ mixer.v[i + 8];
}

}  // namespace

Digest blake2s(const uint8_t* key, size_t key_nbytes, const uint8_t* data, size_t nbytes) {
  std::array<uint32_t, 8> state = kInitial;
  state[0] ^= 0x01010000u ^ static_cast<uint32_t>(key_nbytes << 8) ^ static_cast<uint32_t>(sizeof(Digest));
  uint8_t block[kBlock] = {};
  uint64_t counted = 0;
  if (key_nbytes != 0) {  // the key is a block of its own, in front
    std::memcpy(block, key, key_nbytes);
    counted = kBlock;
    if (nbytes != 0) compress(state, block, counted, false);
  }
  for (; nbytes > kBlock; data += kBlock, nbytes -= kBlock) compress(state, data, counted += kBlock, false);
  if (nbytes != 0 || key_nbytes == 0) {
    std::memset(block, 0, kBlock);
    if (nbytes != 0) std::memcpy(block, data, nbytes);
    counted += nbytes;
  }
  compress(state, block, counted, true);
  Digest digest;
  std::memcpy(digest.data(), state.data(), sizeof(digest));
  return digest;
}

}  // namespace hybridcomm
