// The body of reduce() and scale(), compiled once per instruction set: include it inside a namespace of its own.
//
// Phases per tile of 2048 elements: 1. widen the first source into an accumulator that stays in the
// first-level cache; 2. combine the other sources into it, in order; 3. divide, narrow and store.

#include "half_impl.h"

constexpr size_t kTile = 2048;

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

// Integers come here unsigned, so that overflow wraps; 1u * keeps 16-bit products out of signed arithmetic.
struct Sum {
  template <typename W>
  static W of(W a, W b) {
    return static_cast<W>(a + b);
  }
};
struct Product {
  template <typename W>
  static W of(W a, W b) {
    if constexpr (std::is_integral_v<W>) return static_cast<W>(1u * a * b);
    return a * b;
  }
};
// As torch.minimum and torch.maximum: a NaN among the operands is the result (the first one, in group order).
struct Min {
  template <typename W>
  static W of(W a, W b) {
    return b < a || b != b ? (a != a ? a : b) : a;
  }
};
struct Max {
  template <typename W>
  static W of(W a, W b) {
    return b > a || b != b ? (a != a ? a : b) : a;
  }
};
struct And {
  template <typename W>
  static W of(W a, W b) {
    return static_cast<W>(a & b);
  }
};
struct Or {
  template <typename W>
  static W of(W a, W b) {
    return static_cast<W>(a | b);
  }
};
struct Xor {
  template <typename W>
  static W of(W a, W b) {
    return static_cast<W>(a ^ b);
  }
};

struct Job {
  void* out;
  const void* const* sources;
  int count;
  size_t numel;
  uint32_t divisor;
  Job of_pairs() const { return {out, sources, count, 2 * numel, divisor}; }
};

template <typename T, typename Combine>
void tiles(const Job& job) {
  using Stored = typename T::Stored;
  using Wide = typename T::Wide;
  alignas(64) Wide total[kTile];
  for (size_t begin = 0; begin < job.numel; begin += kTile) {
    const size_t n = job.numel - begin < kTile ? job.numel - begin : kTile;
    const auto* first = static_cast<const Stored*>(job.sources[0]) + begin;
    for (size_t i = 0; i < n; ++i) total[i] = T::widen(first[i]);
    for (int s = 1; s < job.count; ++s) {
      const auto* source = static_cast<const Stored*>(job.sources[s]) + begin;
      for (size_t i = 0; i < n; ++i) total[i] = Combine::of(total[i], T::widen(source[i]));
    }
    if (std::is_floating_point_v<Wide> && job.divisor != 1) {
      const Wide by = static_cast<Wide>(job.divisor);
      for (size_t i = 0; i < n; ++i) total[i] /= by;
    }
    auto* to = static_cast<Stored*>(job.out) + begin;
    for (size_t i = 0; i < n; ++i) to[i] = T::narrow(total[i]);
  }
}

// The common case, a few float32 sources: the sum stays in registers.
template <int kCount>
void sum_few(const Job& job) {
  const float* sources[kCount];
  for (int s = 0; s < kCount; ++s) sources[s] = static_cast<const float*>(job.sources[s]);
  auto* out = static_cast<float*>(job.out);
  const auto divisor = static_cast<float>(job.divisor);
  const bool divide = job.divisor != 1;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep  // `out` is a source or does not overlap one
#endif
  for (size_t i = 0; i < job.numel; ++i) {
    float total = sources[0][i];
    for (int s = 1; s < kCount; ++s) total += sources[s][i];
    out[i] = divide ? total / divisor : total;
  }
}

inline void sum_floats(const Job& job) {
  switch (job.count) {
    case 2:
      return sum_few<2>(job);
    case 3:
      return sum_few<3>(job);
    case 4:
      return sum_few<4>(job);
    case 8:
      return sum_few<8>(job);
    default:
      return tiles<Plain<float>, Sum>(job);
  }
}

template <typename T>
void floats(Reduction op, const Job& job) {
  switch (op) {
    case Reduction::min:
      return tiles<T, Min>(job);
    case Reduction::max:
      return tiles<T, Max>(job);
    case Reduction::product:
      return tiles<T, Product>(job);
    default:
      return tiles<T, Sum>(job);
  }
}

