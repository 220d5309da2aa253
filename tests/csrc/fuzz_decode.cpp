// Any bytes as a payload, for the codec that --codec=CODE names: refused with `out` untouched, or decoded alike on every
// instruction set, and never a byte read or written outside buffers of exact size.
#include "fuzz_decode.h"

#include <algorithm>
#include <iterator>
#include <map>

#include "codec_table.h"
#include "fuzz.h"

namespace hybridcomm::kernels::test {
namespace {

using hybridcomm::test::Input;
using hybridcomm::test::require;

constexpr size_t kMaxNbytes = size_t{1} << 17;
constexpr uint64_t kDigest = 0x0123456789ABCDEF;

int codec = 1;

struct Region {
  const CodecParams params;
  const size_t numel, nbytes;
  const float weight;
};

// Encoders get small blocks: the time goes to decoders.
const CodecParams& params_of(const Case& one) {
  static const std::vector<CodecParams>& all = valid_params(codec);
  static const std::vector<CodecParams> small = [] {
    std::vector<CodecParams> found;
    std::copy_if(all.begin(), all.end(), std::back_inserter(found),
                 [](const CodecParams& params) { return params.block <= 128; });
    return found.empty() ? all : found;
  }();
  const auto& table = (one.mode & kKind) == kEncode ? small : all;
  return table[one.params % table.size()];
}

Isa isa_of(const Case& one) {
  static const std::vector<Isa> all = isas();
  return all[one.seed / 4 % all.size()];
}

// Bytes of the input, again and again until `nbytes` are there.
void fill(void* to, size_t nbytes, const Input& input) {
  auto* bytes = static_cast<uint8_t*>(to);
  size_t done = std::min(nbytes, input.left());
  if (done == 0) return;
  std::memcpy(bytes, input.rest(), done);
  for (size_t more; done < nbytes; done += more) {
    more = std::min(nbytes - done, done);
    std::memcpy(bytes + done, bytes, more);
  }
}

Status decode(const Region& region, const std::vector<const uint8_t*>& payloads, bool clear, Isa isa,
              Exact<float>& out, uint32_t& flags) {
  const auto run = clear ? codec_decode : codec_decode_add;
  return run(region.params, payloads.data(), payloads.size(), out.data(), region.numel, region.weight,
             kDigest, &flags, isa);
}

void start(Exact<float>& out, size_t numel) {
  for (size_t i = 0; i < numel; ++i) out[i] = static_cast<float>(i % 13) - 6;
}

// Decodes with the portable kernels and on another instruction set; both must agree.
Status check_decoders(const Region& region, const std::vector<const uint8_t*>& payloads, Isa isa) {
  Exact<float> before(region.numel), first(region.numel), zero(region.numel);
  start(before, region.numel);
  start(first, region.numel);
  uint32_t flags = 0;
  const Status status = decode(region, payloads, false, Isa::scalar, first, flags);
  if (status != Status::ok) require(first.same_bytes(before), "a refused payload left its region untouched");
  if (status == Status::ok) {
    const Status added = decode(region, payloads, false, Isa::scalar, zero, flags);
    require(added == status, "the same payload is decoded again");
  }
  uint32_t other_flags = 0;
  Exact<float> out(region.numel), cleared(region.numel);
  start(out, region.numel);
  start(cleared, region.numel);
  require(decode(region, payloads, false, isa, out, other_flags) == status, "one status everywhere");
  require(other_flags == flags, "the same flags, or the same refused payload, everywhere");
  require(same_numbers(out, first), "the same sum everywhere");
  require(decode(region, payloads, true, isa, cleared, other_flags) == status, "one status everywhere");
  if (status == Status::ok) require(same_numbers(cleared, zero), "decode is decode_add into zeros");
  if (status != Status::ok) require(cleared.same_bytes(before), "a refused payload clears nothing");
  return status;
}

// A payload that an encoder wrote, of a gradient that is not the input; kept, since encoding is slow under sanitizers.
const uint8_t* encode_something(const Region& region, const Case& one) {
  static std::map<std::pair<const CodecParams*, size_t>, Exact<uint8_t>> made;
  if (made.size() >= 512) made.clear();
  const auto [at, is_new] = made.try_emplace({&params_of(one), region.numel}, region.nbytes);
  if (is_new) {
    Exact<float> grad(region.numel);
    for (size_t i = 0; i < region.numel; ++i) grad[i] = static_cast<float>((i * 37 + 11) % 101) - 50;
    const EncodeInput input{grad.data(), nullptr, nullptr};
    const uint32_t flags = codec_encode(region.params, input, at->second.data(), region.numel, kDigest);
    require(flags == 0, "what is finite is not flagged");
  }
  return at->second.data();
}

struct Encoded {
  Exact<uint8_t> payload;
  Exact<float> e_out;
  uint32_t flags;
};

Encoded encode(const Region& region, const Case& one, const Exact<float>& grad, const Exact<float>& e_in,
               Isa isa) {
  Encoded made{Exact<uint8_t>(region.nbytes), Exact<float>(region.numel), 0};
  if (region.numel > 0) std::memcpy(made.e_out.data(), e_in.data(), e_in.nbytes());
  EncodeInput input{grad.data(), one.mode & kInPlace ? made.e_out.data() : e_in.data(), made.e_out.data()};
  if (one.mode & kMemoryless) input.e_in = nullptr;
  input.decay = (one.spoil & 1) != 0 ? 1.0f : 0.5f;
  input.seed = one.seed;
  made.flags = codec_encode(region.params, input, made.payload.data(), region.numel, kDigest, isa);
  return made;
}

void check_encoders(const Region& region, const Case& one, const Input& data) {
  Exact<float> grad(region.numel), e_in(region.numel);
  fill(grad.data(), grad.nbytes(), data);
  for (size_t i = 0; i < region.numel; ++i) e_in[i] = grad[region.numel - 1 - i] * 0.75f;
  const Encoded first = encode(region, one, grad, e_in, Isa::scalar);
  require(first.flags == 0 || first.flags == kFlagNonFinite, "known flags");
  const Encoded other = encode(region, one, grad, e_in, isa_of(one));
  require(other.flags == first.flags, "the same flags everywhere");
  require(other.payload.same_bytes(first.payload), "the same payload everywhere");
  require(same_numbers(other.e_out, first.e_out), "the same residual everywhere");
  require(check_decoders(region, {first.payload.data()}, isa_of(one)) == Status::ok,
          "what encoders write is accepted");
}

void check_payload(const Region& region, const Case& one, const Input& data) {
  Exact<uint8_t> payload(region.nbytes);
  fill(payload.data(), region.nbytes, data);
  static const bool has_seed = seeded(valid_params(codec).front());
  if ((one.mode & kKind) != kRaw) {
    fill(payload.data() + kHeaderNbytes, region.nbytes - kHeaderNbytes, data);
    write_header(payload, region.params, region.numel, kDigest, has_seed ? one.seed : 0,
                 one.mode & kFlagged ? uint32_t{kFlagNonFinite} : 0);
    if (one.mode & kSpoilHeader) payload[one.spoil_at % kHeaderNbytes] ^= one.spoil;
    seal(payload);
    if (one.mode & kSpoilAnywhere) payload[one.spoil_at % region.nbytes] ^= one.spoil;
  }
  if ((one.mode & kAfterGoodOne) == 0) {
    check_decoders(region, {payload.data()}, isa_of(one));
    return;
  }
  check_decoders(region, {encode_something(region, one), payload.data()}, isa_of(one));
}

}  // namespace

void check_case(Input input) {
  const auto one = input.take<Case>();
  require(!valid_params(codec).empty(), "--codec=CODE names a codec that the kernels have");
  const CodecParams& params = params_of(one);
  const size_t numel = numel_of(one, params.block);
  const size_t nbytes = codec_nbytes(params, numel);
  if (nbytes < kHeaderNbytes || nbytes > kMaxNbytes) return;
  constexpr float kWeights[] = {1.0f, 0.5f, -2.0f, 1.0f / 3.0f};
  const Region region{params, numel, nbytes, kWeights[one.seed % 4]};
  if ((one.mode & kKind) == kEncode) {
    check_encoders(region, one, input);
  } else {
    check_payload(region, one, input);
  }
}

void choose_codec(int code) { codec = code; }

}  // namespace hybridcomm::kernels::test

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  for (int i = 1; i < *argc; ++i) {
    int code = 0;
    if (std::sscanf((*argv)[i], "--codec=%d", &code) == 1) hybridcomm::kernels::test::choose_codec(code);
  }
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t nbytes) {
  hybridcomm::kernels::test::check_case({data, nbytes});
  return 0;
}
