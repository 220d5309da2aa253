// What the simulation has found: one line each, every line once.
#pragma once

#include <set>
#include <string>
#include <vector>

namespace sim {

// Kinds are what tests ask for; the text behind them is for people.
enum class Finding {
  race,            // two accesses that nothing orders, one of them a write
  bounds,          // outside of an allocation
  freed,           // after cuMemFree, or freed while still in use
  stranger,        // no device memory, or a handle that is none
  never_recorded,  // a wait for an event that no one has recorded: it waits for nothing
  deadlock,        // every host thread waits and no stream can go on
  leak,            // left over at the end
  mismatch,        // ranks of a communicator that called different things
  misuse,          // a call that NCCL's documentation forbids
};

class Reports {
 public:
  void add(Finding finding, const std::string& text);
  const std::vector<std::string>& lines() const { return lines_; }
  void clear() { seen_.clear(), lines_.clear(); }

 private:
  std::set<std::string> seen_;
  std::vector<std::string> lines_;
};

}  // namespace sim
