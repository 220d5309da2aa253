#include "arena.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <fstream>
#include <iterator>

#include "segment.h"

namespace hybridcomm {
namespace {

constexpr size_t kPage = 4096;

// The kernel's own estimate. Allocating more than that would not fail but call the out-of-memory killer.
uint64_t available_nbytes() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  uint64_t kib = 0;
  while (file >> key >> kib) {
    if (key == "MemAvailable:") return kib << 10;
    std::getline(file, unit);
  }
  return UINT64_MAX;
}

}  // namespace

uint64_t Arena::place(size_t nbytes) {
  for (auto at = free_.begin(); at != free_.end(); ++at) {
    const auto [offset, room] = *at;
    if (room < nbytes) continue;
    free_.erase(at);
    if (room > nbytes) free_.emplace(offset + nbytes, room - nbytes);
    return offset;
  }
  return end_;
}

std::unique_ptr<Arena::Block> Arena::allocate(size_t nbytes) {
  const size_t pages = (nbytes + kPage - 1) / kPage;
  const size_t whole = (pages == 0 ? 1 : pages) * kPage;
  if (nbytes > available_nbytes()) {
    throw Error(
        Code::shared_memory,
        "no room for a tensor of " + std::to_string(nbytes >> 20) +
            " MiB in shared memory: this machine has less available; free some, or use private memory");
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t offset = place(whole);
  try {
    allocate_shared(fd_.get(), offset, whole, "raise the memory or file-size limit, or use private memory");
    Mapping mapping = map_shared(fd_.get(), offset, whole);
    ::madvise(mapping.data(), whole, MADV_HUGEPAGE);  // taken up where the kernel allows it for shared memory
    auto block = std::make_unique<Block>(shared_from_this(), offset, std::move(mapping));
    by_data_.emplace(block->data(), block.get());
    if (offset == end_) end_ += whole;
    return block;
  } catch (...) {
    ::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                static_cast<off_t>(whole));
    if (offset != end_) free_.emplace(offset, whole);
    throw;
  }
}

void Arena::release(const Block& block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  by_data_.erase(block.data());
  ::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(block.offset_),
              static_cast<off_t>(block.nbytes()));
  auto at = free_.emplace(block.offset_, block.nbytes()).first;
  const auto after = std::next(at);
  if (after != free_.end() && at->first + at->second == after->first) {
    at->second += after->second;
    free_.erase(after);
  }
  if (at == free_.begin()) return;
  const auto before = std::prev(at);
  if (before->first + before->second == at->first) {
    before->second += at->second;
    free_.erase(at);
  }
}

std::optional<uint64_t> Arena::find(const std::byte* data, size_t nbytes) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto at = by_data_.upper_bound(data);
  if (at == by_data_.begin()) return std::nullopt;
  const Block& block = *std::prev(at)->second;
  const auto inside = static_cast<size_t>(data - block.data());
  if (inside + nbytes > block.nbytes()) return std::nullopt;
  return block.offset_ + inside;
}

size_t Arena::nbytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  size_t total = 0;
  for (const auto& entry : by_data_) total += entry.second->nbytes();
  return total;
}

}  // namespace hybridcomm
