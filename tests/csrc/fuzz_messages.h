// What must come of point-to-point messages: the model of the target in fuzz_messages.cpp.
#pragma once

#include <algorithm>

#include "messages.h"

namespace hybridcomm::test {

constexpr uint64_t kOverhead = 64;  // of a message in a window

// A send or receive of the rank under test.
struct Half {
  Tag tag;
  std::unique_ptr<uint8_t[]> data;
  uint32_t nbytes = 0;
  std::vector<uint8_t> want;  // of a receive: what has come so far
  uint64_t moved = 0;         // of a send: bytes that were seen to go
  bool eager = false, wanted = false, due = false;
  int done = 0;
};
using HalfPtr = std::shared_ptr<Half>;

inline bool same_match(const Tag& a, const Tag& b) { return a.digest == b.digest && a.tensor == b.tensor; }
inline bool same_size(const Tag& a, const Tag& b) { return a.numel == b.numel && a.dtype == b.dtype; }

// What the rank must make of its calls and of every frame; each returns whether that is allowed.
class Model {
 public:
  struct Answer {
    FrameKind kind;
    uint64_t id;
  };
  std::vector<HalfPtr> sends;  // by id
  std::vector<Answer> answers;

  void send(const HalfPtr& half) {
    const uint64_t charge = half->nbytes + kOverhead;
    half->eager = half->due = half->nbytes <= kEagerNbytes && window_ + charge <= kEagerWindow;
    if (half->eager) {
      window_ += charge;
      eager_[sends.size()] = charge;
    } else {
      announced_[sends.size()] = half;
    }
    sends.push_back(half);
  }

  bool receive(const HalfPtr& half) {
    const auto at = std::find_if(unexpected_.begin(), unexpected_.end(),
                                 [&](const Arrived& a) { return same_match(a.frame.tag, half->tag); });
    if (at == unexpected_.end()) {
      posted_.push_back(half);
      return true;
    }
    const Arrived arrived = *at;
    unexpected_.erase(at);
    return match(half, arrived.frame, arrived.data);
  }

  // Of a frame whose header is there, before its data.
  bool announces_well(const MessageFrame& frame, bool dialled) const {
    const uint32_t nbytes = frame.tag.nbytes;
    const bool is_reply = frame.kind == FrameKind::go || frame.kind == FrameKind::taken;
    if (frame.magic != MessageFrame{}.magic || is_reply != dialled) return false;
    if (nbytes == 0) return true;
    if (frame.kind == FrameKind::eager) return nbytes <= kEagerNbytes;
    return frame.kind == FrameKind::data && nbytes <= kPieceNbytes && has_room(frame);
  }

  bool take(const MessageFrame& frame, const std::vector<uint8_t>& data) {
    switch (frame.kind) {
      case FrameKind::eager:
      case FrameKind::announce: {
        const auto at = std::find_if(posted_.begin(), posted_.end(),
                                     [&](const HalfPtr& half) { return same_match(half->tag, frame.tag); });
        if (at == posted_.end()) {
          unexpected_.push_back({frame, data});
          return true;
        }
        const HalfPtr half = *at;
        posted_.erase(at);
        return match(half, frame, data);
      }
      case FrameKind::go: {
        const auto at = announced_.find(frame.id);
        if (at == announced_.end() || at->second->wanted) return false;
        at->second->wanted = at->second->due = true;
        announced_.erase(at);
        return true;
      }
      case FrameKind::data: {
        if (!has_room(frame)) return false;
        const HalfPtr half = granted_.at(frame.id);
        half->want.insert(half->want.end(), data.begin(), data.end());
        if (half->want.size() == half->nbytes) {
          half->due = true;
          granted_.erase(frame.id);
        }
        return true;
      }
      case FrameKind::taken: {
        const auto eager = eager_.find(frame.id);
        if (eager != eager_.end()) {
          window_ -= eager->second;
          eager_.erase(eager);
          return true;
        }
        const auto at = announced_.find(frame.id);
        if (at == announced_.end()) return false;
        at->second->due = true;
        announced_.erase(at);
        return true;
      }
      default:
        return false;
    }
  }

  bool waits() const { return !posted_.empty() || !granted_.empty() || !announced_.empty(); }

 private:
  struct Arrived {
    MessageFrame frame;
    std::vector<uint8_t> data;
  };

  bool has_room(const MessageFrame& frame) const {
    const auto at = granted_.find(frame.id);
    return at != granted_.end() && at->second->want.size() + frame.tag.nbytes <= at->second->nbytes;
  }
  bool match(const HalfPtr& half, const MessageFrame& frame, const std::vector<uint8_t>& data) {
    if (!same_size(half->tag, frame.tag)) return false;
    if (frame.kind == FrameKind::announce) {
      answers.push_back({FrameKind::go, frame.id});
      return granted_.emplace(frame.id, half).second;
    }
    if (data.size() != half->nbytes) return false;
    half->want = data;
    half->due = true;
    answers.push_back({FrameKind::taken, frame.id});
    return true;
  }

  uint64_t window_ = 0;
  std::map<uint64_t, uint64_t> eager_;
  std::map<uint64_t, HalfPtr> announced_, granted_;
  std::vector<HalfPtr> posted_;
  std::vector<Arrived> unexpected_;
};

// One of the two connections, seen from the peer: what was put in and is no whole frame yet, and what came out.
struct Wire {
  bool dialled = false;  // by this rank: replies come in
  Fd end;
  std::vector<uint8_t> stream, read;
  bool good = true;  // no header in it is an error so far

  // The next frame that is wholly there, if any.
  bool next(const Model& model, MessageFrame& frame, std::vector<uint8_t>& data) {
    if (stream.size() < sizeof frame) return false;
    std::memcpy(static_cast<void*>(&frame), stream.data(), sizeof frame);
    good = model.announces_well(frame, dialled);
    if (!good || stream.size() < sizeof frame + frame.tag.nbytes) return false;
    const auto begin = stream.begin() + static_cast<ptrdiff_t>(sizeof frame);
    data.assign(begin, begin + frame.tag.nbytes);
    stream.erase(stream.begin(), begin + frame.tag.nbytes);
    return true;
  }
};

}  // namespace hybridcomm::test
