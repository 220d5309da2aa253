// Chooses the kernels once, by what the processor has, and holds what all of them share: checks, flags,
// checksum.
#include <atomic>
#include <cstring>

#include "kernels.h"
#include "payload.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hybridcomm::kernels {
namespace {

// The caller's thread may flush denormals or round otherwise (torch.set_flush_denormal); payloads may not
// depend on it.
class DefaultRounding {
 public:
#if defined(__x86_64__)
  DefaultRounding() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultRounding() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  DefaultRounding() {}
  ~DefaultRounding() {}
#endif
 public:
  DefaultRounding(const DefaultRounding&) = delete;
  DefaultRounding& operator=(const DefaultRounding&) = delete;
};

Isa best_isa() {
  if (isa_available(Isa::avx512)) return Isa::avx512;
  return isa_available(Isa::avx2) ? Isa::avx2 : Isa::scalar;
}

std::atomic<int>& chosen() {
  static std::atomic<int> isa{static_cast<int>(best_isa())};
  return isa;
}

const Kernels& kernels_of(Isa isa) {
  if (isa == Isa::automatic) isa = active_isa();
#if defined(__x86_64__)
  if (isa == Isa::avx512 && isa_available(isa)) return kAvx512Kernels;
  if (isa == Isa::avx2 && isa_available(isa)) return kAvx2Kernels;
#endif
  return kScalarKernels;
}

constexpr float kQuietNan = __builtin_nanf("");

// Non-temporal stores pay off once e_out would not stay in the caches until it is read again.
constexpr size_t kStreamNumel = size_t{1} << 14;

Status decode(const CodecParams& params, const uint8_t* const* payloads, size_t count, float* out,
              size_t numel, float weight, uint64_t digest, uint32_t* flags_out, Isa isa, bool clear) {
  if (!codec_valid(params)) return Status::bad_params;
  uint32_t flags = 0;
  for (size_t p = 0; p < count; ++p) {
    const Status status = check_payload(params, payloads[p], numel, digest, &flags);
    if (status != Status::ok) {
      if (flags_out != nullptr) *flags_out = static_cast<uint32_t>(p);
      return status;
    }
  }
  if (flags_out != nullptr) *flags_out = flags;
  if (flags & kFlagNonFinite) {
    for (size_t i = 0; i < numel; ++i) out[i] = kQuietNan;
    return Status::ok;
  }
  DefaultRounding guard;
  kernels_of(isa).decode({params, payloads, count, out, numel, weight, clear});
  return Status::ok;
}

}  // namespace

bool isa_available(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
  if (isa == Isa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == Isa::scalar;
}

bool set_isa(Isa isa) {
  if (isa == Isa::automatic) isa = best_isa();
  if (!isa_available(isa)) return false;
  chosen().store(static_cast<int>(isa));
  return true;
}

Isa active_isa() { return static_cast<Isa>(chosen().load()); }

bool codec_whole_region(const CodecParams& params) { return params.codec == Codec::gtopk; }

uint32_t codec_encode(const CodecParams& params, const EncodeInput& input, uint8_t* payload, size_t numel,
                      uint64_t digest, Isa isa) {
  if (!codec_valid(params)) return kFlagBadParams;
  const Layout layout = layout_of(params, numel);
  const Kernels& kernels = kernels_of(isa);
  const float* e_in = input.e_in;
  float* e_out = input.e_out;
  const EncodeArgs args{params,
                        input.grad,
                        e_in,
                        e_out,
                        input.decay,
                        payload + sizeof(Header),
                        payload + layout.records_offset,
                        numel,
                        numel >= kStreamNumel};
  DefaultRounding guard;
  // In place there is no second copy of e_in to go back to, so look before writing.
  bool good = e_in == nullptr || e_in != e_out || kernels.finite(args);
  const bool looked = !good;
  if (good) {
    const size_t scales_end = sizeof(Header) + layout.nblocks;
    const size_t records_end = layout.records_offset + 2 * size_t{params.k} * layout.nblocks;
    std::memset(payload + scales_end, 0, layout.records_offset - scales_end);
    std::memset(payload + records_end, 0, layout.nbytes - records_end);
    good = kernels.encode(args);
  }
  if (!good) {
    std::memset(payload + sizeof(Header), 0, layout.nbytes - sizeof(Header));
    if (e_out != nullptr && !looked) {
      if (e_in == nullptr) {
        std::memset(e_out, 0, numel * sizeof(float));
      } else {
        std::memcpy(e_out, e_in, numel * sizeof(float));
      }
    }
  }
  const uint32_t flags = good ? 0u : uint32_t{kFlagNonFinite};
  write_header(params, numel, digest, flags, payload);
  write_checksum(payload, layout.nbytes);
  return flags;
}

Status codec_decode_add(const CodecParams& params, const uint8_t* const* payloads, size_t count, float* out,
                        size_t numel, float weight, uint64_t digest, uint32_t* flags_out, Isa isa) {
  return decode(params, payloads, count, out, numel, weight, digest, flags_out, isa, false);
}

Status codec_decode(const CodecParams& params, const uint8_t* const* payloads, size_t count, float* out,
                    size_t numel, float weight, uint64_t digest, uint32_t* flags_out, Isa isa) {
  return decode(params, payloads, count, out, numel, weight, digest, flags_out, isa, true);
}

}  // namespace hybridcomm::kernels
