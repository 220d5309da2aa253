// Reading and writing another rank's memory without its help: one copy instead of two.
//
// Two ways: an address both processes know (ranks that are threads of one process), or process_vm_readv and
// process_vm_writev. The kernel, a container's seccomp filter or yama may forbid the latter, so it is tried once, at
// start: a peer publishes a random number and its address, and whoever can read it there may rely on it.
#pragma once

#include "segment.h"

namespace hybridcomm {

// How this rank gets at a local peer's private memory.
enum class Reach : uint8_t { staged, single_copy, same_process };
const char* reach_name(Reach reach);

// Says in the segment who this process is. Where yama lets only a parent at a process (ptrace_scope 1), allows
// it to other processes of the same user. The nonce must stay where it is as long as the segment is used.
void introduce(Segment& own, const uint64_t& nonce, bool single_copy);
Reach find_reach(Segment& peer, bool single_copy);

// Whether the kernel moves a megabyte from process to process in less time than the two copies through a slot take,
// measured on this process's own memory: about a millisecond.
bool single_copy_pays();

// A region of a local rank's memory; `direct` is set where it can be addressed here. A staging slot is not writable:
// writing there would not change the tensor.
struct PeerRegion {
  int local = -1;
  bool writable = false;
  int64_t pid = 0;
  std::byte* direct = nullptr;
  uint64_t address = 0;
};

// Ranks that are threads order their accesses to one address through words that each sees at an address of its own
// (every rank maps every segment), which a thread sanitizer cannot know: it is told.
#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
inline void hand_over(uint64_t address) { __tsan_release(reinterpret_cast<void*>(address)); }
inline void take_over(uint64_t address) { __tsan_acquire(reinterpret_cast<void*>(address)); }
#else
inline void hand_over(uint64_t) {}
inline void take_over(uint64_t) {}
#endif

// Bytes of a region, copied to `scratch` if need be; null: the peer's memory cannot be read (errno says why).
const std::byte* fetch(const PeerRegion& region, uint64_t offset, size_t nbytes, std::byte* scratch);
bool store(const PeerRegion& region, uint64_t offset, const std::byte* data, size_t nbytes);

}  // namespace hybridcomm
