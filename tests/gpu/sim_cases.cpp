// A small pipeline on the simulated machine, right or with one bug; prints the reports and whether values were right.
//
//   sim_cases LIBRARY BUG SEED EAGER      (BUG: none or one of those below)
//
// Per device and host thread: `fill` on one stream, `add` on another, ordered by events both ways, over several rounds.
#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "gpu_tables.h"

using namespace hybridcomm::gpu;

namespace {

constexpr int kNumel = 64, kRounds = 4, kDevices = 2;
using Touch = std::function<void(uintptr_t, size_t, bool)>;

Cuda cuda;
std::string bug;
std::array<bool, kDevices> right;

struct Fill {
  float* to;
  int count;
  float value;
};
struct Add {
  float* to;
  const float* from;
  int count;
};

constexpr size_t kFill = 16, kAdd = 20;  // bytes of the argument buffers; the second's structure is padded

template <class T>
T as(const unsigned char* buffer, size_t nbytes) {
  T arguments;
  std::memcpy(&arguments, buffer, nbytes);
  return arguments;
}

void fill(const unsigned char* buffer, unsigned, unsigned) {
  const auto a = as<Fill>(buffer, kFill);
  for (int i = 0; i < a.count; ++i) a.to[i] = a.value + static_cast<float>(i);
}
void fill_ranges(const unsigned char* buffer, const Touch& touch) {
  const auto a = as<Fill>(buffer, kFill);
  touch(reinterpret_cast<uintptr_t>(a.to), sizeof(float) * static_cast<size_t>(a.count), true);
}
void add(const unsigned char* buffer, unsigned, unsigned) {
  const auto a = as<Add>(buffer, kAdd);
  for (int i = 0; i < a.count; ++i) a.to[i] += a.from[i];
}
void add_ranges(const unsigned char* buffer, const Touch& touch) {
  const auto a = as<Add>(buffer, kAdd);
  const size_t nbytes = sizeof(float) * static_cast<size_t>(a.count);
  touch(reinterpret_cast<uintptr_t>(a.from), nbytes, false);
  touch(reinterpret_cast<uintptr_t>(a.to), nbytes, false);
  touch(reinterpret_cast<uintptr_t>(a.to), nbytes, true);
}

// An event and two streams, taken back by their owner; bugs leave some.
struct Device {
  CUstream compute = nullptr, communicate = nullptr;
  CUevent ready = nullptr, done = nullptr;
  CUdeviceptr gradient = 0, sum = 0, foreign = 0;
  CUfunction fill = nullptr, add = nullptr;
};

void ok(CUresult result) { cuda.check(result, "a call"); }

Device set_up(int device) {
  Device made;
  CUcontext context;
  ok(cuda.cuDevicePrimaryCtxRetain(&context, device));
  ok(cuda.cuCtxSetCurrent(context));
  const unsigned flags = bug == "legacy" || bug == "legacy, unordered" ? 0u : CU_STREAM_NON_BLOCKING;
  const unsigned other = bug == "legacy, unordered" ? CU_STREAM_NON_BLOCKING : flags;
  ok(cuda.cuStreamCreateWithPriority(&made.compute, flags, 0));
  ok(cuda.cuStreamCreateWithPriority(&made.communicate, other, -1));
  ok(cuda.cuEventCreate(&made.ready, CU_EVENT_DISABLE_TIMING));
  ok(cuda.cuEventCreate(&made.done, CU_EVENT_DISABLE_TIMING));
  ok(cuda.cuMemAlloc_v2(&made.gradient, sizeof(float) * kNumel));
  ok(cuda.cuMemAlloc_v2(&made.sum, sizeof(float) * kNumel));
  CUmodule module;
  ok(cuda.cuModuleLoadData(&module, "image"));
  ok(cuda.cuModuleGetFunction(&made.fill, module, "fill"));
  ok(cuda.cuModuleGetFunction(&made.add, module, "add"));
  return made;
}

void one_round(const Device& on, float value) {
  float* gradient = reinterpret_cast<float*>(static_cast<uintptr_t>(on.gradient));
  float* sum = reinterpret_cast<float*>(static_cast<uintptr_t>(on.sum));
  // Ordered by the legacy stream instead of events, if that is what is tried.
  const bool legacy = bug == "legacy" || bug == "legacy, unordered";
  int count = kNumel;
  void* filled[] = {&gradient, &count, &value};
  ok(cuda.cuLaunchKernel(on.fill, 1, 1, 1, 32, 1, 1, 0, legacy ? nullptr : on.compute, filled, nullptr));
  if (bug == "wait before record") ok(cuda.cuStreamWaitEvent(on.communicate, on.ready, 0));
  if (!legacy) ok(cuda.cuEventRecord(on.ready, on.compute));
  if (!legacy && bug != "no wait" && bug != "wait before record") {
    ok(cuda.cuStreamWaitEvent(on.communicate, on.ready, 0));
  }
  int added = bug == "out of bounds" ? kNumel + 1 : kNumel;
  Add arguments{sum, gradient, added};
  size_t size = kAdd;
  void* extra[] = {reinterpret_cast<void*>(1), &arguments, reinterpret_cast<void*>(2), &size, nullptr};
  ok(cuda.cuLaunchKernel(on.add, 1, 1, 1, 32, 1, 1, 0, on.communicate, nullptr, extra));
  if (!legacy) ok(cuda.cuEventRecord(on.done, on.communicate));
  if (!legacy && bug != "no wait back") ok(cuda.cuStreamWaitEvent(on.compute, on.done, 0));
}

void read_back(const Device& on, std::vector<float>& got) {
  const size_t nbytes = sizeof(float) * kNumel;
  if (bug == "legacy, unordered") ok(cuda.cuStreamSynchronize(on.communicate));
  ok(cuda.cuMemcpyDtoHAsync_v2(got.data(), on.sum, nbytes, bug == "legacy" ? nullptr : on.compute));
  if (bug != "host read") ok(cuda.cuStreamSynchronize(bug == "legacy" ? nullptr : on.compute));
}

void tear_down(const Device& on) {
  if (bug == "freed too early") {
    ok(cuda.cuMemsetD8Async(on.gradient, 0, 4, on.communicate));
    ok(cuda.cuMemFree_v2(on.gradient));
  }
  ok(cuda.cuStreamSynchronize(on.communicate));
  ok(cuda.cuStreamSynchronize(on.compute));
  ok(cuda.cuStreamSynchronize(nullptr));
  if (bug != "freed too early") ok(cuda.cuMemFree_v2(on.gradient));
  if (bug == "used after free") {
    ok(cuda.cuMemsetD8Async(on.gradient, 0, 4, on.compute));
    ok(cuda.cuStreamSynchronize(on.compute));
  }
  if (bug != "memory left") ok(cuda.cuMemFree_v2(on.sum));
  if (bug != "event left") ok(cuda.cuEventDestroy_v2(on.ready));
  ok(cuda.cuEventDestroy_v2(on.done));
  if (bug == "work left") ok(cuda.cuMemsetD8Async(on.sum, 0, 4, on.compute));
  ok(cuda.cuStreamDestroy_v2(on.compute));
  ok(cuda.cuStreamDestroy_v2(on.communicate));
  if (bug == "destroyed stream") cuda.cuStreamQuery(on.compute);
}

void rank(int device) {
  const Device on = set_up(device);
  const size_t nbytes = sizeof(float) * kNumel;
  const bool legacy = bug == "legacy" || bug == "legacy, unordered";
  const CUstream clearing = legacy ? nullptr : on.communicate;
  ok(cuda.cuMemsetD8Async(on.sum, 0, nbytes, clearing));
  for (int i = 0; i < kRounds; ++i) one_round(on, static_cast<float>(10 * i + device));
  if (bug == "another device") {
    CUcontext other;
    ok(cuda.cuDevicePrimaryCtxRetain(&other, 1 - device));
    ok(cuda.cuCtxSetCurrent(other));
    CUstream stream;
    ok(cuda.cuStreamCreateWithPriority(&stream, CU_STREAM_NON_BLOCKING, 0));
    ok(cuda.cuStreamWaitEvent(stream, on.done, 0));
    ok(cuda.cuMemsetD8Async(on.gradient, 0, 4, stream));
    ok(cuda.cuStreamSynchronize(stream));
    ok(cuda.cuStreamDestroy_v2(stream));
  }
  std::vector<float> got(kNumel);
  read_back(on, got);
  bool same = true;
  for (int i = 0; i < kNumel; ++i) {
    float want = 0;
    for (int r = 0; r < kRounds; ++r) want += static_cast<float>(10 * r + device) + static_cast<float>(i);
    same &= got[static_cast<size_t>(i)] == want;
  }
  right[static_cast<size_t>(device)] = same;
  tear_down(on);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  bug = argv[2];
  void* handle = ::dlopen(argv[1], RTLD_NOW);
  if (handle == nullptr) return std::printf("error %s\n", ::dlerror()), 2;
  ::setenv("HYBRIDCOMM_CUDA", argv[1], 1);
  Search search;
  search.name = "the simulation", search.stem = "libcuda-that-is-simulated",
  search.variable = "HYBRIDCOMM_CUDA";
  cuda = Cuda::load(SharedLibrary::open(search));
  const auto reset = reinterpret_cast<void (*)(unsigned, int, int)>(::dlsym(handle, "sim_reset"));
  const auto finish = reinterpret_cast<int (*)()>(::dlsym(handle, "sim_finish"));
  const auto report = reinterpret_cast<const char* (*)(int)>(::dlsym(handle, "sim_report"));
  using Register =
      void (*)(const char*, const size_t*, int, void (*)(const unsigned char*, unsigned, unsigned),
               void (*)(const unsigned char*, const Touch&));
  const auto define = reinterpret_cast<Register>(::dlsym(handle, "sim_register"));
  const size_t of_fill[] = {8, 4, 4}, of_add[] = {8, 8, 4};
  define("fill", of_fill, 3, fill, fill_ranges);
  define("add", of_add, 3, add, add_ranges);
  const int first = std::atoi(argv[3]), eager = std::atoi(argv[4]);
  for (int seed = first; seed < first + 20; ++seed) {
    reset(static_cast<unsigned>(seed), eager, kDevices);
    std::vector<std::thread> ranks;
    for (int device = 0; device < kDevices; ++device) ranks.emplace_back(rank, device);
    for (std::thread& each : ranks) each.join();
    const int lines = finish();
    std::printf("seed %d %s\n", seed, right[0] && right[1] ? "right" : "wrong");
    for (int i = 0; i < lines; ++i) std::printf("  %s\n", report(i));
  }
  return 0;
}
