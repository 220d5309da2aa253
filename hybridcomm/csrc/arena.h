// Tensors in shared memory: the part of a rank's segment behind its slots, as long as its tensors need.
//
// The node's other ranks hold the segment's descriptor already, so nothing has to be handed over when it grows:
// they map what a message points to. Blocks are whole pages, allocated before use (a full memory is an error, not
// a SIGBUS), given back when the tensor dies, and their place is used again.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "common.h"

namespace hybridcomm {

class Arena : public std::enable_shared_from_this<Arena> {
 public:
  // The owner's mapping of one tensor's pages; the memory is zero at first.
  class Block {
   public:
    Block(std::shared_ptr<Arena> arena, uint64_t offset, Mapping mapping)
        : arena_(std::move(arena)), offset_(offset), mapping_(std::move(mapping)) {}
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    ~Block() { arena_->release(*this); }
    std::byte* data() const { return mapping_.data(); }
    size_t nbytes() const { return mapping_.nbytes(); }

   private:
    friend class Arena;
    std::shared_ptr<Arena> arena_;
    uint64_t offset_;
    Mapping mapping_;
  };

  // `fd` is the segment's; the arena begins at `begin`.
  Arena(Fd fd, uint64_t begin) : fd_(std::move(fd)), end_(begin) {}

  std::unique_ptr<Block> allocate(size_t nbytes);
  // Where a region lies in the segment; nothing if it is not (all) in one block.
  std::optional<uint64_t> find(const std::byte* data, size_t nbytes) const;
  size_t nbytes() const;  // allocated now

 private:
  void release(const Block& block);
  uint64_t place(size_t nbytes);

  Fd fd_;
  mutable std::mutex mutex_;
  uint64_t end_;                                // of the file
  std::map<uint64_t, uint64_t> free_;           // offset -> nbytes, of given-back pieces below the end
  std::map<const std::byte*, Block*> by_data_;  // by first byte
};

}  // namespace hybridcomm
