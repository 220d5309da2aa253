// Errors, descriptors and mappings shared by the engine's files.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace hybridcomm {

enum class Code {
  bootstrap,
  shared_memory,
  peer_lost,
  stall,
  mismatch,
  payload,
  aborted,
  invalid,
  compressor,
};

// `rank` is the culprit of peer_lost and aborted (-1: unknown), `missing` the ranks a stalled wait was for.
class Error : public std::runtime_error {
 public:
  Error(Code code, const std::string& what, int rank = -1, std::vector<int> missing = {})
      : std::runtime_error(what), code(code), rank(rank), missing(std::move(missing)) {}
  Code code;
  int rank;
  std::vector<int> missing;
};

std::string errno_text(const std::string& what);
std::string join_ranks(const std::vector<int>& ranks);

using Clock = std::chrono::steady_clock;
// At most thirty years, so that no sum with a time point overflows.
inline Clock::duration seconds(double value) {
  const std::chrono::duration<double> limited(value < 1e9 ? value : 1e9);
  return std::chrono::duration_cast<Clock::duration>(limited);
}

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    if (this != &other) {
      reset();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }
  ~Fd() { reset(); }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void reset() {
    if (fd_ >= 0) ::close(std::exchange(fd_, -1));
  }

 private:
  int fd_ = -1;
};

class Mapping {
 public:
  Mapping() = default;
  Mapping(void* data, size_t nbytes) : data_(data), nbytes_(nbytes) {}
  Mapping(Mapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), nbytes_(std::exchange(other.nbytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    if (this != &other) {
      reset();
      data_ = std::exchange(other.data_, nullptr);
      nbytes_ = std::exchange(other.nbytes_, 0);
    }
    return *this;
  }
  ~Mapping() { reset(); }
  std::byte* data() const { return static_cast<std::byte*>(data_); }
  size_t nbytes() const { return nbytes_; }
  // A longer piece of the same file, perhaps elsewhere; what was touched stays mapped. False: no room.
  bool grow(size_t nbytes) {
    void* moved = ::mremap(data_, nbytes_, nbytes, MREMAP_MAYMOVE);
    if (moved == MAP_FAILED) return false;
    data_ = moved;
    nbytes_ = nbytes;
    return true;
  }

 private:
  void reset() {
    if (data_ != nullptr) ::munmap(data_, nbytes_);
    data_ = nullptr;
  }
  void* data_ = nullptr;
  size_t nbytes_ = 0;
};

}  // namespace hybridcomm
