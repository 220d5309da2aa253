// The body of sum(), compiled once per instruction set: include it inside a namespace of its own.
//
// Phases per tile of 2048 elements: 1. widen the first source into an accumulator that stays in the
// first-level cache; 2. add the other sources in order; 3. divide, narrow and store.

constexpr size_t kTile = 2048;

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

struct Bfloat16 {
  using Stored = uint16_t;
  using Wide = float;
  static float widen(uint16_t v) { return widen_bf16(v); }
  static uint16_t narrow(float v) { return narrow_bf16(v); }
};
struct Float16 {
  using Stored = uint16_t;
  using Wide = float;
  static float widen(uint16_t v) { return widen_fp16(v); }
  static uint16_t narrow(float v) { return narrow_fp16(v); }
};
template <typename T>
struct Plain {
  using Stored = T;
  using Wide = T;
  static T widen(T v) { return v; }
  static T narrow(T v) { return v; }
};

template <typename T>
void sum_tiles(void* out, const void* const* sources, int count, size_t numel, uint32_t divisor) {
  using Stored = typename T::Stored;
  using Wide = typename T::Wide;
  alignas(64) Wide total[kTile];
  for (size_t begin = 0; begin < numel; begin += kTile) {
    const size_t n = numel - begin < kTile ? numel - begin : kTile;
    const auto* first = static_cast<const Stored*>(sources[0]) + begin;
    for (size_t i = 0; i < n; ++i) total[i] = T::widen(first[i]);
    for (int s = 1; s < count; ++s) {
      const auto* source = static_cast<const Stored*>(sources[s]) + begin;
      for (size_t i = 0; i < n; ++i) total[i] += T::widen(source[i]);
    }
    if (divisor != 1) {
      const Wide by = static_cast<Wide>(divisor);
      for (size_t i = 0; i < n; ++i) total[i] /= by;
    }
    auto* to = static_cast<Stored*>(out) + begin;
    for (size_t i = 0; i < n; ++i) to[i] = T::narrow(total[i]);
  }
}

// The common case, two float32 sources: no accumulator tile.
inline void sum_two(float* out, const float* a, const float* b, size_t numel, float divisor) {
  if (divisor == 1.0f) {
    for (size_t i = 0; i < numel; ++i) out[i] = a[i] + b[i];
  } else {
    for (size_t i = 0; i < numel; ++i) out[i] = (a[i] + b[i]) / divisor;
  }
}

inline void sum_here(Dtype dtype, void* out, const void* const* sources, int count, size_t numel,
                     uint32_t divisor) {
  switch (dtype) {
    case Dtype::float32:
      if (count == 2) {
        return sum_two(static_cast<float*>(out), static_cast<const float*>(sources[0]),
                       static_cast<const float*>(sources[1]), numel, static_cast<float>(divisor));
      }
      return sum_tiles<Plain<float>>(out, sources, count, numel, divisor);
    case Dtype::bfloat16:
      return sum_tiles<Bfloat16>(out, sources, count, numel, divisor);
    case Dtype::float16:
      return sum_tiles<Float16>(out, sources, count, numel, divisor);
    case Dtype::int64:
      return sum_tiles<Plain<uint64_t>>(out, sources, count, numel, 1);  // unsigned: overflow wraps
    case Dtype::int32:
      return sum_tiles<Plain<uint32_t>>(out, sources, count, numel, 1);
    case Dtype::float64:
      return sum_tiles<Plain<double>>(out, sources, count, numel, divisor);
    case Dtype::uint8:
      return;  // bytes are moved, never summed; lower.py refuses such a plan
  }
}
