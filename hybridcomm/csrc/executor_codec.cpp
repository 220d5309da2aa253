// Steps 4 and 6 of 7: compress and decompress.
//
// In: a region and its residual; out: a payload in scratch. And back: payloads from scratch into a region.
#include "executor.h"

namespace hybridcomm {
namespace {

uint64_t mix(uint64_t x) {  // splitmix64's
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

// What seeded codecs draw from: another for every call, region and rank, and the same in every run.
uint64_t Executor::seed_of(const Op& op) const {
  const uint64_t call = mix(program_->tag.digest + calls_);
  return mix(mix(call + op.begin) + static_cast<uint64_t>(mesh_.rank()));
}

void Executor::start_encode(const Op& op) {
  const float* in = buffers_.residual_in == nullptr ? nullptr : buffers_.residual_in + op.residual;
  float* out = buffers_.residual_out == nullptr ? nullptr : buffers_.residual_out + op.residual;
  kernels::codec_encode(
      program_->codec, {reinterpret_cast<const float*>(tensor_at(op)), in, out, 1.0f, seed_of(op)},
      reinterpret_cast<uint8_t*>(scratch_.data() + op.offset), op.count, program_->tag.digest);
}

void Executor::start_decode(const Op& op) {
  payloads_.clear();
  for (int64_t source : op.sources) {
    payloads_.push_back(reinterpret_cast<const uint8_t*>(scratch_.data() + source));
  }
  auto* out = reinterpret_cast<float*>(tensor_at(op));
  uint32_t flags = 0;
  const float weight = 1.0f / static_cast<float>(op.divisor);
  const kernels::Status status = kernels::codec_decode(program_->codec, payloads_.data(), payloads_.size(),
                                                       out, op.count, weight, program_->tag.digest, &flags);
  if (status != kernels::Status::ok) {
    throw Error(Code::payload, "step " + std::to_string(op.step) + " of " + describe(program_->tag) +
                                   ": a payload is not what the plan says (" + kernels::status_text(status) +
                                   ")");
  }
}

}  // namespace hybridcomm
