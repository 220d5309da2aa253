#include "gpu_program.h"

#include <algorithm>
#include <map>

#include "common.h"

namespace hybridcomm::gpu {
namespace {

std::vector<size_t> ends_of(const std::vector<DeviceOp>& ops) {
  std::map<int, size_t> last;
  for (size_t i = 0; i < ops.size(); ++i) last[ops[i].stream] = i;
  std::vector<size_t> ends;
  for (const auto& [stream, op] : last) ends.push_back(op);
  std::sort(ends.begin(), ends.end());
  return ends;
}

std::vector<bool> awaited_of(const std::vector<DeviceOp>& ops, const std::vector<size_t>& ends) {
  std::vector<bool> awaited(ops.size(), false);
  for (const DeviceOp& op : ops) {
    for (const int before : op.after) {
      if (before >= 0 && static_cast<size_t>(before) < ops.size())
        awaited[static_cast<size_t>(before)] = true;
    }
  }
  for (const size_t end : ends) awaited[end] = true;
  return awaited;
}

[[noreturn]] void refuse(const std::string& name, size_t op, const std::string& what) {
  throw Error(Code::invalid, name + ": operation " + std::to_string(op) + " " + what);
}

}  // namespace

DeviceProgram::DeviceProgram(uint64_t digest, std::string name, std::vector<DeviceOp> operations, size_t tail,
                             std::vector<DeviceRange> memory)
    : digest(digest),
      name(std::move(name)),
      ops(std::move(operations)),
      tail(tail),
      ends(ends_of(ops)),
      awaited(awaited_of(ops, ends)),
      memory(std::move(memory)) {
  if (tail > ops.size()) refuse(this->name, tail, "cannot begin the tail: there is none");
  for (size_t i = 0; i < ops.size(); ++i) {
    const size_t first = ops[i].group == kNoGroup ? i : [this, i] {
      size_t at = i;
      while (at > 0 && ops[at - 1].group == ops[i].group) --at;
      return at;
    }();
    for (const int before : ops[i].after) {
      if (before != kStart && (before < 0 || static_cast<size_t>(before) >= first)) {
        refuse(this->name, i, "waits for " + std::to_string(before) + ", which is not before it");
      }
    }
    if (ops[i].group != kNoGroup && !is_nccl(ops[i].kind))
      refuse(this->name, i, "is in a group, but not NCCL's");
    if (first != i && ops[first].stream != ops[i].stream)
      refuse(this->name, i, "is on another stream than its group");
    if (first < tail && i >= tail) refuse(this->name, i, "is behind the head that its group begins in");
  }
}

bool DeviceProgram::meets(const DeviceProgram& other) const {
  for (const DeviceRange& one : memory) {
    for (const DeviceRange& its : other.memory) {
      if (one.overlaps(its)) return true;
    }
  }
  return false;
}

size_t DeviceProgram::end_of_group(size_t first) const {
  size_t end = first + 1;
  if (ops[first].group == kNoGroup) return end;
  while (end < ops.size() && ops[end].group == ops[first].group) ++end;
  return end;
}

}  // namespace hybridcomm::gpu
