// Stream capture and graphs (CUDA C++ Programming Guide, "Creating a graph using stream capture").
//
// What is enqueued on a captured stream becomes a node behind the stream's last ones. Other streams join by waiting for an
// event that was recorded in the capture, and have to be joined back to the first before it ends. A launch enqueues all
// nodes anew on streams of the graph's own, one per captured stream; launches of one executable graph follow each other.
#pragma once

#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "gpu_cuda_abi.h"
#include "world.h"

namespace sim {

struct Node {
  Make make;
  size_t lane;  // of its captured stream
  std::vector<size_t> after;
};

struct Graph {
  std::vector<Node> nodes;
  std::vector<int> devices;  // of lanes
  bool live = true;
};

struct Capture {
  Stream* origin;
  int mode;
  std::thread::id thread;
  bool active = true, invalid = false;
  Graph graph;
  std::map<Stream*, size_t> lanes;
  std::map<Stream*, std::vector<size_t>> leaves;  // the nodes that the next one comes behind
};

struct Executable {
  Graph graph;
  std::vector<Stream*> lanes;
  std::shared_ptr<Record> last;
  bool live = true;
};

class Graphs {
 public:
  Graphs();
  hybridcomm::gpu::CUresult add(Stream& stream, const Make& make);
  hybridcomm::gpu::CUresult record(Stream& stream, Event& event);
  hybridcomm::gpu::CUresult wait(Stream& stream, Event& event);
  hybridcomm::gpu::CUresult begin(Stream& stream, int mode);
  hybridcomm::gpu::CUresult end(Stream& stream, Graph*& graph);
  // A call that captures do not allow, unless they are relaxed or another thread's own.
  hybridcomm::gpu::CUresult unsafe();
  // One that waits for, or asks about, what is only captured: it spoils the capture.
  hybridcomm::gpu::CUresult spoil(Capture& capture, hybridcomm::gpu::CUresult result);

  Graph* find(void* handle);
  Executable* executable(void* handle);
  Executable* instantiate(const Graph& graph);
  void launch(Executable& executable, Stream& stream);

 private:
  std::list<std::shared_ptr<Capture>> captures_;
  std::list<Graph> graphs_;
  std::list<Executable> executables_;
};

Graphs& graphs();

}  // namespace sim
