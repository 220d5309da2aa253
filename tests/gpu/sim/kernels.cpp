#include "kernels.h"

#include <cstring>
#include <map>

namespace sim {
namespace {

std::map<std::string, Kernel>& kernels() {
  static auto* const all = new std::map<std::string, Kernel>;
  return *all;
}

}  // namespace

void register_kernel(Kernel kernel) {
  const std::string name = kernel.name;
  kernels()[name] = std::move(kernel);
}

const Kernel* find_kernel(const std::string& name) {
  const auto found = kernels().find(name);
  return found == kernels().end() ? nullptr : &found->second;
}

std::shared_ptr<std::vector<unsigned char>> arguments_of(const Kernel& kernel, void** parameters,
                                                         void** extra) {
  auto buffer = std::make_shared<std::vector<unsigned char>>();
  for (size_t i = 0; i < kernel.sizes.size(); ++i) {
    const size_t size = kernel.sizes[i];
    const size_t at = (buffer->size() + size - 1) / size * size;
    buffer->resize(at + size);
    if (parameters != nullptr) std::memcpy(buffer->data() + at, parameters[i], size);
  }
  if (parameters != nullptr) return buffer;
  constexpr uintptr_t kEnd = 0, kPointer = 1, kSize = 2;  // CU_LAUNCH_PARAM_*
  const void* given = nullptr;
  size_t nbytes = 0;
  for (void** each = extra; each != nullptr && reinterpret_cast<uintptr_t>(*each) != kEnd; each += 2) {
    const auto what = reinterpret_cast<uintptr_t>(each[0]);
    if (what == kPointer) given = each[1];
    if (what == kSize) nbytes = *static_cast<size_t*>(each[1]);
  }
  if (given == nullptr || nbytes != buffer->size()) return nullptr;
  std::memcpy(buffer->data(), given, nbytes);
  return buffer;
}

}  // namespace sim
