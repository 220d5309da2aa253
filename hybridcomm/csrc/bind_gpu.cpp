// The GPU engine for Python: what is enqueued, and on which stream; no call here holds the interpreter's lock.
#include <pybind11/stl.h>

#include <memory>

#include "bindings.h"
#include "engine.h"
#include "gpu_engine.h"
#include "gpu_memory.h"
#include "signals.h"

namespace py = pybind11;

namespace hybridcomm {
namespace {

using namespace gpu;

CUstream stream_at(uintptr_t handle) { return reinterpret_cast<CUstream>(handle); }

// What CUDA is asked to give back may wait for another thread, which may wait for the interpreter's lock.
template <class T>
struct WithoutGil {
  void operator()(T* object) const {
    if (PyGILState_Check() == 1) {
      const py::gil_scoped_release no_gil;
      delete object;
    } else {
      delete object;
    }
  }
};

const Search kCuda = {
    "CUDA's driver",   "libcuda.so",
    "HYBRIDCOMM_CUDA", {},
    "libcuda.so.1",    "install NVIDIA's driver, or name its libcuda.so by HYBRIDCOMM_CUDA"};

Search nccl_search(std::vector<std::string> files) {
  return {"NCCL",
          "libnccl.so",
          "HYBRIDCOMM_NCCL",
          std::move(files),
          "libnccl.so.2",
          "pip install hybridcomm[cuda12] or [cuda13], or name a libnccl.so by HYBRIDCOMM_NCCL"};
}

std::shared_ptr<GpuEngine> make_gpu_engine(int device, int streams, double timeout_s, double watch_s,
                                           std::vector<std::string> nccl_files,
                                           const std::shared_ptr<Engine>& host, bool copy_engines) {
  const py::gil_scoped_release no_gil;
  Cuda cuda = Cuda::load(SharedLibrary::open(kCuda));
  Nccl nccl = Nccl::load(SharedLibrary::open(nccl_search(std::move(nccl_files))));
  HostSide side{[] {}, [] { return std::optional<Error>(); }};
  // Peers that wait for this rank on the host hear of it, too, and this rank of them.
  if (host != nullptr) side = {[host] { host->abort(); }, [host] { return host->listen(); }};
  return std::shared_ptr<GpuEngine>(
      new GpuEngine(std::move(cuda), std::move(nccl),
                    GpuConfig{device, streams, timeout_s, watch_s, copy_engines}, raise_pending_signals,
                    std::move(side)),
      WithoutGil<GpuEngine>());
}

DeviceOp make_op(DeviceKind kind, int stream, uint32_t step, std::vector<int> after, int group,
                 CUdeviceptr from, CUdeviceptr to, size_t count, int comm, int peer, int32_t dtype,
                 int32_t op, uint32_t divisor, uint8_t value, std::optional<double> factor) {
  DeviceOp made;
  made.kind = kind;
  made.stream = stream;
  made.step = step;
  made.after = std::move(after);
  made.group = group;
  made.from = from;
  made.to = to;
  made.count = count;
  made.comm = comm;
  made.peer = peer;
  made.dtype = dtype;
  made.op = op;
  made.divisor = divisor;
  made.value = value;
  made.factor = factor;
  return made;
}

DeviceOp make_launch(int stream, uint32_t step, std::vector<int> after, int function, unsigned blocks,
                     unsigned threads, unsigned shared_nbytes, const py::bytes& arguments) {
  DeviceOp made;
  made.kind = DeviceKind::launch;
  made.stream = stream;
  made.step = step;
  made.after = std::move(after);
  made.function = function;
  made.blocks = blocks;
  made.threads = threads;
  made.shared_nbytes = shared_nbytes;
  const std::string_view bytes = arguments;
  made.arguments.assign(bytes.begin(), bytes.end());
  return made;
}

void bind_programs(py::module_& module) {
  py::enum_<DeviceKind>(module, "DeviceKind")
      .value("launch", DeviceKind::launch)
      .value("copy", DeviceKind::copy)
      .value("fill", DeviceKind::fill)
      .value("all_reduce", DeviceKind::all_reduce)
      .value("reduce", DeviceKind::reduce)
      .value("reduce_scatter", DeviceKind::reduce_scatter)
      .value("all_gather", DeviceKind::all_gather)
      .value("broadcast", DeviceKind::broadcast)
      .value("all_to_all", DeviceKind::all_to_all)
      .value("send", DeviceKind::send)
      .value("receive", DeviceKind::receive);
  module.attr("DEVICE_START") = kStart;
  py::class_<DeviceOp>(module, "DeviceOp");
  module.def("device_op", &make_op, py::arg("kind"), py::kw_only(), py::arg("stream"), py::arg("step"),
             py::arg("after"), py::arg("group") = kNoGroup, py::arg("source") = 0, py::arg("target") = 0,
             py::arg("count") = 0, py::arg("comm") = -1, py::arg("peer") = -1,
             py::arg("dtype") = static_cast<int32_t>(ncclFloat32),
             py::arg("op") = static_cast<int32_t>(ncclSum), py::arg("divisor") = 1, py::arg("value") = 0,
             py::arg("factor") = py::none());
  module.def("device_launch", &make_launch, py::kw_only(), py::arg("stream"), py::arg("step"),
             py::arg("after"), py::arg("function"), py::arg("blocks"), py::arg("threads"),
             py::arg("shared_nbytes"), py::arg("arguments"));
  py::class_<DeviceProgram, std::shared_ptr<DeviceProgram>>(module, "DeviceProgram")
      .def(py::init([](uint64_t digest, std::string name, std::vector<DeviceOp> ops, size_t tail,
                       const std::vector<std::pair<CUdeviceptr, CUdeviceptr>>& memory) {
             std::vector<DeviceRange> ranges;
             for (const auto& [begin, end] : memory) ranges.push_back({begin, end});
             return std::make_shared<DeviceProgram>(digest, std::move(name), std::move(ops), tail,
                                                    std::move(ranges));
           }),
           py::kw_only(), py::arg("digest"), py::arg("name"), py::arg("ops"), py::arg("tail"),
           py::arg("memory"));
}

void bind_communicators(py::class_<GpuEngine, std::shared_ptr<GpuEngine>>& engine) {
  engine.def("unique_id", [](GpuEngine& gpu) { return py::bytes(gpu.comms().unique_id()); })
      .def(
          "join",
          [](GpuEngine& gpu, const py::bytes& unique_ids, int rank, int size) {
            const std::string ids = unique_ids;
            const py::gil_scoped_release no_gil;
            gpu.make_current();
            return gpu.comms().join(ids, rank, size);
          },
          py::arg("unique_ids"), py::arg("rank"), py::arg("size"))
      .def(
          "split",
          [](GpuEngine& gpu, int parent, std::optional<int> color, int key) {
            const py::gil_scoped_release no_gil;
            gpu.make_current();
            return gpu.comms().split(parent, color.value_or(kNcclNoColor), key);
          },
          py::arg("parent"), py::arg("color"), py::arg("key"));
}

// Tried before what `bind_errors` has for all errors.
void bind_device_error() {
  py::register_local_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const DeviceError& error) {
      const py::object type = py::module_::import("hybridcomm.errors").attr("DeviceError");
      const py::object made = type(error.what(), py::arg("call") = error.call, py::arg("name") = error.name,
                                   py::arg("code") = error.result, py::arg("device") = error.device,
                                   py::arg("lost") = error.lost);
      PyErr_SetObject(type.ptr(), made.ptr());
    }
  });
}

}  // namespace

