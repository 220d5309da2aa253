#include "segment.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <cerrno>
#include <climits>

namespace hybridcomm {
namespace {

constexpr size_t kPage = 4096;

size_t round_up(size_t nbytes, size_t to) { return (nbytes + to - 1) / to * to; }

size_t slot_stride(const SegmentShape& shape) { return round_up(shape.slot_nbytes, 64); }
size_t message_slot_stride(const SegmentShape& shape) { return round_up(shape.message_slot_nbytes(), 64); }
size_t slots_of_a_kind(const SegmentShape& shape) {
  return static_cast<size_t>(shape.slots) * static_cast<size_t>(shape.local_size);
}

}  // namespace

size_t Segment::descriptors_offset(const SegmentShape& shape) {
  const auto locals = static_cast<size_t>(shape.local_size);
  return round_up(sizeof(Control) + kCounters * locals * sizeof(Counter), kPage);
}

size_t Segment::slots_offset(const SegmentShape& shape) {
  const auto locals = static_cast<size_t>(shape.local_size);
  return round_up(descriptors_offset(shape) + kLanes * locals * kRing * sizeof(Descriptor), kPage);
}

size_t Segment::message_slots_offset(const SegmentShape& shape) {
  return slots_offset(shape) + slot_stride(shape) * slots_of_a_kind(shape);
}

size_t Segment::arena_offset(const SegmentShape& shape) {
  return round_up(message_slots_offset(shape) + message_slot_stride(shape) * slots_of_a_kind(shape), kPage);
}

void allocate_shared(int fd, size_t offset, size_t nbytes, const std::string& what_to_do) {
  // posix_fallocate returns its error; without it a full memory would be a SIGBUS at the first touch.
  int failed = EINTR;
  while (failed == EINTR) {
    failed = ::posix_fallocate(fd, static_cast<off_t>(offset), static_cast<off_t>(nbytes));
  }
  if (failed == 0) return;
  errno = failed;
  throw Error(Code::shared_memory, errno_text("no room for " + std::to_string(nbytes >> 20) +
                                              " MiB of shared memory; free some, " + what_to_do));
}

Mapping map_shared(int fd, size_t offset, size_t nbytes) {
  void* data = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(offset));
  if (data == MAP_FAILED) throw Error(Code::shared_memory, errno_text("mapping shared memory failed"));
  return Mapping(data, nbytes);
}

Segment Segment::create(const SegmentShape& shape) {
  Fd fd(static_cast<int>(::memfd_create("hybridcomm", MFD_CLOEXEC)));
  if (!fd) throw Error(Code::shared_memory, errno_text("memfd_create failed (descriptor limit?)"));
  const size_t nbytes = arena_offset(shape);
  allocate_shared(fd.get(), 0, nbytes,
                  "raise the memory or file-size limit, or pass a smaller chunk_nbytes to init()");
  Mapping mapping = map_shared(fd.get(), 0, nbytes);
  return Segment(std::move(fd), std::move(mapping), shape);
}

Segment Segment::map(Fd fd, const SegmentShape& shape) {
  const size_t nbytes = arena_offset(shape);
  struct stat info{};
  if (::fstat(fd.get(), &info) != 0 || static_cast<size_t>(info.st_size) < nbytes) {
    throw Error(Code::shared_memory,
                "a local rank's segment is smaller than this rank's: all ranks must pass the "
                "same chunk_nbytes and topology to init()");
  }
  Mapping mapping = map_shared(fd.get(), 0, nbytes);
  return Segment(std::move(fd), std::move(mapping), shape);
}

Descriptor& Segment::descriptor(Lane lane, int to, uint64_t index) {
  const auto ring =
      static_cast<size_t>(lane) * static_cast<size_t>(shape_.local_size) + static_cast<size_t>(to);
  auto* first = reinterpret_cast<Descriptor*>(mapping_.data() + descriptors_offset(shape_));
  return first[ring * kRing + index % kRing];
}

uint64_t Segment::slot(int area, uint64_t index) const {
  const auto slots = static_cast<uint64_t>(shape_.slots);
  const bool of_messages = area >= shape_.local_size;
  const auto local = static_cast<uint64_t>(of_messages ? area - shape_.local_size : area);
  const uint64_t place = local * slots + index % slots;
  return of_messages ? message_slots_offset(shape_) + place * message_slot_stride(shape_)
                     : slots_offset(shape_) + place * slot_stride(shape_);
}

std::byte* Segment::at(uint64_t offset, size_t nbytes) {
  if (offset + nbytes <= mapping_.nbytes()) return mapping_.data() + offset;
  const size_t begin = mapping_.nbytes();  // where the arena begins
  if (offset - begin + nbytes > arena_.nbytes()) {
    struct stat info{};
    const bool there = ::fstat(fd_.get(), &info) == 0 && static_cast<size_t>(info.st_size) >= offset + nbytes;
    if (!there) throw Error(Code::shared_memory, "a local rank named a tensor beyond its arena");
    const size_t whole = static_cast<size_t>(info.st_size) - begin;
    if (arena_.nbytes() == 0) {
      arena_ = map_shared(fd_.get(), begin, whole);
    } else if (!arena_.grow(whole)) {
      throw Error(Code::shared_memory, errno_text("mapping a local rank's tensors failed"));
    }
  }
  return arena_.data() + (offset - begin);
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, Clock::duration limit) {
  const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(limit).count();
  struct timespec wait{};
  wait.tv_sec = ns / 1000000000;
  wait.tv_nsec = ns % 1000000000;
  ::syscall(SYS_futex, &word, FUTEX_WAIT, seen, &wait, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) {
  ::syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace hybridcomm
