// Device memory that is the host's: poisoned, between red zones, kept in quarantine when freed; every access checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "clock.h"
#include "reports.h"

namespace sim {

constexpr unsigned char kPoison = 0xFF;  // NaN as floats of any width
constexpr size_t kRedZone = 256;

struct Access {
  uintptr_t begin, end;
  bool write;
  int actor;
  uint32_t tick;  // of the actor's own clock
  std::string what;
};

class DeviceMemory {
 public:
  explicit DeviceMemory(Reports& reports) : reports_(reports) {}

  uintptr_t allocate(size_t nbytes, int device);
  // `clock` is the freeing thread's: accesses that it does not know of may still come.
  bool release(uintptr_t address, const Clock& clock);
  // Memory of the host that counts as a device's from now on, until it is dropped; false: it does already. It keeps its
  // values, and nothing stands around it.
  bool adopt(uintptr_t address, size_t nbytes, int device);
  bool drop(uintptr_t address, const Clock& clock);
  // Nothing is under way on a device any more, as its context is lost.
  void lose(int device);
  // Whether all of it is in memory that is there.
  bool readable(uintptr_t address, size_t nbytes) const;
  // An access by `actor`, whose clock this is, on a device (-1: on any); whether the bytes may be touched at all.
  bool access(uintptr_t begin, size_t nbytes, bool write, int actor, const Clock& clock, int device,
              const std::string& what);
  // Reports what is still allocated, and red zones that somebody has written to.
  // Not of devices that are broken, whose memory nobody can give back.
  void finish(const std::set<int>& broken);
  void clear() { blocks_.clear(); }

 private:
  struct Block {
    std::unique_ptr<unsigned char[]> store;
    uintptr_t begin;
    size_t nbytes;
    int device;
    bool live;
    size_t zone;                  // around it; none where it was adopted
    std::vector<Access> history;  // those that a later access could still be in conflict with
  };
  const Block* find(uintptr_t address) const;
  bool end(const char* call, Block& block, const Clock& clock);
  // Adopted blocks that were dropped are forgotten where there is something new.
  void forget(uintptr_t begin, size_t nbytes);

  Reports& reports_;
  std::map<uintptr_t, Block> blocks_;  // by address
};

}  // namespace sim
