#include "graphs.h"

#include <algorithm>

#include "calls.h"

namespace sim {
namespace {

using namespace hybridcomm::gpu;

void join(std::vector<size_t>& nodes, const std::vector<size_t>& more) {
  for (size_t node : more) {
    if (std::find(nodes.begin(), nodes.end(), node) == nodes.end()) nodes.push_back(node);
  }
}

void enter(Capture& capture, Stream& stream) {
  capture.lanes[&stream] = capture.graph.devices.size();
  capture.graph.devices.push_back(stream.device);
  capture.leaves[&stream];
}

// Whether all nodes come before the origin's end.
bool joined(Capture& capture) {
  std::vector<bool> before(capture.graph.nodes.size());
  std::vector<size_t> open = capture.leaves[capture.origin];
  while (!open.empty()) {
    const size_t node = open.back();
    open.pop_back();
    if (before[node]) continue;
    before[node] = true;
    join(open, capture.graph.nodes[node].after);
  }
  return std::all_of(before.begin(), before.end(), [](bool each) { return each; });
}

}  // namespace

Graphs& graphs() {
  static auto* const one = new Graphs;
  return *one;
}

Graphs::Graphs() {
  world().also_reset.push_back([this] { captures_.clear(), graphs_.clear(), executables_.clear(); });
  world().also_finish.push_back([this] {
    size_t left = 0, capturing = 0;
    for (const Graph& each : graphs_) left += each.live;
    for (const Executable& each : executables_) left += each.live;
    for (const auto& each : captures_) capturing += each->active;
    if (left != 0) world().reports.add(Finding::leak, std::to_string(left) + " graphs");
    if (capturing != 0)
      world().reports.add(Finding::leak, std::to_string(capturing) + " captures that never ended");
  });
}

CUresult Graphs::spoil(Capture& capture, CUresult result) {
  capture.invalid = true;
  return result;
}

CUresult Graphs::add(Stream& stream, const Make& make) {
  if (stream.capture != nullptr) {
    Capture& capture = *stream.capture;
    if (capture.invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    std::vector<size_t>& leaves = capture.leaves[&stream];
    capture.graph.nodes.push_back({make, capture.lanes[&stream], leaves});
    leaves = {capture.graph.nodes.size() - 1};
    return CUDA_SUCCESS;
  }
  // The legacy stream would wait for the captured ones.
  for (const auto& capture : captures_) {
    for (const auto& [other, lane] : capture->lanes) {
      const bool ordered = stream.legacy && other->blocking && other->device == stream.device;
      if (capture->active && ordered) return spoil(*capture, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    }
  }
  world().enqueue(stream, make());
  return CUDA_SUCCESS;
}

CUresult Graphs::record(Stream& stream, Event& event) {
  if (stream.capture != nullptr) {
    if (stream.capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    event.capture = stream.capture;
    event.nodes = stream.capture->leaves[&stream];
    return CUDA_SUCCESS;
  }
  Operation operation;
  operation.what = "cuEventRecord";
  operation.record = std::make_shared<Record>();
  const CUresult result = add(stream, [&operation] { return operation; });
  if (result != CUDA_SUCCESS) return result;
  event.record = operation.record;
  event.capture = nullptr;
  return CUDA_SUCCESS;
}

CUresult Graphs::wait(Stream& stream, Event& event) {
  if (event.capture != nullptr) {
    const std::shared_ptr<Capture> capture = event.capture;
    if (!capture->active) return CUDA_ERROR_CAPTURED_EVENT;
    if (capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (stream.legacy) return spoil(*capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    if (stream.capture != nullptr && stream.capture != capture) {
      spoil(*stream.capture, CUDA_SUCCESS);
      return spoil(*capture, CUDA_ERROR_STREAM_CAPTURE_MERGE);
    }
    if (stream.capture == nullptr) {
      stream.capture = capture;
      enter(*capture, stream);
    }
    join(capture->leaves[&stream], event.nodes);
    return CUDA_SUCCESS;
  }
  if (event.record == nullptr) {
    world().reports.add(Finding::never_recorded, "cuStreamWaitEvent");
    return CUDA_SUCCESS;
  }
  if (stream.capture != nullptr) return spoil(*stream.capture, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
  Operation operation;
  operation.what = "cuStreamWaitEvent";
  operation.waits.push_back(event.record);
  return add(stream, [&operation] { return operation; });
}

CUresult Graphs::begin(Stream& stream, int mode) {
  if (stream.legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (stream.capture != nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  auto capture = std::make_shared<Capture>();
  capture->origin = &stream;
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  enter(*capture, stream);
  stream.capture = capture;
  captures_.push_back(std::move(capture));
  return CUDA_SUCCESS;
}

CUresult Graphs::end(Stream& stream, Graph*& graph) {
  graph = nullptr;
  const std::shared_ptr<Capture> capture = stream.capture;
  if (capture == nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  const bool relaxed = capture->mode == CU_STREAM_CAPTURE_MODE_RELAXED;
  if (capture->origin != &stream) return spoil(*capture, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
  if (!relaxed && capture->thread != std::this_thread::get_id())
    return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
  for (const auto& [each, lane] : capture->lanes) each->capture = nullptr;
  capture->active = false;
  if (capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (!joined(*capture)) return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
  graphs_.push_back(capture->graph);
  graph = &graphs_.back();
  return CUDA_SUCCESS;
}

CUresult Graphs::unsafe() {
  const auto self = std::this_thread::get_id();
  for (const auto& capture : captures_) {
    const bool mine = capture->thread == self && capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED;
    if (capture->active && (mine || capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL)) {
      return spoil(*capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
  }
  return CUDA_SUCCESS;
}

Graph* Graphs::find(void* handle) {
  for (Graph& each : graphs_) {
    if (&each == handle && each.live) return &each;
  }
  world().reports.add(Finding::stranger, "a graph that is none, or was destroyed");
  return nullptr;
}

Executable* Graphs::executable(void* handle) {
  for (Executable& each : executables_) {
    if (&each == handle && each.live) return &each;
  }
  world().reports.add(Finding::stranger, "an executable graph that is none, or was destroyed");
  return nullptr;
}

Executable* Graphs::instantiate(const Graph& graph) {
  executables_.push_back({graph, {}, nullptr, true});
  for (int device : graph.devices)
    executables_.back().lanes.push_back(world().make_stream(device, false, true));
  return &executables_.back();
}

void Graphs::launch(Executable& executable, Stream& stream) {
  Operation begin;
  begin.what = "cuGraphLaunch";
  begin.record = std::make_shared<Record>();
  if (executable.last != nullptr) begin.waits.push_back(executable.last);
  const std::shared_ptr<Record> begun = begin.record;
  world().enqueue(stream, std::move(begin));
  Operation end;
  end.what = "the end of cuGraphLaunch";
  end.record = std::make_shared<Record>();
  std::vector<std::shared_ptr<Record>> records;
  for (const Node& node : executable.graph.nodes) {
    Operation operation = node.make();
    if (operation.record == nullptr) operation.record = std::make_shared<Record>();
    operation.waits.push_back(begun);
    for (size_t before : node.after) operation.waits.push_back(records[before]);
    records.push_back(operation.record);
    end.waits.push_back(operation.record);
    world().enqueue(*executable.lanes[node.lane], std::move(operation));
  }
  executable.last = end.record;
  world().enqueue(stream, std::move(end));
}

hybridcomm::gpu::CUresult submit(hybridcomm::gpu::CUstream handle, const Make& make) {
  if (!on_a_device()) return CUDA_ERROR_INVALID_CONTEXT;
  Stream* stream = world().stream(handle);
  return stream == nullptr ? CUDA_ERROR_INVALID_HANDLE : graphs().add(*stream, make);
}

}  // namespace sim

using sim::broken;
using sim::graphs;
using sim::locked;
using sim::world;
using namespace hybridcomm::gpu;

EXPORT CUresult cuStreamIsCapturing(CUstream handle, int32_t* status) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  const sim::Stream* stream = world().stream(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  *status = stream->capture == nullptr ? CU_STREAM_CAPTURE_STATUS_NONE
            : stream->capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                       : CU_STREAM_CAPTURE_STATUS_ACTIVE;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamBeginCapture_v2(CUstream handle, int32_t mode) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  sim::Stream* stream = world().stream(handle);
  return stream == nullptr ? CUDA_ERROR_INVALID_HANDLE : graphs().begin(*stream, mode);
}
EXPORT CUresult cuStreamEndCapture(CUstream handle, CUgraph* to) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  sim::Stream* stream = world().stream(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  sim::Graph* graph = nullptr;
  const CUresult result = graphs().end(*stream, graph);
  *to = reinterpret_cast<CUgraph>(graph);
  return result;
}
EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec* to, CUgraph handle, unsigned long long) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  const sim::Graph* graph = graphs().find(handle);
  if (graph == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  *to = reinterpret_cast<CUgraphExec>(graphs().instantiate(*graph));
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphLaunch(CUgraphExec handle, CUstream to) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  sim::Executable* executable = graphs().executable(handle);
  sim::Stream* stream = world().stream(to);
  if (executable == nullptr || stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture != nullptr) {  // a graph in a graph: nobody makes one
    return graphs().spoil(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  }
  graphs().launch(*executable, *stream);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphDestroy(CUgraph handle) {
  const auto lock = locked();
  sim::Graph* graph = graphs().find(handle);
  if (graph == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  graph->live = false;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphExecDestroy(CUgraphExec handle) {
  const auto lock = locked();
  sim::Executable* executable = graphs().executable(handle);
  if (executable == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  executable->live = false;
  return CUDA_SUCCESS;
}
