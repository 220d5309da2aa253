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

size_t slot_stride(const SegmentShape& shape) {
  return sizeof(Segment::Slot) + ((shape.slot_nbytes + 63) & ~size_t{63});
}

size_t slots_offset(const SegmentShape& shape) {
  const size_t control = 64 + 3 * 64 * static_cast<size_t>(shape.local_size);
  return (control + 4095) & ~size_t{4095};
}

Mapping map_shared(int fd, size_t nbytes) {
  void* data = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) throw Error(Code::shared_memory, errno_text("mapping a shared segment failed"));
  return Mapping(data, nbytes);
}

}  // namespace

size_t Segment::total_nbytes(const SegmentShape& shape) {
  return slots_offset(shape) +
         slot_stride(shape) * static_cast<size_t>(shape.slots) * static_cast<size_t>(shape.local_size);
}

Segment Segment::create(const SegmentShape& shape) {
  Fd fd(static_cast<int>(::memfd_create("hybridcomm", MFD_CLOEXEC)));
  if (!fd) throw Error(Code::shared_memory, errno_text("memfd_create failed (descriptor limit?)"));
  const size_t nbytes = total_nbytes(shape);
  // posix_fallocate returns its error; without it a full memory would be a SIGBUS at the first touch.
  int failed = EINTR;
  while (failed == EINTR) failed = ::posix_fallocate(fd.get(), 0, static_cast<off_t>(nbytes));
  if (failed != 0) {
    errno = failed;
    throw Error(Code::shared_memory,
                errno_text("no room for " + std::to_string(nbytes >> 20) +
                           " MiB of shared memory; free some, raise the memory or file-size "
                           "limit, or pass a smaller chunk_nbytes to init()"));
  }
  Mapping mapping = map_shared(fd.get(), nbytes);
  return Segment(std::move(fd), std::move(mapping), shape);
}

Segment Segment::map(Fd fd, const SegmentShape& shape) {
  const size_t nbytes = total_nbytes(shape);
  struct stat info{};
  if (::fstat(fd.get(), &info) != 0 || static_cast<size_t>(info.st_size) < nbytes) {
    throw Error(Code::shared_memory,
                "a local rank's segment is smaller than this rank's: all ranks must pass the "
                "same chunk_nbytes and topology to init()");
  }
  Mapping mapping = map_shared(fd.get(), nbytes);
  return Segment(std::move(fd), std::move(mapping), shape);
}

Segment::Slot& Segment::slot(int lane, uint64_t index) {
  const size_t ring = static_cast<size_t>(lane) * static_cast<size_t>(shape_.slots);
  const size_t place = ring + static_cast<size_t>(index % static_cast<uint64_t>(shape_.slots));
  return *reinterpret_cast<Slot*>(mapping_.data() + slots_offset(shape_) + place * slot_stride(shape_));
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
