// Steps 4 and 6 of 7: compress and decompress; and step 3 where it is compressed.
//
// In: a region and its residual; out: a payload in scratch. And back: payloads from scratch, or from the node's
// other ranks, into a region.
#include <algorithm>

#include "executor.h"

namespace hybridcomm {
namespace {

uint64_t mix(uint64_t x) {  // splitmix64's
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

// What seeded codecs draw from: another for every call of a group (whose digest is in the tag's) and every step, in
// which one rank encodes, and the same in every run, whatever other groups do. One rank may encode a region twice.
uint64_t Executor::seed_of(const Op& op) const {
  return mix(mix(program_->tag.digest + calls_.at(program_->group)) + op.step);
}

void Executor::start_encode(const Op& op) {
  const float* in = buffers_.residual_in == nullptr ? nullptr : buffers_.residual_in + op.residual;
  float* out = buffers_.residual_out == nullptr ? nullptr : buffers_.residual_out + op.residual;
  const auto* grad = reinterpret_cast<const float*>(tensor_at(op));
  const kernels::EncodeInput input{grad, in, out, buffers_.feedback.decay, seed_of(op)};
  if (buffers_.feedback.velocity_in == nullptr || !op.momentum) {
    encode(op, input);
  } else {
    encode_velocity(op, input);
  }
}

uint32_t Executor::encode(const Op& op, const kernels::EncodeInput& input) {
  auto* payload = reinterpret_cast<uint8_t*>(scratch_.data() + op.offset);
  const uint64_t digest = program_->tag.digest;
  if (!program_->custom || op.codec != 0) {
    return kernels::codec_encode(program_->codecs[op.codec], input, payload, op.count, digest);
  }
  try {
    return program_->custom->encode(input, payload, op.count, digest);
  } catch (const Error& error) {
    compressor_failed(op, error);
  }
}

// Momentum correction (Lin et al. 2018, arXiv 1712.01887, section 3.2): velocity = momentum * velocity + gradient is
// what is fed back and sent, and factor masking zeroes it where something of it was sent. The gradient's region is
// decoded into later, so the velocity may take its place; buffers change only once it is known to be finite.
void Executor::encode_velocity(const Op& op, const kernels::EncodeInput& input) {
  const Feedback& feedback = buffers_.feedback;
  const float* before = feedback.velocity_in + op.residual;
  float* after = feedback.velocity_out + op.residual;
  auto* velocity = reinterpret_cast<float*>(tensor_at(op));
  for (size_t i = 0; i < op.count; ++i) velocity[i] = feedback.momentum * before[i] + velocity[i];
  if (feedback.masking) {
    compensated_.resize(std::max(compensated_.size(), op.count));
    for (size_t i = 0; i < op.count; ++i)
      compensated_[i] = velocity[i] + (input.decay == 1.0f ? input.e_in[i] : input.decay * input.e_in[i]);
  }
  const bool finite = (encode(op, input) & kernels::kFlagNonFinite) == 0;
  for (size_t i = 0; i < op.count; ++i) {
    const bool sent = finite && feedback.masking && input.e_out[i] != compensated_[i];
    after[i] = !finite ? before[i] : sent ? 0.0f : velocity[i];
  }
}

void Executor::compressor_failed(const Op& op, const Error& error) const {
  throw Error(error.code,
              "rank " + std::to_string(mesh_.rank()) + ", step " + std::to_string(op.step) + " of " +
                  describe(program_->tag) + ": " + error.what(),
              mesh_.rank());
}

void Executor::start_decode(const Op& op) {
  payloads_.clear();
  for (int64_t source : op.sources) {
    payloads_.push_back(reinterpret_cast<const uint8_t*>(scratch_.data() + source));
  }
  auto* out = reinterpret_cast<float*>(tensor_at(op));
  uint32_t flags = 0;
  const float weight = 1.0f / static_cast<float>(op.divisor);
  if (program_->custom) {
    try {
      return program_->custom->decode(payloads_, out, op.count, weight, program_->tag.digest);
    } catch (const Error& error) {
      compressor_failed(op, error);
    }
  }
  check_payloads(op, kernels::codec_decode(program_->codecs[op.codec], payloads_.data(), payloads_.size(),
                                           out, op.count, weight, program_->tag.digest, &flags));
}

bool Executor::start_decode_add(const Op& op) {
  if (!open_sources(Lane::reduce, op)) return false;
  const Touching touching(*this);
  payloads_.clear();
  std::byte* place = scratch_.data() + op.offset;
  for (const PeerRegion& region : regions_) {
    const std::byte* bytes = fetch(region, 0, op.nbytes, place);
    if (bytes == nullptr) lost(region.local);
    payloads_.push_back(reinterpret_cast<const uint8_t*>(bytes));
    place += op.nbytes;
  }
  auto* out = reinterpret_cast<float*>(tensor_at(op));
  uint32_t flags = 0;
  check_payloads(op, kernels::codec_decode_add(program_->codecs[op.codec], payloads_.data(), payloads_.size(),
                                               out, op.count, 1.0f, program_->tag.digest, &flags));
  if (op.divisor != 1) {
    for (uint64_t i = 0; i < op.count; ++i) out[i] /= static_cast<float>(op.divisor);
  }
  take_sources(Lane::reduce, op);
  return true;
}

void Executor::check_payloads(const Op& op, kernels::Status status) const {
  if (status == kernels::Status::ok) return;
  throw Error(Code::payload, "step " + std::to_string(op.step) + " of " + describe(program_->tag) +
                                 ": a payload is not what the plan says (" + kernels::status_text(status) +
                                 ")");
}

}  // namespace hybridcomm
