// Encodes and decodes with every codec at odd sizes, in heap buffers of exact size: run under sanitizers.
//
// Exit code 0: nothing read or written outside, all instruction sets agree, what encoders write is accepted, and a
// payload with one byte changed is refused with the region untouched.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "codec_table.h"

namespace hybridcomm::kernels::test {
namespace {

constexpr uint64_t kDigest = 99;
int failures = 0;

void check(bool good, const CodecParams& p, size_t numel, const char* what) {
  if (good) return;
  std::fprintf(stderr, "FAILED: codec %d block %u k %u bits %d variant %d, %zu elements: %s\n",
               static_cast<int>(p.codec), p.block, p.k, p.value_bits, p.variant, numel, what);
  ++failures;
}

struct Made {
  Exact<uint8_t> payload;
  Exact<float> e_out;
  uint32_t flags = 0;
};

Made encode(const CodecParams& params, const Exact<float>& grad, const Exact<float>& e_in, size_t numel,
            Isa isa, bool in_place) {
  Made made{Exact<uint8_t>(codec_nbytes(params, numel)), Exact<float>(numel)};
  if (numel > 0) std::memcpy(made.e_out.data(), e_in.data(), e_in.nbytes());
  EncodeInput input{grad.data(), in_place ? made.e_out.data() : e_in.data(), made.e_out.data()};
  input.decay = in_place ? 0.5f : 1.0f;
  input.seed = numel;
  made.flags = codec_encode(params, input, made.payload.data(), numel, kDigest, isa);
  return made;
}

void decode(const CodecParams& params, Made& made, size_t numel, Isa isa, std::mt19937& random) {
  const uint8_t* payloads[] = {made.payload.data(), made.payload.data()};
  Exact<float> out(numel), before(numel);
  uint32_t flags = 0;
  const auto run = [&](auto decoder) {
    return decoder(params, payloads, 2, out.data(), numel, 0.5f, kDigest, &flags, isa);
  };
  check(run(codec_decode) == Status::ok && flags == made.flags, params, numel, "what was encoded decodes");
  check(run(codec_decode_add) == Status::ok, params, numel, "and is added");
  if (numel > 0) std::memcpy(before.data(), out.data(), out.nbytes());
  uint8_t& byte = made.payload[random() % made.payload.nbytes()];
  byte ^= static_cast<uint8_t>(1 + random() % 255);
  check(run(codec_decode) != Status::ok, params, numel, "a changed byte is refused");
  check(out.same_bytes(before), params, numel, "and the region is as it was");
}

void round_trip(const CodecParams& params, size_t numel, std::mt19937& random) {
  Exact<float> grad(numel), e_in(numel);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < numel; ++i) grad[i] = normal(random), e_in[i] = normal(random);
  if (numel > 0 && random() % 8 == 0) grad[random() % numel] = INFINITY;
  for (const bool in_place : {false, true}) {
    const Made first = encode(params, grad, e_in, numel, Isa::scalar, in_place);
    for (const Isa isa : isas()) {
      Made made = encode(params, grad, e_in, numel, isa, in_place);
      check(made.flags == first.flags && made.payload.same_bytes(first.payload), params, numel,
            "one payload");
      check(same_numbers(made.e_out, first.e_out), params, numel, "one residual");
      decode(params, made, numel, isa, random);
    }
  }
}

}  // namespace
}  // namespace hybridcomm::kernels::test

int main() {
  using namespace hybridcomm::kernels;
  using namespace hybridcomm::kernels::test;
  std::mt19937 random(11);
  int codecs = 0;
  size_t trips = 0;
  for (int code = 0; code < kCodecCodes; ++code) {
    const auto& table = valid_params(code);
    codecs += !table.empty();
    const size_t stride = table.size() / 60 + 1;
    for (size_t p = random() % stride; p < table.size(); p += stride) {
      const size_t block = table[p].block;
      for (const size_t numel : {size_t{0}, size_t{1}, size_t{15}, size_t{17}, block - (block > 0), block + 1,
                                 2 * block + 3, size_t{4099}, size_t{20011}}) {
        if (codec_nbytes(table[p], numel) == 0) continue;
        round_trip(table[p], numel, random);
        ++trips;
      }
    }
  }
  std::printf("%d codecs, %zu round trips, %d failures\n", codecs, trips, failures);
  return failures == 0 && codecs > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
