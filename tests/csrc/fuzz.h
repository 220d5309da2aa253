// What the fuzz targets share: reading the input, and failing loudly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace hybridcomm::test {

inline void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::abort();
}

// The input, piece by piece; zeros when there is no more.
class Input {
 public:
  Input(const uint8_t* data, size_t nbytes) : at_(data), left_(nbytes) {}
  size_t left() const { return left_; }
  const uint8_t* rest() const { return at_; }
  void read(void* to, size_t nbytes) {
    const size_t n = nbytes < left_ ? nbytes : left_;
    std::memset(to, 0, nbytes);
    if (n > 0) std::memcpy(to, at_, n);
    at_ += n;
    left_ -= n;
  }
  template <class T>
  T take() {
    T value;
    read(&value, sizeof value);
    return value;
  }
  uint8_t byte() { return take<uint8_t>(); }
  // How much of `left` goes next: at least a byte, and all when the input is at its end.
  size_t piece(size_t left) {
    if (left_ == 0) return left;
    const size_t wanted = size_t{1} + byte() * (byte() % 8);
    return wanted < left ? wanted : left;
  }

 private:
  const uint8_t* at_;
  size_t left_;
};

}  // namespace hybridcomm::test
