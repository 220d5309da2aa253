// Hand-made programs for the engine's test: what lower.py makes of a dense all-reduce, without Python.
#pragma once

#include <memory>

#include "engine.h"

namespace hybridcomm::test {

struct Layout {
  int nodes = 1, per_node = 1;
  int world() const { return nodes * per_node; }
};

// A dense float32 all-reduce: a shard per local rank, `chunks` chunks of `count` elements per shard. One or
// two nodes. All ranks must give the same `digest`.
class DenseAllreduce {
 public:
  DenseAllreduce(const Layout& layout, int rank, int chunks, uint64_t count, uint64_t digest)
      : layout_(layout), rank_(rank), count_(count), program_(std::make_shared<Program>()) {
    program_->tag.digest = digest;
    program_->tag.numel = static_cast<uint64_t>(chunks * layout.per_node) * count;
    program_->stream_count = kStreams + 2 * static_cast<uint32_t>(layout.per_node);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      for (int shard = 0; shard < layout.per_node; ++shard) add_chunk(chunk, shard);
    }
  }
  std::shared_ptr<const Program> program() const { return program_; }
  size_t numel() const { return program_->tag.numel; }

 private:
  enum Stream : uint32_t { kReduce, kSend, kReceive, kSum, kPublish, kStreams };
  int local() const { return rank_ % layout_.per_node; }
  int node() const { return rank_ / layout_.per_node; }
  uint32_t lane(uint32_t kind, int shard) const {
    return kStreams + kind * static_cast<uint32_t>(layout_.per_node) + static_cast<uint32_t>(shard);
  }

  void add_chunk(int chunk, int shard) {
    begin_ = static_cast<uint64_t>(chunk * layout_.per_node + shard) * count_;
    const bool owner = local() == shard;
    std::vector<uint32_t> done;
    if (layout_.per_node > 1 && owner) {
      Op op = region(Kind::reduce, kReduce, begin_, count_);
      for (int i = 0; i < layout_.per_node; ++i) op.sources.push_back(i);
      op.deliver = layout_.nodes == 1;
      done = {add(op)};
    } else if (layout_.per_node > 1) {
      Op op = region(Kind::put, lane(0, shard), begin_, count_);
      op.peer = shard;
      done = {add(op)};
    }
    ++step_;
    if (layout_.nodes == 2 && owner) done = exchange(done);
    step_ += 4;
    if (layout_.per_node > 1) {
      Op op = region(owner ? Kind::publish : Kind::get, owner ? uint32_t{kPublish} : lane(1, shard), begin_,
                     count_);
      if (owner) {
        for (int i = 0; i < layout_.per_node; ++i) {
          if (i != shard) op.sources.push_back(i);
        }
        op.deliver = layout_.nodes == 1;
      } else {
        op.peer = shard;
      }
      op.after = done;
      add(op);
    }
    ++step_;
  }

  // Halves of the chunk: node j sums half j and sends it back.
  std::vector<uint32_t> exchange(const std::vector<uint32_t>& ready) {
    const int peer = (1 - node()) * layout_.per_node + local();
    const uint64_t half = count_ / 2;
    const uint64_t mine = begin_ + static_cast<uint64_t>(node()) * half;
    const uint64_t theirs = begin_ + static_cast<uint64_t>(1 - node()) * half;
    const auto step = static_cast<uint32_t>(node());
    const uint32_t sent = add(message(Kind::send, peer, theirs, half, step_ + 1 - step, ready));
    Op receive = message(Kind::receive, peer, 0, half, step_ + step, {});
    receive.memory = Memory::scratch;
    receive.offset = program_->scratch_nbytes;
    program_->scratch_nbytes += half * sizeof(float);
    Op sum = region(Kind::sum, kSum, mine, half);
    sum.after = ready;
    sum.after.push_back(add(receive));
    sum.sources = {kOwnRegion, static_cast<int64_t>(receive.offset)};
    const uint32_t summed = add(sum);
    add(message(Kind::send, peer, mine, half, step_ + 2 + step, {summed}));
    const uint32_t got = add(message(Kind::receive, peer, theirs, half, step_ + 3 - step, {sent}));
    return {summed, got};
  }

  Op region(Kind kind, uint32_t stream, uint64_t begin, uint64_t count) const {
    Op op;
    op.kind = kind;
    op.stream = stream;
    op.step = step_;
    op.begin = begin;
    op.count = count;
    return op;
  }

  static Op message(Kind kind, int peer, uint64_t begin, uint64_t count, uint32_t step,
                    std::vector<uint32_t> after) {
    Op op;
    op.kind = kind;
    op.stream = kind == Kind::send ? kSend : kReceive;
    op.step = step;
    op.peer = peer;
    op.offset = begin * sizeof(float);
    op.nbytes = count * sizeof(float);
    op.after = std::move(after);
    return op;
  }

  uint32_t add(const Op& op) {
    program_->ops.push_back(op);
    return static_cast<uint32_t>(program_->ops.size() - 1);
  }

  Layout layout_;
  int rank_;
  uint64_t count_, begin_ = 0;
  uint32_t step_ = 0;
  std::shared_ptr<Program> program_;
};

}  // namespace hybridcomm::test
