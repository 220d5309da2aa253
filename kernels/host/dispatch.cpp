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

Isa isa_for(Isa wanted) {
  const Isa isa = wanted == Isa::automatic ? active_isa() : wanted;
  return isa_available(isa) ? isa : Isa::scalar;
}

const SharedKernels& shared_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return kSharedAvx512;
  if (isa == Isa::avx2) return kSharedAvx2;
#endif
  (void)isa;
  return kSharedScalar;
}

const Kernels& kernels_of(const CodecRow& row, Isa isa) { return *row.kernels[static_cast<int>(isa)]; }

// What lies between a section's last used byte and the next section.
void clear_padding(const Layout& layout, uint8_t* payload) {
  size_t end = layout.nbytes;
  for (size_t s = kMaxSections; s-- > 0;) {
    const Section& section = layout.sections[s];
    if (section.used == 0) continue;
    std::memset(payload + section.offset + section.used, 0, end - section.offset - section.used);
    end = section.offset;
  }
}

constexpr float kQuietNan = __builtin_nanf("");

// Non-temporal stores pay off once e_out would not stay in the caches until it is read again.
constexpr size_t kStreamNumel = size_t{1} << 14;

Status decode(const CodecParams& params, const uint8_t* const* payloads, size_t count, float* out,
              size_t numel, float weight, uint64_t digest, uint32_t* flags_out, Isa isa, bool clear) {
  if (!codec_valid(params)) return Status::bad_params;
  const CodecRow& row = *row_of(params.codec);
  isa = isa_for(isa);
  uint32_t flags = 0;
  for (size_t p = 0; p < count; ++p) {
    const Status status = check_payload(row, shared_of(isa), params, payloads[p], numel, digest, &flags);
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
  kernels_of(row, isa).decode(
      {params, row.layout(params, numel), payloads, count, out, numel, weight, clear});
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

uint32_t codec_encode(const CodecParams& params, const EncodeInput& input, uint8_t* payload, size_t numel,
                      uint64_t digest, Isa isa) {
  if (!codec_valid(params)) return kFlagBadParams;
  const CodecRow& row = *row_of(params.codec);
  const Layout layout = row.layout(params, numel);
  const uint64_t seed = row.seeded ? input.seed : 0;
  const float* e_in = input.e_in;
  float* e_out = input.e_out;
  const EncodeArgs args{params,      layout, input.grad, e_in,  e_out,
                        input.decay, seed,   payload,    numel, numel >= kStreamNumel};
  DefaultRounding guard;
  isa = isa_for(isa);
  // In place there is no second copy of e_in to go back to, so look before writing.
  bool good = e_in == nullptr || e_in != e_out || shared_of(isa).finite(args);
  const bool looked = !good;
  if (good) {
    clear_padding(layout, payload);
    good = kernels_of(row, isa).encode(args);
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
  write_header(params, layout, numel, digest, flags, seed, payload);
  write_checksum(shared_of(isa), payload, layout.nbytes);
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
