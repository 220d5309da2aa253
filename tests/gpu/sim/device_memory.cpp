#include "device_memory.h"

#include <cstring>

namespace sim {
namespace {

constexpr unsigned char kZone = 0xA7;

bool known(const Clock& clock, const Access& access) { return clock.at(access.actor) >= access.tick; }

const char* kind(bool write) { return write ? " (writes)" : " (reads)"; }

}  // namespace

uintptr_t DeviceMemory::allocate(size_t nbytes, int device) {
  constexpr size_t kAlign = 256;
  const size_t whole = nbytes + 2 * kRedZone + kAlign;
  auto store = std::make_unique<unsigned char[]>(whole);
  std::memset(store.get(), kZone, whole);
  const uintptr_t first = reinterpret_cast<uintptr_t>(store.get()) + kRedZone;
  const uintptr_t begin = (first + kAlign - 1) / kAlign * kAlign;
  std::memset(reinterpret_cast<void*>(begin), kPoison, nbytes);
  blocks_[begin] = Block{std::move(store), begin, nbytes, device, true, {}};
  return begin;
}

// The block that an address belongs to, its red zones included.
const DeviceMemory::Block* DeviceMemory::find(uintptr_t address) const {
  auto after = blocks_.upper_bound(address + kRedZone);
  while (after != blocks_.begin()) {
    const Block& block = (--after)->second;
    if (address < block.begin + block.nbytes + kRedZone && address + kRedZone >= block.begin) return &block;
    if (block.begin + block.nbytes + kRedZone < address) break;
  }
  return nullptr;
}

bool DeviceMemory::release(uintptr_t address, const Clock& clock) {
  const auto found = blocks_.find(address);
  if (found == blocks_.end()) {
    reports_.add(Finding::stranger, "cuMemFree of what cuMemAlloc has not given");
    return false;
  }
  Block& block = found->second;
  if (!block.live) {
    reports_.add(Finding::freed, "cuMemFree of one block twice");
    return false;
  }
  for (const Access& access : block.history) {
    if (!known(clock, access)) {
      reports_.add(Finding::freed, "cuMemFree is not ordered after " + access.what + kind(access.write));
    }
  }
  block.live = false;
  std::memset(reinterpret_cast<void*>(block.begin), kPoison, block.nbytes);
  return true;
}

bool DeviceMemory::access(uintptr_t begin, size_t nbytes, bool write, int actor, const Clock& clock,
                          int device, const std::string& what) {
  if (nbytes == 0) return true;
  Block* block = const_cast<Block*>(find(begin));
  if (block == nullptr) {
    reports_.add(Finding::stranger, what + kind(write) + ": no device memory");
    return false;
  }
  if (begin < block->begin || begin + nbytes > block->begin + block->nbytes) {
    reports_.add(Finding::bounds, what + kind(write) + ": outside of its allocation");
    return false;
  }
  if (!block->live) {
    reports_.add(Finding::freed, what + kind(write) + ": after cuMemFree");
    return false;
  }
  if (block->device != device) {
    reports_.add(Finding::stranger, what + kind(write) + ": memory of another device");
  }
  Access now{begin, begin + nbytes, write, actor, clock.at(actor), what};
  std::vector<Access> kept;
  for (Access& before : block->history) {
    const bool ordered = before.actor == actor || known(clock, before);
    const bool meets = before.begin < now.end && now.begin < before.end;
    if (!ordered && meets && (before.write || write)) {
      reports_.add(Finding::race,
                   what + kind(write) + " is not ordered after " + before.what + kind(before.write));
    }
    const bool covered = ordered && write && before.begin >= now.begin && before.end <= now.end;
    if (!covered) kept.push_back(std::move(before));
  }
  kept.push_back(std::move(now));
  block->history.swap(kept);
  return true;
}

void DeviceMemory::finish() {
  for (const auto& [address, block] : blocks_) {
    if (block.live) {
      reports_.add(Finding::leak, "device memory of " + std::to_string(block.nbytes) + " bytes");
    }
    const unsigned char* begin = reinterpret_cast<const unsigned char*>(block.begin);
    for (size_t i = 0; i < kRedZone; ++i) {
      if (begin[block.nbytes + i] != kZone || *(begin - 1 - i) != kZone) {
        reports_.add(Finding::bounds, "somebody wrote beside an allocation");
        break;
      }
    }
  }
}

}  // namespace sim
