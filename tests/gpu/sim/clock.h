// Vector clocks: what an actor, a host thread or a stream, knows to have happened (Fidge 1988, Mattern 1989).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
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
    for (const auto& [actor, tick] : other.others_) {
      uint32_t& own = others_[actor];
      own = std::max(own, tick);
    }
  }

  // To another process and back: actors by process and number.
  std::map<uint64_t, uint32_t> told(uint32_t process) const {
    std::map<uint64_t, uint32_t> all = others_;
    for (size_t i = 0; i < ticks_.size(); ++i) {
      if (ticks_[i] != 0) all[static_cast<uint64_t>(process) << 32 | i] = ticks_[i];
    }
    return all;
  }
  static Clock heard(const std::map<uint64_t, uint32_t>& all, uint32_t process) {
    Clock made;
    for (const auto& [actor, tick] : all) {
      if (actor >> 32 != process) {
        made.others_[actor] = tick;
        continue;
      }
      const auto i = static_cast<size_t>(actor & 0xFFFFFFFF);
      if (i >= made.ticks_.size()) made.ticks_.resize(i + 1);
      made.ticks_[i] = tick;
    }
    return made;
  }

 private:
  std::vector<uint32_t> ticks_;
  std::map<uint64_t, uint32_t> others_;  // of other processes
};

}  // namespace sim
