#include "faults.h"

#include "calls.h"

namespace sim {

Faults& faults() {
  static auto* const one = new Faults;
  return *one;
}

Faults::Faults() {
  world().also_reset.push_back([this] { planted_.clear(); });
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

}  // namespace sim

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
