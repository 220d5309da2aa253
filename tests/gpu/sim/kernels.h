// Kernels that run as functions of the host, under the symbols of the images and with the argument buffers that the
// device's have.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace sim {

using Touch = std::function<void(uintptr_t begin, size_t nbytes, bool write)>;

// An entry of the argument buffer.
struct Parameter {
  size_t offset, nbytes;
  bool hidden;   // has to be null
  bool aligned;  // the caller promises a multiple of 16
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  unsigned threads = 0;  // per block; 0: as many as one likes
  size_t shared = 0;     // bytes of dynamic shared memory, where threads are given
  std::function<void(const unsigned char* arguments, unsigned blocks, unsigned threads)> run;
  // What it reads and writes, asked when it is about to run; false: it cannot say, and has reported why.
  std::function<bool(const unsigned char* arguments, unsigned blocks, const Touch&)> ranges;
};

// The bytes of an image that has one kernel under one symbol; several images may have the same symbol.
void register_kernel(std::string image, const std::string& symbol, Kernel kernel);

// What an image in memory is recognised by: it has all bytes of one that was registered. Null: it is none.
struct Image;
const Image* find_image(const void* bytes);
const Kernel* find_kernel(const Image& image, const std::string& symbol);

// A launch as cuLaunchKernel has it.
struct Launch {
  unsigned blocks[3], threads[3];
  size_t shared;
  void **parameters, **extra;
};
// The argument buffer of a launch, from pointers to values or from CU_LAUNCH_PARAM_BUFFER_POINTER; null, with a reason,
// where the launch is not what the kernel was built for.
std::shared_ptr<std::vector<unsigned char>> arguments_of(const Kernel& kernel, const Launch& launch,
                                                         std::string& reason);

}  // namespace sim
