#include "peer_memory.h"

#include <sys/prctl.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <vector>

namespace hybridcomm {
namespace {

bool yama_restricts() {
  std::ifstream file("/proc/sys/kernel/yama/ptrace_scope");
  int scope = 0;
  return (file >> scope) && scope == 1;
}

template <typename Call>
bool copy_all(Call call, int64_t pid, std::byte* local, uint64_t remote, size_t nbytes) {
  for (size_t done = 0; done < nbytes;) {
    iovec here{local + done, nbytes - done};
    iovec there{reinterpret_cast<void*>(remote + done), nbytes - done};
    const ssize_t moved = call(static_cast<pid_t>(pid), &here, 1, &there, 1, 0);
    if (moved > 0) {
      done += static_cast<size_t>(moved);
    } else if (moved == 0 || errno != EINTR) {
      return false;
    }
  }
  return true;
}

constexpr size_t kMeasured = 1 << 20;  // more than a core's caches hold of source, slot and target
constexpr int kMeasurements = 8;       // the shortest counts: ranks that start together disturb each other

}  // namespace

const char* reach_name(Reach reach) {
  switch (reach) {
    case Reach::staged:
      return "staged";
    case Reach::single_copy:
      return "single_copy";
    case Reach::same_process:
      return "same_process";
  }
  return "";
}

void introduce(Segment& own, const uint64_t& nonce, bool single_copy) {
  own.identity() = {::getpid(), reinterpret_cast<uint64_t>(&nonce), nonce};
  if (single_copy && yama_restricts()) ::prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
}

Reach find_reach(Segment& peer, bool single_copy) {
  const Segment::Identity identity = peer.identity();
  if (!single_copy || identity.nonce == 0) return Reach::staged;
  uint64_t seen = 0;
  const bool read = copy_all(::process_vm_readv, identity.pid, reinterpret_cast<std::byte*>(&seen),
                             identity.nonce_address, sizeof(seen));
  // A process of another namespace may have the same number: only the nonce tells.
  if (!read || seen != identity.nonce) return Reach::staged;
  return identity.pid == ::getpid() ? Reach::same_process : Reach::single_copy;
}

bool single_copy_pays() {
  std::vector<std::byte> source(kMeasured, std::byte{1}), slot(kMeasured), target(kMeasured);
  // Called where the compiler cannot see it, else it would leave out the copy that nobody reads.
  void* (*volatile copy)(void*, const void*, size_t) = std::memcpy;
  auto once = Clock::duration::max(), twice = Clock::duration::max();
  for (int i = 0; i < kMeasurements; ++i) {
    const auto begin = Clock::now();
    if (!copy_all(::process_vm_readv, ::getpid(), target.data(), reinterpret_cast<uint64_t>(source.data()),
                  kMeasured)) {
      return false;
    }
    const auto middle = Clock::now();
    copy(slot.data(), source.data(), kMeasured);
    copy(target.data(), slot.data(), kMeasured);
    once = std::min(once, middle - begin);
    twice = std::min(twice, Clock::now() - middle);
  }
  return once < twice;
}

const std::byte* fetch(const PeerRegion& region, uint64_t offset, size_t nbytes, std::byte* scratch) {
  if (region.direct != nullptr) return region.direct + offset;
  const bool good = copy_all(::process_vm_readv, region.pid, scratch, region.address + offset, nbytes);
  return good ? scratch : nullptr;
}

bool store(const PeerRegion& region, uint64_t offset, const std::byte* data, size_t nbytes) {
  if (region.direct != nullptr) {
    std::memcpy(region.direct + offset, data, nbytes);
    return true;
  }
  return copy_all(::process_vm_writev, region.pid, const_cast<std::byte*>(data), region.address + offset,
                  nbytes);
}

}  // namespace hybridcomm
