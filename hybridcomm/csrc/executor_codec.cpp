// Steps 4 and 6 of 7: compress and decompress; and step 3 where it is compressed.
//
// In: a region and its residual; out: a payload in scratch. And back: payloads from scratch, or from the node's
// other ranks, into a region.
#include "executor.h"

namespace hybridcomm {

void Executor::start_encode(const Op& op) {
  const float* in = buffers_.residual_in == nullptr ? nullptr : buffers_.residual_in + op.residual;
  float* out = buffers_.residual_out == nullptr ? nullptr : buffers_.residual_out + op.residual;
  kernels::codec_encode(
      program_->codecs[op.codec], {reinterpret_cast<const float*>(tensor_at(op)), in, out, 1.0f, 0},
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
