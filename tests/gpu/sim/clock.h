// Vector clocks: what an actor, a host thread or a stream, knows to have happened (Fidge 1988, Mattern 1989).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace sim {

class Clock {
 public:
  uint32_t at(int actor) const {
    const auto i = static_cast<size_t>(actor);
    return i < ticks_.size() ? ticks_[i] : 0;
  }
  void tick(int actor) {
    const auto i = static_cast<size_t>(actor);
    if (i >= ticks_.size()) ticks_.resize(i + 1);
    ++ticks_[i];
  }
  void join(const Clock& other) {
    if (other.ticks_.size() > ticks_.size()) ticks_.resize(other.ticks_.size());
    for (size_t i = 0; i < other.ticks_.size(); ++i) ticks_[i] = std::max(ticks_[i], other.ticks_[i]);
  }

 private:
  std::vector<uint32_t> ticks_;
};

}  // namespace sim
