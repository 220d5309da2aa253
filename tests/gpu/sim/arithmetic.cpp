#include "arithmetic.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace sim {
namespace {

using namespace hybridcomm::gpu;

float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Integers wrap.
template <class T, class Factor>
T times(T value, Factor factor) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<uint64_t>(value) * static_cast<uint64_t>(static_cast<int64_t>(factor)));
  } else {
    return value * static_cast<T>(factor);
  }
}
template <class T>
T plus(T one, T other) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<uint64_t>(one) + static_cast<uint64_t>(other));
  } else {
    return one + other;
  }
}

template <class Stored, class Wide, class Load, class Store>
void reduce_as(unsigned char* out, const std::vector<const unsigned char*>& inputs, size_t count,
               ncclRedOp_t op, const std::vector<double>& factors, Load load, Store store) {
  const auto read = [&](size_t rank, size_t i) {
    Stored stored;
    std::memcpy(&stored, inputs[rank] + i * sizeof(Stored), sizeof(Stored));
    if (op <= ncclAvg) return load(stored);
    return load(store(times<Wide>(load(stored), factors[rank])));  // a product is an element again
  };
  for (size_t i = 0; i < count; ++i) {
    Wide total = read(0, i);
    for (size_t rank = 1; rank < inputs.size(); ++rank) {
      const Wide next = read(rank, i);
      if (op == ncclMax) {
        total = std::max(total, next);
      } else if (op == ncclMin) {
        total = std::min(total, next);
      } else if (op == ncclProd) {
        total = times<Wide>(total, next);
      } else {
        total = plus<Wide>(total, next);
      }
    }
    if (op == ncclAvg) total = static_cast<Wide>(total / static_cast<Wide>(inputs.size()));
    const Stored stored = store(total);
    std::memcpy(out + i * sizeof(Stored), &stored, sizeof(Stored));
  }
}

template <class T>
void reduce_plain(unsigned char* out, const std::vector<const unsigned char*>& inputs, size_t count,
                  ncclRedOp_t op, const std::vector<double>& factors) {
  const auto same = [](T value) { return value; };
  reduce_as<T, T>(out, inputs, count, op, factors, same, same);
}

}  // namespace

size_t size_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8:
      return 1;
    case ncclFloat16:
    case ncclBfloat16:
      return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32:
      return 4;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64:
      return 8;
    default:
      return 0;
  }
}

void reduce(unsigned char* out, const std::vector<const unsigned char*>& inputs, size_t count,
            ncclDataType_t type, ncclRedOp_t op, const std::vector<double>& factors) {
  switch (type) {
    case ncclInt8:
      return reduce_plain<int8_t>(out, inputs, count, op, factors);
    case ncclUint8:
      return reduce_plain<uint8_t>(out, inputs, count, op, factors);
    case ncclInt32:
      return reduce_plain<int32_t>(out, inputs, count, op, factors);
    case ncclUint32:
      return reduce_plain<uint32_t>(out, inputs, count, op, factors);
    case ncclInt64:
      return reduce_plain<int64_t>(out, inputs, count, op, factors);
    case ncclUint64:
      return reduce_plain<uint64_t>(out, inputs, count, op, factors);
    case ncclFloat32:
      return reduce_plain<float>(out, inputs, count, op, factors);
    case ncclFloat64:
      return reduce_plain<double>(out, inputs, count, op, factors);
    case ncclFloat16:
      return reduce_as<_Float16, float>(
          out, inputs, count, op, factors, [](_Float16 value) { return static_cast<float>(value); },
          [](float value) { return static_cast<_Float16>(value); });
    case ncclBfloat16:
      return reduce_as<uint16_t, float>(out, inputs, count, op, factors, from_bf16, to_bf16);
    default:
      return;
  }
}

}  // namespace sim
