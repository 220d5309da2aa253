#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>

#include "bindings.h"
#include "engine.h"
#include "peer_memory.h"
#include "signals.h"

namespace py = pybind11;

namespace hybridcomm {
namespace {

using Endpoints = std::vector<std::tuple<int, std::string, uint16_t>>;
using Pieces = std::vector<std::pair<uint64_t, uintptr_t>>;
// decay, momentum, masking, addresses of the velocity before and after: Feedback's fields in their order.
using FeedbackFields = std::tuple<float, float, bool, uintptr_t, uintptr_t>;

Feedback feedback_of(const FeedbackFields& fields) {
  const auto& [decay, momentum, masking, velocity_in, velocity_out] = fields;
  return {decay, momentum, masking, reinterpret_cast<const float*>(velocity_in),
          reinterpret_cast<float*>(velocity_out)};
}

Buffers buffers_at(uintptr_t tensor, uintptr_t residual_in, uintptr_t residual_out, uint32_t name,
                   const Pieces& pieces, double timeout_s) {
  Buffers buffers;
  buffers.timeout_s = timeout_s;
  for (const auto& [begin, data] : pieces)
    buffers.pieces.push_back({begin, reinterpret_cast<std::byte*>(data)});
  buffers.name = name;
  buffers.tensor = reinterpret_cast<std::byte*>(tensor);
  buffers.residual_in = reinterpret_cast<const float*>(residual_in);
  buffers.residual_out = reinterpret_cast<float*>(residual_out);
  return buffers;
}

// One end of a message: does it send, peer, group, tag, dtype, numel, address.
using Half = std::tuple<bool, int, uint64_t, uint32_t, uint8_t, uint64_t, uintptr_t>;

std::vector<Message> messages_of(const std::vector<Half>& halves) {
  std::vector<Message> messages;
  for (const auto& [send, peer, group, tag, dtype, numel, address] : halves) {
    messages.push_back(message_of(send, peer, group, tag, dtype, numel, address));
  }
  return messages;
}

std::shared_ptr<Engine> make_engine(int rank, std::vector<int> local_ranks, const Endpoints& remote_peers,
                                    const py::bytes& token, const std::string& name, size_t slot_nbytes,
                                    double timeout_s, bool crowded, bool single_copy,
                                    const Listener& listener, const Endpoints& others) {
  MeshConfig config;
  config.rank = rank;
  config.local_ranks = std::move(local_ranks);
  for (const auto& [peer, host, port] : remote_peers) config.remote_peers.push_back({peer, host, port});
  for (const auto& [peer, host, port] : others) config.others.push_back({peer, host, port});
  const std::string secret = token;
  std::copy_n(secret.begin(), std::min(secret.size(), config.token.size()), config.token.begin());
  config.name = name;
  config.slot_nbytes = slot_nbytes;
  config.single_copy = single_copy;
  config.timeout_s = timeout_s;
  config.interrupted = raise_pending_signals;
  const py::gil_scoped_release no_gil;
  return std::make_shared<Engine>(config, listener, crowded);
}

}  // namespace

void bind_engine(py::module_& module) {
  py::class_<Listener>(module, "Listener")
      .def(py::init<const std::string&, uint16_t>(), py::arg("host"), py::arg("port"))
      .def_property_readonly("port", &Listener::port);

  module.def("single_copy_pays", &single_copy_pays, py::call_guard<py::gil_scoped_release>());

  py::class_<Work, std::shared_ptr<Work>>(module, "Work")
      .def("is_completed", &Work::is_completed)
      .def("wait",
           [](Work& work, double limit_s) {
             const py::gil_scoped_release no_gil;
             return work.wait(limit_s, raise_pending_signals);
           })
      .def_property_readonly("seconds", &Work::seconds)
      .def_property_readonly("wire_nbytes", &Work::wire_nbytes);

  py::class_<Arena::Block>(module, "SharedMemory", py::buffer_protocol()).def_buffer([](Arena::Block& block) {
    const auto nbytes = static_cast<py::ssize_t>(block.nbytes());
    return py::buffer_info(block.data(), 1, "B", 1, {nbytes}, {py::ssize_t{1}});
  });

  py::class_<Engine, std::shared_ptr<Engine>>(module, "Engine")
      .def(py::init(&make_engine), py::kw_only(), py::arg("rank"), py::arg("local_ranks"),
           py::arg("remote_peers"), py::arg("token"), py::arg("name"), py::arg("slot_nbytes"),
           py::arg("timeout_s"), py::arg("crowded"), py::arg("single_copy") = true, py::arg("listener"),
           py::arg("others") = Endpoints{})
      .def(
          "run",
          [](Engine& engine, std::shared_ptr<Program> program, uintptr_t tensor, uintptr_t residual_in,
             uintptr_t residual_out, uint32_t name, const Pieces& pieces, double timeout_s,
             const FeedbackFields& feedback) {
            const py::gil_scoped_release no_gil;
            Buffers buffers = buffers_at(tensor, residual_in, residual_out, name, pieces, timeout_s);
            buffers.feedback = feedback_of(feedback);
            return engine.run(std::move(program), buffers, raise_pending_signals);
          },
          py::arg("program"), py::arg("tensor"), py::arg("residual_in") = 0, py::arg("residual_out") = 0,
          py::arg("name") = 0, py::arg("pieces") = Pieces{}, py::arg("timeout_s") = 0.0,
          py::arg("feedback") = FeedbackFields{1.0f, 0.0f, true, 0, 0})
      .def(
          "submit",
          [](Engine& engine, std::shared_ptr<Program> program, uintptr_t tensor, uintptr_t residual_in,
             uintptr_t residual_out, uint32_t name, const Pieces& pieces, double timeout_s,
             const FeedbackFields& feedback) {
            const py::gil_scoped_release no_gil;
            Buffers buffers = buffers_at(tensor, residual_in, residual_out, name, pieces, timeout_s);
            buffers.feedback = feedback_of(feedback);
            return engine.submit(std::move(program), buffers);
          },
          py::arg("program"), py::arg("tensor"), py::arg("residual_in") = 0, py::arg("residual_out") = 0,
          py::arg("name") = 0, py::arg("pieces") = Pieces{}, py::arg("timeout_s") = 0.0,
          py::arg("feedback") = FeedbackFields{1.0f, 0.0f, true, 0, 0})
      .def(
          "post",
          [](Engine& engine, const std::vector<Half>& halves) {
            const py::gil_scoped_release no_gil;
            return engine.post(messages_of(halves));
          },
          py::arg("messages"))
      .def(
          "exchange",
          [](Engine& engine, const std::vector<Half>& halves) {
            const py::gil_scoped_release no_gil;
            return engine.exchange(messages_of(halves), raise_pending_signals);
          },
          py::arg("messages"))
      .def("close", &Engine::close, py::call_guard<py::gil_scoped_release>())
      .def("abort", &Engine::abort, py::call_guard<py::gil_scoped_release>())
      .def(
          "listen",
          [](Engine& engine) {
            if (const std::optional<Error> heard = engine.listen()) throw Error(*heard);
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "allocate",
          [](const Engine& engine, size_t nbytes) -> std::unique_ptr<Arena::Block> {
            const auto& arena = engine.node().arena();
            return arena ? arena->allocate(nbytes) : nullptr;
          },
          py::call_guard<py::gil_scoped_release>())
      .def("shared_nbytes",
           [](const Engine& engine) { return engine.node().arena() ? engine.node().arena()->nbytes() : 0; })
      .def("reach",
           [](const Engine& engine) {
             py::dict result;
             for (const auto& [rank, reach] : engine.node().reaches())
               result[py::int_(rank)] = reach_name(reach);
             return result;
           })
      .def("counters", [](const Engine& engine) {
        const WireCounters& counters = engine.counters();
        py::dict result;
        result["wire_tx_bytes"] = counters.tx_bytes.load();
        result["wire_rx_bytes"] = counters.rx_bytes.load();
        result["shm_bytes"] = counters.shm_bytes.load();
        result["calls"] = counters.calls.load();
        return result;
      });
}

}  // namespace hybridcomm
