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
  forget(reinterpret_cast<uintptr_t>(store.get()), whole);
  blocks_[begin] = Block{std::move(store), begin, nbytes, device, true, kRedZone, {}};
  return begin;
}

void DeviceMemory::forget(uintptr_t begin, size_t nbytes) {
  for (auto each = blocks_.begin(); each != blocks_.end();) {
    const Block& block = each->second;
    const bool meets = block.begin < begin + nbytes && begin < block.begin + block.nbytes;
    each = meets && block.zone == 0 && !block.live ? blocks_.erase(each) : std::next(each);
  }
}

bool DeviceMemory::adopt(uintptr_t address, size_t nbytes, int device) {
  for (const auto& [begin, block] : blocks_) {
    if (block.live && begin < address + nbytes && address < begin + block.nbytes) {
      reports_.add(Finding::misuse, "sim_adopt of what is device memory already");
      return false;
    }
  }
  forget(address, nbytes);
  blocks_[address] = Block{nullptr, address, nbytes, device, true, 0, {}};
  return true;
}

// The block that an address belongs to, or in whose red zones it is.
const DeviceMemory::Block* DeviceMemory::find(uintptr_t address) const {
  const Block* beside = nullptr;
  auto after = blocks_.upper_bound(address + kRedZone);
  while (after != blocks_.begin()) {
    const Block& block = (--after)->second;
    if (address >= block.begin && address < block.begin + block.nbytes) return &block;
    const bool near =
        address + block.zone >= block.begin && address < block.begin + block.nbytes + block.zone;
    if (near) beside = &block;
    if (block.begin + block.nbytes + kRedZone < address) break;
  }
  return beside;
}

void DeviceMemory::lose(int device) {
  for (auto& [address, block] : blocks_) {
    if (block.device == device) block.history.clear();
  }
}

bool DeviceMemory::readable(uintptr_t address, size_t nbytes) const {
  const Block* block = find(address);
  return block != nullptr && block->live && address >= block->begin &&
         address + nbytes <= block->begin + block->nbytes;
}

bool DeviceMemory::end(const char* call, Block& block, const Clock& clock) {
  const std::string name = call;
  if (!block.live) {
    reports_.add(Finding::freed, name + " of one block twice");
    return false;
  }
  for (const Access& access : block.history) {
    if (!known(clock, access)) {
      reports_.add(Finding::freed, name + " is not ordered after " + access.what + kind(access.write));
    }
  }
  block.live = false;
  return true;
}

bool DeviceMemory::release(uintptr_t address, const Clock& clock) {
  const auto found = blocks_.find(address);
  if (found == blocks_.end() || found->second.zone == 0) {
    reports_.add(Finding::stranger, "cuMemFree of what cuMemAlloc has not given");
    return false;
  }
  if (!end("cuMemFree", found->second, clock)) return false;
  std::memset(reinterpret_cast<void*>(address), kPoison, found->second.nbytes);
  return true;
}

bool DeviceMemory::drop(uintptr_t address, const Clock& clock) {
  const auto found = blocks_.find(address);
  if (found == blocks_.end() || found->second.zone != 0) {
    reports_.add(Finding::stranger, "sim_drop of what was not adopted");
    return false;
  }
  return end("sim_drop", found->second, clock);
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
    reports_.add(Finding::freed,
                 what + kind(write) + (block->zone == 0 ? ": after sim_drop" : ": after cuMemFree"));
    return false;
  }
  if (device >= 0 && block->device != device) {
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
    // What is not ordered after this access will be told so; what is, is ordered after that one too.
    const bool covered =
        ordered && (write || !before.write) && before.begin >= now.begin && before.end <= now.end;
    if (!covered) kept.push_back(std::move(before));
  }
  kept.push_back(std::move(now));
  block->history.swap(kept);
  return true;
}

void DeviceMemory::finish(const std::set<int>& broken) {
  for (const auto& [address, block] : blocks_) {
    if (block.zone == 0) continue;  // whoever lent it keeps it
    if (block.live && broken.count(block.device) == 0) {
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