template <typename Signed, typename Unsigned>
void integers(Reduction op, const Job& job) {
  switch (op) {
    case Reduction::min:
      return tiles<Plain<Signed>, Min>(job);
    case Reduction::max:
      return tiles<Plain<Signed>, Max>(job);
    case Reduction::product:
      return tiles<Plain<Unsigned>, Product>(job);
    case Reduction::band:
      return tiles<Plain<Unsigned>, And>(job);
    case Reduction::bor:
      return tiles<Plain<Unsigned>, Or>(job);
    case Reduction::bxor:
      return tiles<Plain<Unsigned>, Xor>(job);
    default:
      return tiles<Plain<Unsigned>, Sum>(job);
  }
}

// Bytes 0 and 1: a sum is "any", a product "all".
inline void booleans(Reduction op, const Job& job) {
  switch (op) {
    case Reduction::min:
    case Reduction::product:
    case Reduction::band:
      return tiles<Plain<uint8_t>, And>(job);
    case Reduction::bxor:
      return tiles<Plain<uint8_t>, Xor>(job);
    default:
      return tiles<Plain<uint8_t>, Or>(job);
  }
}

inline void reduce_here(Dtype dtype, Reduction op, const Job& job) {
  switch (dtype) {
    case Dtype::float32:
      if (is_sum(op)) return sum_floats(job);
      return floats<Plain<float>>(op, job);
    case Dtype::bfloat16:
      return floats<Bfloat16>(op, job);
    case Dtype::float16:
      return floats<Float16>(op, job);
    case Dtype::float64:
      return floats<Plain<double>>(op, job);
    case Dtype::int64:
      return integers<int64_t, uint64_t>(op, job);
    case Dtype::int32:
      return integers<int32_t, uint32_t>(op, job);
    case Dtype::int16:
      return integers<int16_t, uint16_t>(op, job);
    case Dtype::int8:
      return integers<int8_t, uint8_t>(op, job);
    case Dtype::uint8:
      return integers<uint8_t, uint8_t>(op, job);
    case Dtype::boolean:
      return booleans(op, job);
    case Dtype::complex64:
      return floats<Plain<float>>(op, job.of_pairs());
    case Dtype::complex128:
      return floats<Plain<double>>(op, job.of_pairs());
    case Dtype::float8_e4m3fn:
    case Dtype::float8_e5m2:
      return;  // bytes: moved, never combined; reduction.py refuses such a plan
  }
}

template <typename T, typename Factor>
void scale_tiles(void* data, size_t numel, Factor factor) {
  auto* values = static_cast<typename T::Stored*>(data);
  for (size_t i = 0; i < numel; ++i) values[i] = T::narrow(Product::of<Factor>(T::widen(values[i]), factor));
}

inline void scale_here(Dtype dtype, void* data, size_t numel, double factor) {
  const auto integer = static_cast<uint64_t>(static_cast<int64_t>(factor));
  switch (dtype) {
    case Dtype::float32:
      return scale_tiles<Plain<float>>(data, numel, static_cast<float>(factor));
    case Dtype::bfloat16:
      return scale_tiles<Bfloat16>(data, numel, static_cast<float>(factor));
    case Dtype::float16:
      return scale_tiles<Float16>(data, numel, static_cast<float>(factor));
    case Dtype::float64:
      return scale_tiles<Plain<double>>(data, numel, factor);
    case Dtype::int64:
      return scale_tiles<Plain<uint64_t>>(data, numel, integer);
    case Dtype::int32:
      return scale_tiles<Plain<uint32_t>>(data, numel, static_cast<uint32_t>(integer));
    case Dtype::int16:
      return scale_tiles<Plain<uint16_t>>(data, numel, static_cast<uint16_t>(integer));
    case Dtype::int8:
    case Dtype::uint8:
      return scale_tiles<Plain<uint8_t>>(data, numel, static_cast<uint8_t>(integer));
    case Dtype::complex64:
      return scale_tiles<Plain<float>>(data, 2 * numel, static_cast<float>(factor));
    case Dtype::complex128:
      return scale_tiles<Plain<double>>(data, 2 * numel, factor);
    case Dtype::boolean:
    case Dtype::float8_e4m3fn:
    case Dtype::float8_e5m2:
      return;
  }
}
