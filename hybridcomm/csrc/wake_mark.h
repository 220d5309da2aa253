// How many bytes a data socket must hold before the kernel reports it as readable.
//
// On a slow link a packet may bring a hundredth of a message. To wake up for each then costs more processor time than
// all the rest of communication, and it is taken from whoever computes on the core meanwhile.
#pragma once

#include <sys/socket.h>

#include <algorithm>
#include <cstddef>

namespace hybridcomm {

class WakeMark {
 public:
  // `left` bytes are sure to come; where nothing is, 0.
  void set(int fd, size_t left) {
    const int wanted = left < kShort ? 1 : static_cast<int>(std::min(left, kWorthReading));
    if (wanted == nbytes_) return;
    nbytes_ = wanted;
    ::setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &wanted, sizeof(wanted));
  }

 private:
  static constexpr size_t kShort = 16 * 1024;  // not worth a system call
  static constexpr size_t kWorthReading = 256 * 1024;
  int nbytes_ = 1;
};

}  // namespace hybridcomm
