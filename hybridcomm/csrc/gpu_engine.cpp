#include "gpu_engine.h"

#include <algorithm>

namespace hybridcomm::gpu {
namespace {

constexpr auto kPoll = std::chrono::microseconds(50);
constexpr double kEnding = 10;                  // s that streams get to end in behind an abort
constexpr double kForever = 1e9;                // s
constexpr unsigned kUnaskedShared = 48 * 1024;  // bytes of shared memory that a block gets without asking

template <class Library>
Library of_device(Library library, int device) {
  library.device = device;
  return library;
}

}  // namespace

GpuEngine::GpuEngine(Cuda cuda, Nccl nccl, const GpuConfig& config, std::function<void()> interrupted,
                     HostSide host)
    : cuda_(std::make_shared<const Cuda>(of_device(std::move(cuda), config.device))),
      nccl_(std::make_shared<const Nccl>(of_device(std::move(nccl), config.device))),
      config_(config),
      interrupted_(std::move(interrupted)),
      host_(std::move(host)),
      comms_(*nccl_, config.timeout_s, config.copy_engines, interrupted_),
      pool_(std::make_shared<EventPool>(cuda_)) {
  const int count = cuda_->device_count();
  if (config_.device < 0 || config_.device >= count) {
    throw Error(Code::invalid, "device " + std::to_string(config_.device) + ": CUDA shows " +
                                   std::to_string(count) + " here; see nvidia-smi and CUDA_VISIBLE_DEVICES");
  }
  cuda_->check(cuda_->cuDeviceGet(&device_, config_.device), "cuDeviceGet");
  cuda_->check(cuda_->cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain");
  make_current();
  for (int i = 0; i < config_.streams; ++i) {
    CUstream stream = nullptr;
    cuda_->check(cuda_->cuStreamCreateWithPriority(&stream, CU_STREAM_NON_BLOCKING, -1),
                 "cuStreamCreateWithPriority");
    streams_.push_back(stream);
  }
  if (config_.watch_s > 0) watchdog_ = std::thread([this] { watch(); });
}

GpuEngine::~GpuEngine() {
  try {
    close();
  } catch (const std::exception&) {
    // Who wants to hear of it calls close() himself.
  }
  if (context_ != nullptr) cuda_->cuDevicePrimaryCtxRelease_v2(device_);
}

void GpuEngine::make_current() const { cuda_->check(cuda_->cuCtxSetCurrent(context_), "cuCtxSetCurrent"); }

int GpuEngine::compute_capability() const {
  int major = 0, minor = 0;
  cuda_->check(cuda_->cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device_),
               "cuDeviceGetAttribute");
  cuda_->check(cuda_->cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device_),
               "cuDeviceGetAttribute");
  return 10 * major + minor;
}

int GpuEngine::load(const std::string& image, const std::string& symbol, unsigned shared_nbytes) {
  const std::lock_guard lock(issuing_);
  const auto key = std::make_pair(image, symbol);
  const auto found = loaded_.find(key);
  if (found != loaded_.end()) return found->second;
  make_current();
  CUmodule module = nullptr;
  CUfunction function = nullptr;
  cuda_->check(cuda_->cuModuleLoadData(&module, image.data()), "cuModuleLoadData");
  modules_.push_back(module);
  cuda_->check(cuda_->cuModuleGetFunction(&function, module, symbol.c_str()), "cuModuleGetFunction");
  if (shared_nbytes > kUnaskedShared) {
    cuda_->check(cuda_->cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                           static_cast<int>(shared_nbytes)),
                 "cuFuncSetAttribute");
  }
  functions_.push_back(function);
  return loaded_[key] = static_cast<int>(functions_.size()) - 1;
}

void GpuEngine::check() const {
  const std::lock_guard lock(mutex_);
  if (failure_ != nullptr) std::rethrow_exception(failure_);
  if (closed_) throw Error(Code::aborted, "the GPU engine is closed: its context has ended");
}

bool GpuEngine::poll(GpuWork& work) const {
  if (work.over_ || work.captured_) return work.over_;
  for (const size_t end : work.program_->ends) {
    const CUresult result = cuda_->cuEventQuery(work.events_.at(end).get());
    if (result == CUDA_ERROR_NOT_READY) return false;
    cuda_->check(result, "cuEventQuery");
  }
  return work.over_ = true;
}

bool GpuEngine::done(GpuWork& work) try {
  const std::lock_guard lock(issuing_);
  check();
  make_current();
  if (in_capture()) return work.over_;  // asking for an event would break the capture
  return work.issued_ && ended(work);
} catch (const DeviceError& error) {
  fail_if_lost(error);
  throw;
}

// An abort ends what is stuck: an end counts where nothing had failed by then.
bool GpuEngine::ended(GpuWork& work) const {
  if (!poll(work)) return false;
  check();
  return true;
}

bool GpuEngine::synchronize(const std::shared_ptr<GpuWork>& work, double limit_s) try {
  if (work->captured_) throw Error(Code::invalid, "a captured collective is run by its graph: wait for that");
  const auto limit = hybridcomm::Clock::now() + seconds(std::min(limit_s, config_.timeout_s));
  while (true) {
    {
      const std::lock_guard lock(issuing_);
      check();
      make_current();
      finish_issue(work);
      if (ended(*work)) return true;
    }
    if (hybridcomm::Clock::now() > limit) break;
    interrupted_();
    std::this_thread::sleep_for(kPoll);
  }
  if (limit_s < config_.timeout_s) return false;
  fail(std::make_exception_ptr(Error(Code::stall, work->program_->name + ": not done on the device after " +
                                                      std::to_string(config_.timeout_s) +
                                                      " s; a rank did not come to it, or its link is down")));
  check();
  return false;
} catch (const DeviceError& error) {
  fail_if_lost(error);
  throw;
}

void GpuEngine::drain() {
  std::deque<std::shared_ptr<GpuWork>> running;
  {
    const std::lock_guard lock(mutex_);
    running = running_;
  }
  for (const auto& work : running) {
    if (!work->captured_) synchronize(work, kForever);
  }
}

// Behind an abort what was queued runs on, and memory that it touches must not go before.
void GpuEngine::let_streams_end() const {
  const auto limit = hybridcomm::Clock::now() + seconds(kEnding);
  for (CUstream stream : streams_) {
    while (cuda_->cuStreamQuery(stream) == CUDA_ERROR_NOT_READY && hybridcomm::Clock::now() < limit) {
      std::this_thread::sleep_for(kPoll);
    }
  }
}

void GpuEngine::close() {
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return;
  }
  std::exception_ptr failure;
  bool failed = false;
  {
    const std::lock_guard lock(mutex_);
    failed = failure_ != nullptr;  // who called has heard of it
  }
  try {
    if (!failed) drain();
  } catch (...) {
    failure = std::current_exception();
  }
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }
  if (watchdog_.joinable()) watchdog_.join();
  const std::lock_guard lock(issuing_);
  make_current();
  try {
    if (failed || failure) {
      comms_.abort();
      let_streams_end();
    } else {
      comms_.close();
    }
  } catch (...) {
    failure = std::current_exception();
  }
  running_.clear();
  pending_.reset();
  for (CUmodule module : modules_) cuda_->cuModuleUnload(module);
  for (CUstream stream : streams_) cuda_->cuStreamDestroy_v2(stream);
  modules_.clear();
  streams_.clear();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace hybridcomm::gpu
