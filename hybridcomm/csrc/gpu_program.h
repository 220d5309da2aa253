// One rank's part of a plan on a GPU, as data: what is put on which stream, in one order; lower_device.py makes it.
//
// Operations are issued in the order in which they stand here, which is the order of the same plan on every rank. Those
// behind `tail` are issued after the head of the program that comes next (see gpu_engine.h).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gpu_nccl_abi.h"

namespace hybridcomm::gpu {

enum class DeviceKind : uint8_t {
  launch,          // a kernel
  copy,            // nbytes within the device
  fill,            // nbytes with one value
  all_reduce,      // NCCL's, of `count` elements; from `from` to `to`
  reduce,          // to `peer`
  reduce_scatter,  // `count` elements of the result
  all_gather,      // `count` elements of the input
  broadcast,       // from `peer`
  all_to_all,      // `count` elements to each; NCCL 2.28
  send,            // to `peer`
  receive,         // from `peer`
};

constexpr bool is_nccl(DeviceKind kind) { return kind >= DeviceKind::all_reduce; }

constexpr int kStart = -1;    // among `after`: what the caller's stream had done when the program was started
constexpr int kNoGroup = -1;  // of operations that are no part of an NCCL group

struct DeviceOp {
  DeviceKind kind = DeviceKind::fill;
  int stream = 0;
  uint32_t step = 0;       // of the plan, for messages
  std::vector<int> after;  // operations of other streams, or kStart, that it waits for
  int group = kNoGroup;    // neighbours of one group are one ncclGroup; they wait together, before it
  CUdeviceptr from = 0, to = 0;
  size_t count = 0;  // elements, or bytes (copy, fill)
  uint8_t value = 0;
  // launch
  int function = -1;
  unsigned blocks = 0, threads = 0, shared_nbytes = 0;
  std::vector<unsigned char> arguments;
  // NCCL
  int comm = -1;
  int peer = -1;
  int32_t dtype = ncclFloat32;
  int32_t op = ncclSum;
  // Of a sum: what goes in is multiplied by 1 / divisor, or by this rank's own factor (ncclRedOpCreatePreMulSum). A factor
  // of 1 is one, too: ranks must all call a sum of products.
  uint32_t divisor = 1;
  std::optional<double> factor;
};

// Device memory that a program touches, [begin, end).
struct DeviceRange {
  CUdeviceptr begin = 0, end = 0;
  bool overlaps(const DeviceRange& other) const { return begin < other.end && other.begin < end; }
};

class DeviceProgram {
 public:
  // `tail`: the first operation of the second half; operations.size(): there is none. Raises Code::invalid where an
  // operation waits for one that is not before it, or a group is not one run of NCCL's operations on one stream.
  DeviceProgram(uint64_t digest, std::string name, std::vector<DeviceOp> operations, size_t tail,
                std::vector<DeviceRange> memory);

  const uint64_t digest;   // of the plan
  const std::string name;  // for messages: "allreduce of 1,048,576 float32"
  const std::vector<DeviceOp> ops;
  const size_t tail;
  const std::vector<size_t> ends;   // the last operation on each stream: all are over when these are
  const std::vector<bool> awaited;  // operations that one of another stream waits for, and ends

  const std::vector<DeviceRange> memory;

  // Whether two programs touch the same memory, so that one has to wait for the other.
  bool meets(const DeviceProgram& other) const;
  // Behind the operations that are issued as one with `first`.
  size_t end_of_group(size_t first) const;
};

}  // namespace hybridcomm::gpu
