// What tests steer the simulation by.
//
// All of it takes the world's lock, but for the three that a kernel's functions call, which are run under it: sim_touch,
// sim_readable and sim_failed.
#include <cstring>

#include "kernels.h"
#include "world.h"

using sim::Finding;
using sim::Kernel;
using sim::Touch;
using sim::world;

namespace {

// Where a kernel's function says what the kernel touches.
struct Collector {
  const Touch& touch;
  bool sound = true;
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// `threads`: host threads that will come; this one is none of them unless it calls something itself.
EXPORT void sim_reset(unsigned seed, int eager_percent, int threads) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  world().reset(seed, eager_percent, threads);
}
EXPORT int sim_finish() {
  const std::lock_guard<std::mutex> lock(world().mutex);
  return world().finish();
}
EXPORT const char* sim_report(int i) { return world().reports.lines()[static_cast<size_t>(i)].c_str(); }

// This thread may call, but does nothing that others wait for, or waits for them without the simulation's knowing.
EXPORT void sim_stand_by() {
  const std::lock_guard<std::mutex> lock(world().mutex);
  world().stand_by();
}
// What one host thread has told another, by a barrier or a queue: the one publishes before, the other learns behind it.
EXPORT void sim_publish() {
  const std::lock_guard<std::mutex> lock(world().mutex);
  world().publish();
}
EXPORT void sim_learn() {
  const std::lock_guard<std::mutex> lock(world().mutex);
  world().learn();
}
// Until the next reset, host threads of one device count as ordered among themselves.
EXPORT void sim_share_hosts() {
  const std::lock_guard<std::mutex> lock(world().mutex);
  world().share_hosts();
}
// How long nothing may move while somebody waits or asks, before that is reported and all that waits fails.
EXPORT void sim_patience(int milliseconds) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  world().be_patient(milliseconds);
}

// Of the image "image", whose symbols are kernels' names; each argument is aligned to its size.
EXPORT void sim_register(const char* name, const size_t* sizes, int count,
                         void (*run)(const unsigned char*, unsigned, unsigned),
                         void (*ranges)(const unsigned char*, const Touch&)) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  Kernel kernel;
  kernel.name = name;
  size_t end = 0;
  for (int i = 0; i < count; ++i) {
    const size_t at = (end + sizes[i] - 1) / sizes[i] * sizes[i];
    kernel.parameters.push_back({at, sizes[i], false, false});
    end = at + sizes[i];
  }
  kernel.run = run;
  kernel.ranges = [ranges](const unsigned char* arguments, unsigned, const Touch& touch) {
    ranges(arguments, touch);
    return true;
  };
  sim::register_kernel("image", name, std::move(kernel));
}

// An image of `nbytes` bytes with one kernel. `parameters`: four numbers each, offset, bytes, whether it is hidden, whether
// it has to be a multiple of 16. Both functions get the argument buffer and the number of blocks; `ranges` also what to
// pass to sim_touch.
EXPORT void sim_register_image(const void* image, size_t nbytes, const char* symbol, const char* name,
                               const uint64_t* parameters, int count, unsigned threads, size_t shared,
                               void (*run)(const unsigned char*, unsigned),
                               void (*ranges)(const unsigned char*, unsigned, void*)) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  Kernel kernel;
  kernel.name = name;
  for (int i = 0; i < count; ++i, parameters += 4) {
    kernel.parameters.push_back({parameters[0], parameters[1], parameters[2] != 0, parameters[3] != 0});
  }
  kernel.threads = threads;
  kernel.shared = shared;
  kernel.run = [run](const unsigned char* arguments, unsigned blocks, unsigned) { run(arguments, blocks); };
  kernel.ranges = [ranges](const unsigned char* arguments, unsigned blocks, const Touch& touch) {
    Collector collector{touch};
    ranges(arguments, blocks, &collector);
    return collector.sound;
  };
  sim::register_kernel(std::string(static_cast<const char*>(image), nbytes), symbol, std::move(kernel));
}

// `ranges`: three numbers each, address, bytes, whether they are written.
EXPORT void sim_touch(void* collector, const uint64_t* ranges, int count) {
  const Touch& touch = static_cast<Collector*>(collector)->touch;
  for (int i = 0; i < count; ++i, ranges += 3) touch(ranges[0], ranges[1], ranges[2] != 0);
}
EXPORT int sim_readable(uint64_t address, size_t nbytes) { return world().memory.readable(address, nbytes); }
// A kernel's function has failed; where it was to say what is touched (`collector`), the kernel is not run.
EXPORT void sim_failed(void* collector, const char* text) {
  world().reports.add(Finding::kernel, text);
  if (collector != nullptr) static_cast<Collector*>(collector)->sound = false;
}

// Host memory that counts as device memory. 1: done; 0: reported.
EXPORT int sim_adopt(uint64_t address, size_t nbytes, int device) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  return world().memory.adopt(address, nbytes, device);
}
EXPORT int sim_drop(uint64_t address) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  return world().memory.drop(address, world().here().host->clock);
}
// This thread itself reads or writes device memory, now. Whatever it enqueues later comes after; for all else, it has to
// have waited. 1: nothing is wrong.
EXPORT int sim_host_access(uint64_t address, size_t nbytes, int write, const char* what) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  sim::Host& host = *world().here().host;
  host.clock.tick(host.actor);
  const size_t before = world().reports.found();
  world().memory.access(address, nbytes, write != 0, host.actor, host.clock, -1,
                        std::string("host: ") + what);
  return world().reports.found() == before;
}
