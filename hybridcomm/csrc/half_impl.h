// bfloat16 and float16 to float32 and back, to nearest even: include it inside a namespace per instruction set.

inline float widen_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

inline uint16_t narrow_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return static_cast<uint16_t>(nan ? ((bits >> 16) | 0x40u) : rounded);
}

#ifdef __F16C__
inline float widen_fp16(uint16_t bits) { return _cvtsh_ss(bits); }
inline uint16_t narrow_fp16(float value) { return _cvtss_sh(value, 0); }
#else
inline float widen_fp16(uint16_t bits) {
  // Exponent and mantissa shifted into place are the value times 2^-112; NaN and infinity are put right
  // after.
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFFu) << 13;
  float scaled;
  std::memcpy(&scaled, &magnitude, sizeof(scaled));
  scaled *= 5.192296858534828e33f;  // 2^112
  std::memcpy(&magnitude, &scaled, sizeof(magnitude));
  if ((bits & 0x7C00u) == 0x7C00u) {
    magnitude = 0x7F800000u | static_cast<uint32_t>(bits & 0x3FFu) << 13;
    if ((bits & 0x3FFu) != 0) magnitude |= 0x400000u;  // quieten, as F16C does
  }
  const uint32_t wide = sign | magnitude;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}
inline uint16_t narrow_fp16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 2^-1 * 2^-1 aligns the last bit, rounding in hardware
    const uint32_t half = 126u << 23;
    float magic, moved;
    std::memcpy(&magic, &half, sizeof(magic));
    std::memcpy(&moved, &magnitude, sizeof(moved));
    moved += magic;
    uint32_t low;
    std::memcpy(&low, &moved, sizeof(low));
    return static_cast<uint16_t>(sign | (low - half));
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}
#endif
