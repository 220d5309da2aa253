#include "faults.h"

#include "calls.h"

namespace sim {

Faults& faults() {
  static auto* const one = new Faults;
  return *one;
}

Faults::Faults() {
  world().also_reset.push_back([this] { planted_.clear(), answers_.clear(); });
}

void Faults::plant(int device, long communicator, long operation, Fault fault) {
  planted_.push_back({device, communicator, operation, fault});
}

Fault Faults::at(int device, long communicator, long operation) {
  for (Planted& each : planted_) {
    if (each.device == device && each.communicator == communicator && each.operation == operation) {
      const Fault fault = each.fault;
      each.fault = kNone;
      return fault;
    }
  }
  return kNone;
}

void Faults::plant_call(int device, const std::string& call, long count, int result) {
  answers_.push_back({device, call, count, result});
}

int Faults::answer(int device, const std::string& call) {
  for (auto each = answers_.begin(); each != answers_.end(); ++each) {
    if (each->device != device || each->call != call || each->left-- > 0) continue;
    const int result = each->result;
    answers_.erase(each);
    return result;
  }
  return 0;
}

hybridcomm::gpu::CUresult planted(const char* call) { return faults().answer(world().here().device, call); }

}  // namespace sim

// `device`'s call number `count` of the driver's function `call` from now on answers `result`, and does nothing.
EXPORT void sim_refuse(int device, const char* call, long count, int result) {
  const std::lock_guard<std::mutex> lock(sim::world().mutex);
  sim::faults().plant_call(device, call, count, result);
}

// `device`'s communicator number `communicator`, counted from 0 in the order in which the round makes them there: what
// befalls its operation number `operation` (a call, or a group's calls), counted from 0 likewise. With communicator -1
// and kBreaks: the context is lost behind so many operations of any kind that have run on the device.
EXPORT void sim_inject(int device, long communicator, long operation, int fault) {
  const std::lock_guard<std::mutex> lock(sim::world().mutex);
  if (communicator >= 0) {
    sim::faults().plant(device, communicator, operation, static_cast<sim::Fault>(fault));
  } else if (operation > 0) {
    sim::world().break_after(device, operation);
  } else {
    sim::world().break_now(device);
  }
}
