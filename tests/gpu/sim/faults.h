// What is to go wrong: planted by a test, at an operation of one rank's communicator.
#pragma once

#include <cstddef>
#include <vector>

namespace sim {

enum Fault {
  kNone = 0,
  kSystemError = 2,  // ncclSystemError, ncclInternalError and ncclRemoteError by ncclCommGetAsyncError
  kInternalError = 3,
  kRemoteError = 6,
  kHangs = 100,   // the operation never ends, and nobody says so
  kBreaks = 101,  // the device's context is lost: every call answers CUDA_ERROR_ILLEGAL_ADDRESS
};

class Faults {
 public:
  Faults();
  void plant(int device, long communicator, long operation, Fault fault);
  // What befalls an operation that begins; it does so once.
  Fault at(int device, long communicator, long operation);

 private:
  struct Planted {
    int device;
    long communicator, operation;
    Fault fault;
  };
  std::vector<Planted> planted_;
};

Faults& faults();

}  // namespace sim