void bind_gpu(py::module_& module) {
  bind_device_error();
  bind_programs(module);
  py::class_<GpuWork, std::shared_ptr<GpuWork>>(module, "GpuWork")
      .def_property_readonly("captured", &GpuWork::captured);
  py::class_<GpuMemory, std::unique_ptr<GpuMemory, WithoutGil<GpuMemory>>>(module, "GpuMemory")
      .def_property_readonly("address", &GpuMemory::address)
      .def_property_readonly("nbytes", &GpuMemory::nbytes)
      .def_property_readonly("windows", &GpuMemory::windows);
  py::class_<GpuEngine, std::shared_ptr<GpuEngine>> engine(module, "GpuEngine");
  engine
      .def(py::init(&make_gpu_engine), py::kw_only(), py::arg("device"), py::arg("streams"),
           py::arg("timeout_s"), py::arg("watch_s"), py::arg("nccl_files"), py::arg("host"),
           py::arg("copy_engines") = false)
      .def_property_readonly("cuda_version", [](const GpuEngine& gpu) { return gpu.cuda().version; })
      .def_property_readonly("nccl_version", [](const GpuEngine& gpu) { return gpu.nccl().version; })
      .def_property_readonly("cuda_path", [](const GpuEngine& gpu) { return gpu.cuda().path; })
      .def_property_readonly("nccl_path", [](const GpuEngine& gpu) { return gpu.nccl().path; })
      .def_property_readonly("newer", [](const GpuEngine& gpu) { return gpu.nccl().newer(); })
      .def_property_readonly("copy_engines", &GpuEngine::copy_engines)
      .def_property_readonly("compute_capability", &GpuEngine::compute_capability)
      .def(
          "load",
          [](GpuEngine& gpu, const py::bytes& image, const std::string& symbol, unsigned shared_nbytes) {
            const std::string data = image;
            const py::gil_scoped_release no_gil;
            return gpu.load(data, symbol, shared_nbytes);
          },
          py::arg("image"), py::arg("symbol"), py::arg("shared_nbytes"))
      .def(
          "capturing",
          [](const GpuEngine& gpu, uintptr_t stream) {
            const py::gil_scoped_release no_gil;
            gpu.make_current();
            return gpu.capturing(stream_at(stream));
          },
          py::arg("stream"))
      .def(
          "start",
          [](GpuEngine& gpu, std::shared_ptr<DeviceProgram> program, uintptr_t producer) {
            const py::gil_scoped_release no_gil;
            return gpu.start(std::move(program), stream_at(producer));
          },
          py::arg("program"), py::arg("producer"))
      .def(
          "wait",
          [](GpuEngine& gpu, const std::shared_ptr<GpuWork>& work, uintptr_t consumer) {
            const py::gil_scoped_release no_gil;
            gpu.wait(work, stream_at(consumer));
          },
          py::arg("work"), py::arg("consumer"))
      .def("synchronize", &GpuEngine::synchronize, py::arg("work"), py::arg("limit_s"),
           py::call_guard<py::gil_scoped_release>())
      .def("done", &GpuEngine::done, py::arg("work"), py::call_guard<py::gil_scoped_release>())
      .def(
          "allocate",
          [](const std::shared_ptr<GpuEngine>& gpu, size_t nbytes, const std::vector<int>& windows) {
            return std::unique_ptr<GpuMemory, WithoutGil<GpuMemory>>(new GpuMemory(gpu, nbytes, windows));
          },
          py::arg("nbytes"), py::arg("windows") = std::vector<int>(),
          py::call_guard<py::gil_scoped_release>())
      .def(
          "fail",
          [](GpuEngine& gpu, const std::string& why) {
            gpu.fail(std::make_exception_ptr(Error(Code::aborted, why)));
          },
          py::arg("why"), py::call_guard<py::gil_scoped_release>())
      .def("check", &GpuEngine::check, py::call_guard<py::gil_scoped_release>())
      .def("close", &GpuEngine::close, py::call_guard<py::gil_scoped_release>());
  bind_communicators(engine);
}

}  // namespace hybridcomm
