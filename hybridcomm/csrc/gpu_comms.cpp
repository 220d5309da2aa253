#include "gpu_comms.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

namespace hybridcomm::gpu {
namespace {

constexpr auto kPoll = std::chrono::microseconds(50);

constexpr size_t kReductions = 256;  // that are kept

#include "half_impl.h"

// A factor in the element type's own bits, which NCCL reads from the host.
struct Factor {
  alignas(8) unsigned char bytes[8] = {};
};

template <class T>
Factor as_bits(T value) {
  Factor factor;
  std::memcpy(factor.bytes, &value, sizeof value);
  return factor;
}

Factor factor_of(double value, int32_t dtype) {
  switch (dtype) {
    case ncclFloat64:
      return as_bits(value);
    case ncclFloat32:
      return as_bits(static_cast<float>(value));
    case ncclFloat16:
      return as_bits(narrow_fp16(static_cast<float>(value)));
    case ncclBfloat16:
      return as_bits(narrow_bf16(static_cast<float>(value)));
    case ncclInt64:
    case ncclUint64:
      return as_bits(static_cast<int64_t>(value));
    case ncclInt32:
    case ncclUint32:
      return as_bits(static_cast<uint32_t>(static_cast<int64_t>(value)));
    default:
      return as_bits(static_cast<uint8_t>(static_cast<int64_t>(value)));
  }
}

}  // namespace

Comms::Comms(const Nccl& nccl, double timeout_s, bool copy_engines, std::function<void()> interrupted)
    : nccl_(nccl), timeout_s_(timeout_s), copy_engines_(copy_engines), interrupted_(std::move(interrupted)) {
  if (copy_engines_ && nccl_.version < kNcclCtaPolicyZeroSince) {
    throw Error(Code::invalid, "copy_engines=True (or HYBRIDCOMM_COPY_ENGINES=1): NCCL " +
                                   std::to_string(nccl_.version) +
                                   " cannot leave collectives to them, 2.28.3 can: install a newer one, such "
                                   "as by pip install -U nvidia-nccl-cu12, or leave it out");
  }
}

Comms::~Comms() { abort(); }

ncclConfig_t Comms::config() const {
  ncclConfig_t config;
  config.blocking = 0;
  config.version = static_cast<unsigned>(nccl_.version);
  if (copy_engines_) config.CTAPolicy = kNcclCtaPolicyZero;
  return config;
}

std::string Comms::words(ncclComm_t comm, ncclResult_t result) const {
  const char* last = comm == nullptr ? nullptr : nccl_.ncclGetLastError(comm);
  const std::string more = last == nullptr || *last == '\0' ? "" : std::string(": ") + last;
  return nccl_.ncclGetErrorString(result) + more;
}

std::exception_ptr Comms::failure(ncclComm_t comm, ncclResult_t result, const char* call,
                                  Code otherwise) const {
  const std::string why = words(comm, result);
  if (result == ncclUnhandledCudaError) return std::make_exception_ptr(nccl_.cuda_failed(call, result, why));
  if (result == ncclRemoteError || result == ncclSystemError) otherwise = Code::peer_lost;
  if (result == ncclInternalError) otherwise = Code::aborted;
  return std::make_exception_ptr(Error(otherwise, std::string(call) + ": " + why));
}

void Comms::fail(ncclComm_t comm, ncclResult_t result, const char* call) const {
  std::rethrow_exception(failure(comm, result, call, Code::invalid));
}

std::string Comms::unique_id() const {
  ncclUniqueId id;
  const ncclResult_t result = nccl_.ncclGetUniqueId(&id);
  if (result != ncclSuccess) fail(nullptr, result, "ncclGetUniqueId");
  return {id.internal, sizeof id.internal};
}

int Comms::add(ncclComm_t comm) {
  const std::lock_guard lock(mutex_);
  comms_.push_back(comm);
  return static_cast<int>(comms_.size()) - 1;
}

int Comms::join(const std::string& unique_ids, int rank, int size) {
  const size_t count = unique_ids.size() / sizeof(ncclUniqueId);
  if (count == 0 || unique_ids.size() % sizeof(ncclUniqueId) != 0)
    throw Error(Code::invalid, "unique_ids: 128 bytes are wanted for each");
  if (count > 1 && nccl_.ncclCommInitRankScalable == nullptr)
    throw Error(Code::invalid, "unique_ids: this NCCL takes one alone; 2.23.4 takes several");
  std::vector<ncclUniqueId> ids(count);
  for (size_t i = 0; i < count; ++i)
    unique_ids.copy(ids[i].internal, sizeof(ncclUniqueId), i * sizeof(ncclUniqueId));
  ncclConfig_t wanted = config();
  ncclComm_t comm = nullptr;
  const char* call = count == 1 ? "ncclCommInitRankConfig" : "ncclCommInitRankScalable";
  const ncclResult_t result =
      count == 1
          ? nccl_.ncclCommInitRankConfig(&comm, size, ids[0], rank, &wanted)
          : nccl_.ncclCommInitRankScalable(&comm, size, rank, static_cast<int>(count), ids.data(), &wanted);
  if (comm == nullptr) fail(nullptr, result, call);
  const int index = add(comm);  // first, so that an abort finds it
  settle(comm, result, call);
  return index;
}

int Comms::split(int parent, int color, int key) {
  ncclConfig_t wanted = config();
  ncclComm_t comm = nullptr;
  const ncclResult_t result = nccl_.ncclCommSplit(at(parent), color, key, &comm, &wanted);
  settle(at(parent), result, "ncclCommSplit");
  if (color == kNcclNoColor) return -1;
  if (comm == nullptr) fail(at(parent), ncclInternalError, "ncclCommSplit");
  const int index = add(comm);
  settle(comm, ncclInProgress, "ncclCommSplit");
  return index;
}

ncclRedOp_t Comms::mean_of(int comm, int32_t dtype, uint32_t divisor) {
  if (divisor == 1) return ncclSum;
  if (dtype < ncclFloat16)
    throw Error(Code::invalid, "a mean of integers: sum them, and divide by the world size");
  return scaled_sum(comm, dtype, 1.0 / divisor);
}

ncclRedOp_t Comms::scaled_sum(int comm, int32_t dtype, double factor) {
  uint64_t bits = 0;  // which are ordered, as factors that are no numbers are not
  std::memcpy(&bits, &factor, sizeof bits);
  const auto key = std::make_tuple(comm, dtype, bits);
  const auto found = reductions_.find(key);
  if (found != reductions_.end()) return found->second;
  Factor scalar = factor_of(factor, dtype);
  ncclRedOp_t op = ncclSum;
  const ncclResult_t result =
      nccl_.ncclRedOpCreatePreMulSum(&op, scalar.bytes, dtype, ncclScalarHostImmediate, at(comm));
  settle(at(comm), result, "ncclRedOpCreatePreMulSum");
  return reductions_[key] = op;
}

void Comms::trim_reductions() {
  if (reductions_.size() <= kReductions) return;
  const auto held = hold();
  for (const auto& [key, op] : reductions_) nccl_.ncclRedOpDestroy(op, at(std::get<0>(key)));
  reductions_.clear();
}

void Comms::settle(int comm, ncclResult_t result, const char* call) { settle(at(comm), result, call); }

// What it asks, and what it says of a failure, is under the lock of abort(): a communicator that is gone must not be asked.
void Comms::settle(ncclComm_t comm, ncclResult_t result, const char* call) {
  const auto limit = hybridcomm::Clock::now() + seconds(timeout_s_);
  while (result != ncclSuccess) {
    {
      const std::lock_guard lock(mutex_);
      if (aborted_) throw Error(Code::aborted, std::string(call) + ": the communicators were aborted");
      if (result == ncclInProgress) {
        const ncclResult_t asked = nccl_.ncclCommGetAsyncError(comm, &result);
        if (asked != ncclSuccess) result = asked;
      }
      if (result == ncclSuccess) return;
      if (result != ncclInProgress) fail(comm, result, call);
    }
    if (hybridcomm::Clock::now() > limit) {
      throw Error(Code::stall,
                  std::string(call) + ": not done after " + std::to_string(timeout_s_) +
                      " s; is every rank there, and does NCCL_SOCKET_IFNAME name the right network?");
    }
    interrupted_();
    std::this_thread::sleep_for(kPoll);
  }
}

std::unique_lock<std::mutex> Comms::hold() const {
  std::unique_lock lock(mutex_);
  if (aborted_) throw Error(Code::aborted, "the communicators were aborted");
  return lock;
}

void Comms::check(int comm, ncclResult_t result, const char* call) const {
  if (result != ncclSuccess && result != ncclInProgress) fail(at(comm), result, call);
}

NcclGroup::NcclGroup(const Nccl& nccl, bool wanted) : nccl_(nccl), open_(wanted) {
  if (wanted && nccl_.ncclGroupStart() != ncclSuccess)
    throw Error(Code::invalid, "ncclGroupStart has failed");
}

NcclGroup::~NcclGroup() {
  if (open_) nccl_.ncclGroupEnd();
}

ncclResult_t NcclGroup::end() { return std::exchange(open_, false) ? nccl_.ncclGroupEnd() : ncclSuccess; }

std::exception_ptr Comms::async_error() {
  const std::lock_guard lock(mutex_);
  if (aborted_) return nullptr;
  for (ncclComm_t comm : comms_) {
    ncclResult_t state = ncclSuccess;
    const ncclResult_t asked = nccl_.ncclCommGetAsyncError(comm, &state);
    const ncclResult_t result = asked != ncclSuccess ? asked : state;
    if (result == ncclSuccess || result == ncclInProgress) continue;
    return failure(comm, result, "NCCL in the background", Code::aborted);
  }
  return nullptr;
}

void Comms::abort() {
  const std::lock_guard lock(mutex_);
  if (aborted_.exchange(true)) return;
  for (ncclComm_t comm : comms_) nccl_.ncclCommAbort(comm);
}

void Comms::close() {
  std::vector<ncclComm_t> comms;
  {
    const std::lock_guard lock(mutex_);
    if (aborted_) return;
    comms = comms_;
  }
  for (const auto& [comm, handle] : registered_) nccl_.ncclCommDeregister(at(comm), handle);
  registered_.clear();
  for (const auto& [comm, window] : windows_) {
    if (window != nullptr) nccl_.ncclCommWindowDeregister(at(comm), window);
  }
  windows_.clear();
  for (const auto& [key, op] : reductions_) nccl_.ncclRedOpDestroy(op, at(std::get<0>(key)));
  reductions_.clear();
  for (auto comm = comms.rbegin(); comm != comms.rend(); ++comm) {  // children first
    settle(*comm, nccl_.ncclCommFinalize(*comm), "ncclCommFinalize");
  }
  const std::lock_guard lock(mutex_);
  if (aborted_.exchange(true)) return;
  for (auto comm = comms.rbegin(); comm != comms.rend(); ++comm) nccl_.ncclCommDestroy(*comm);
  comms_.clear();
}

void* Comms::register_buffer(int comm, void* data, size_t nbytes) {
  void* handle = nullptr;
  if (nccl_.ncclCommRegister == nullptr) return nullptr;
  ncclResult_t result = ncclSuccess;
  {
    const auto held = hold();
    result = nccl_.ncclCommRegister(at(comm), data, nbytes, &handle);
    if (handle != nullptr) registered_.emplace_back(comm, handle);
  }
  settle(comm, result, "ncclCommRegister");
  return handle;
}

void Comms::deregister_buffer(int comm, void* handle) {
  const std::lock_guard lock(mutex_);
  const auto found = std::find(registered_.begin(), registered_.end(), std::make_pair(comm, handle));
  if (aborted_ || found == registered_.end()) return;  // whoever has said goodbye did it
  nccl_.ncclCommDeregister(at(comm), handle);
  registered_.erase(found);
}

ncclWindow_t Comms::register_window(int comm, void* data, size_t nbytes) {
  if (nccl_.ncclCommWindowRegister == nullptr) return nullptr;
  ncclResult_t result = ncclSuccess;
  auto made = windows_.end();
  {
    const auto held = hold();
    made = windows_.emplace(windows_.end(), comm, nullptr);
    result = nccl_.ncclCommWindowRegister(at(comm), data, nbytes, &made->second, kNcclWindowSymmetric);
  }
  settle(comm, result, "ncclCommWindowRegister");
  const std::lock_guard lock(mutex_);
  const ncclWindow_t window = made->second;
  if (window == nullptr) windows_.erase(made);
  return window;
}

void Comms::deregister_window(int comm, ncclWindow_t window) {
  const std::lock_guard lock(mutex_);
  const auto found = std::find(windows_.begin(), windows_.end(), std::make_pair(comm, window));
  if (aborted_ || found == windows_.end()) return;
  nccl_.ncclCommWindowDeregister(at(comm), window);
  windows_.erase(found);
}

}  // namespace hybridcomm::gpu
