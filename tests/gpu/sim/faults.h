// What is to go wrong: planted by a test, at an operation of one rank's communicator.
#pragma once

#include <cstddef>
#include <string>
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
  // `device`'s call number `count` of that name from now on, counted from 0, answers `result`, once.
  void plant_call(int device, const std::string& call, long count, int result);
  int answer(int device, const std::string& call);

 private:
  struct Planted {
    int device;
    long communicator, operation;
    Fault fault;
  };
  struct Answer {
    int device;
    std::string call;
    long left;
    int result;
  };
  std::vector<Planted> planted_;
  std::vector<Answer> answers_;
};

Faults& faults();

}  // namespace sim
