// Kernels that run as functions of the host, under the names and with the argument buffers that the device's have.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace sim {

using Touch = std::function<void(uintptr_t begin, size_t nbytes, bool write)>;

struct Kernel {
  std::string name;
  std::vector<size_t> sizes;  // of its arguments, in bytes; the buffer aligns each to its size
  std::function<void(const unsigned char* arguments, unsigned blocks, unsigned threads)> run;
  std::function<void(const unsigned char* arguments, const Touch&)> ranges;  // what it reads and writes
};

void register_kernel(Kernel kernel);
const Kernel* find_kernel(const std::string& name);
// The argument buffer of a launch, from pointers to values or from CU_LAUNCH_PARAM_BUFFER_POINTER; null: not of its size.
std::shared_ptr<std::vector<unsigned char>> arguments_of(const Kernel& kernel, void** parameters,
                                                         void** extra);

}  // namespace sim
