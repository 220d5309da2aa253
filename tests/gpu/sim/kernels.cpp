#include "kernels.h"

#include <cstring>
#include <list>
#include <map>

namespace sim {

struct Image {
  std::string bytes;
  std::map<std::string, Kernel> kernels;  // by symbol
};

namespace {

std::list<Image>& images() {
  static auto* const all = new std::list<Image>;
  return *all;
}

// No more is read than is equal, for nobody says how long what is compared is: it may end where they differ.
bool begins_with(const char* bytes, const std::string& wanted) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (bytes[i] != wanted[i]) return false;
  }
  return true;
}

size_t size_of(const Kernel& kernel) {
  return kernel.parameters.empty() ? 0 : kernel.parameters.back().offset + kernel.parameters.back().nbytes;
}

// What is passed as CU_LAUNCH_PARAM_BUFFER_POINTER and CU_LAUNCH_PARAM_BUFFER_SIZE.
std::pair<const void*, size_t> buffer_of(void** extra) {
  constexpr uintptr_t kEnd = 0, kPointer = 1, kSize = 2;
  std::pair<const void*, size_t> given{nullptr, 0};
  for (void** each = extra; each != nullptr && reinterpret_cast<uintptr_t>(*each) != kEnd; each += 2) {
    const auto what = reinterpret_cast<uintptr_t>(each[0]);
    if (what == kPointer) given.first = each[1];
    if (what == kSize) given.second = *static_cast<size_t*>(each[1]);
  }
  return given;
}

std::string wrong_shape(const Kernel& kernel, const Launch& launch) {
  if (launch.blocks[0] == 0 || launch.blocks[1] != 1 || launch.blocks[2] != 1) {
    return "blocks in x alone, at least one, are wanted";
  }
  if (kernel.threads == 0) return "";
  if (launch.threads[0] != kernel.threads || launch.threads[1] != 1 || launch.threads[2] != 1) {
    return std::to_string(launch.threads[0]) + " threads per block, not " + std::to_string(kernel.threads);
  }
  if (launch.shared != kernel.shared) {
    return std::to_string(launch.shared) + " bytes of dynamic shared memory, not " +
           std::to_string(kernel.shared);
  }
  return "";
}

std::string wrong_value(const Kernel& kernel, const std::vector<unsigned char>& buffer) {
  for (const Parameter& each : kernel.parameters) {
    uint64_t value = 0;
    std::memcpy(&value, buffer.data() + each.offset, std::min(each.nbytes, sizeof(value)));
    const std::string which = "the parameter at byte " + std::to_string(each.offset);
    if (each.hidden && value != 0) return which + " is hidden, and not null";
    if (each.aligned && value % 16 != 0) return which + " is no multiple of 16";
  }
  return "";
}

}  // namespace

void register_kernel(std::string image, const std::string& symbol, Kernel kernel) {
  for (Image& each : images()) {
    if (each.bytes == image) {
      each.kernels[symbol] = std::move(kernel);
      return;
    }
  }
  images().push_back({std::move(image), {}});
  images().back().kernels[symbol] = std::move(kernel);
}

// The longest, if one is another's beginning.
const Image* find_image(const void* bytes) {
  const Image* found = nullptr;
  for (const Image& each : images()) {
    const bool longer = found == nullptr || each.bytes.size() > found->bytes.size();
    if (longer && begins_with(static_cast<const char*>(bytes), each.bytes)) found = &each;
  }
  return found;
}

const Kernel* find_kernel(const Image& image, const std::string& symbol) {
  const auto found = image.kernels.find(symbol);
  return found == image.kernels.end() ? nullptr : &found->second;
}

std::shared_ptr<std::vector<unsigned char>> arguments_of(const Kernel& kernel, const Launch& launch,
                                                         std::string& reason) {
  auto buffer = std::make_shared<std::vector<unsigned char>>(size_of(kernel));
  reason = wrong_shape(kernel, launch);
  if (!reason.empty()) return nullptr;
  if (launch.parameters != nullptr) {
    for (size_t i = 0; i < kernel.parameters.size(); ++i) {
      const Parameter& each = kernel.parameters[i];
      std::memcpy(buffer->data() + each.offset, launch.parameters[i], each.nbytes);
    }
  } else {
    const auto [given, nbytes] = buffer_of(launch.extra);
    if (given == nullptr || nbytes != buffer->size()) {
      reason =
          "an argument buffer of " + std::to_string(nbytes) + " bytes, not " + std::to_string(buffer->size());
      return nullptr;
    }
    std::memcpy(buffer->data(), given, nbytes);
  }
  reason = wrong_value(kernel, *buffer);
  return reason.empty() ? buffer : nullptr;
}

}  // namespace sim
