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
  unordered,       // operations of two communicators on one device that nothing orders
  deadlock,        // every host thread waits and no stream can go on
  leak,            // left over at the end
  mismatch,        // ranks of a communicator that called different things
  misuse,          // a call or an argument that the documentation of CUDA, of NCCL or of a kernel forbids
  kernel,          // a kernel's function failed
};

class Reports {
 public:
  void add(Finding finding, const std::string& text);
  const std::vector<std::string>& lines() const { return lines_; }
  size_t found() const { return found_; }  // however often
  void clear() { seen_.clear(), lines_.clear(), found_ = 0; }

 private:
  std::set<std::string> seen_;
  std::vector<std::string> lines_;
  size_t found_ = 0;
};

}  // namespace sim
