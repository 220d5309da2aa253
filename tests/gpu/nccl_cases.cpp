// A hierarchical all-reduce of several buckets on four simulated GPUs, right or with one bug.
//
//   nccl_cases LIBRARY BUG SEED EAGER
//
// "side by side" is no bug, but a way to run it: between the nodes on another stream than in them.
// Two nodes of two: reduce-scatter in the node, all-reduce between the nodes, all-gather in the node, each bucket when its
// gradient is there, consumed when all are under way; then a ring of messages, a broadcast and a weighted sum.
#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "gpu_tables.h"

using namespace hybridcomm::gpu;

namespace {

constexpr int kRanks = 4, kLocal = 2, kBuckets = 3, kRounds = 3;
constexpr size_t kNumel = 64, kShard = kNumel / kLocal;

Cuda cuda;
Nccl nccl;
std::string bug;
bool side_by_side = false;
std::array<std::string, kRanks> outcome;

void ok(CUresult result) { cuda.check(result, "a call of CUDA"); }
void fine(ncclResult_t result) {
  if (result != ncclSuccess) throw std::string("a call of NCCL: ") + std::to_string(result);
}
void* at(CUdeviceptr pointer) { return reinterpret_cast<void*>(static_cast<uintptr_t>(pointer)); }

struct Rank {
  int rank;
  ncclComm_t world = nullptr, node = nullptr, across = nullptr;
  CUstream compute = nullptr, communicate = nullptr, second = nullptr;
  std::array<CUdeviceptr, kBuckets> gradient{}, shard{};
  std::array<CUevent, kBuckets> ready{}, done{};
  std::array<std::vector<float>, kBuckets> values{}, got{};
};

void connect(Rank& own, const ncclUniqueId& id) {
  ncclConfig_t config;
  config.blocking = bug == "used in progress" ? 0 : 1;
  const ncclResult_t joined = nccl.ncclCommInitRankConfig(&own.world, kRanks, id, own.rank, &config);
  if (bug != "used in progress") {
    fine(joined);
  } else {  // the first to join is alone
    nccl.ncclAllReduce(at(own.gradient[0]), at(own.gradient[0]), kNumel, ncclFloat32, ncclSum, own.world,
                       own.communicate);
  }
  for (ncclResult_t state = ncclInProgress; state == ncclInProgress;)
    fine(nccl.ncclCommGetAsyncError(own.world, &state));
  fine(nccl.ncclCommSplit(own.world, own.rank / kLocal, own.rank, &own.node, nullptr));
  fine(nccl.ncclCommSplit(own.world, own.rank % kLocal, own.rank, &own.across, nullptr));
}

Rank set_up(int rank, const ncclUniqueId& id) {
  Rank own;
  own.rank = rank;
  CUcontext context;
  ok(cuda.cuDevicePrimaryCtxRetain(&context, rank));
  ok(cuda.cuCtxSetCurrent(context));
  for (CUstream* stream : {&own.compute, &own.communicate, &own.second}) {
    ok(cuda.cuStreamCreateWithPriority(stream, CU_STREAM_NON_BLOCKING, 0));
  }
  for (size_t b = 0; b < kBuckets; ++b) {
    ok(cuda.cuMemAlloc_v2(&own.gradient[b], sizeof(float) * kNumel));
    own.shard[b] = own.shard[0];
    if (b == 0 || bug != "one shard for all") ok(cuda.cuMemAlloc_v2(&own.shard[b], sizeof(float) * kShard));
    ok(cuda.cuEventCreate(&own.ready[b], CU_EVENT_DISABLE_TIMING));
    ok(cuda.cuEventCreate(&own.done[b], CU_EVENT_DISABLE_TIMING));
    own.values[b].resize(kNumel);
    own.got[b].resize(kNumel);
  }
  connect(own, id);
  return own;
}

float value_of(int round, size_t bucket, int rank, size_t i) {
  return static_cast<float>(100 * round + 10 * static_cast<int>(bucket) + rank + static_cast<int>(i % 7));
}

void gather_bucket(Rank& own, size_t b, CUstream stream) {
  const size_t numel = bug == "out of bounds" ? kShard + 1 : kShard;
  fine(nccl.ncclAllGather(at(own.shard[b]), at(own.gradient[b]), numel, ncclFloat32, own.node, stream));
  ok(cuda.cuEventRecord(own.done[b], stream));
}

// Two streams by turns need a shard each.
CUstream stream_of(const Rank& own, size_t b) {
  return bug == "one shard for all" && b % 2 == 1 ? own.second : own.communicate;
}

void scatter_bucket(Rank& own, size_t b) {
  const CUstream stream = stream_of(own, b);
  if (bug != "no wait") ok(cuda.cuStreamWaitEvent(stream, own.ready[b], 0));
  const size_t count = bug == "another count" && own.rank == 2 ? kShard - 1 : kShard;
  fine(nccl.ncclReduceScatter(at(own.gradient[b]), at(own.shard[b]), count, ncclFloat32, ncclSum, own.node,
                              stream));
}

// Between the nodes on a stream of its own, ordered by events: beside the next bucket's reduce-scatter.
void sum_bucket(Rank& own, size_t b, bool last) {
  const CUstream stream = stream_of(own, b);
  const CUstream between = side_by_side ? own.second : stream;
  if (between != stream) {
    ok(cuda.cuEventRecord(own.done[b], stream));
    ok(cuda.cuStreamWaitEvent(between, own.done[b], 0));
  }
  if (!(bug == "a call left out" && own.rank == 3 && last)) {
    fine(nccl.ncclAllReduce(at(own.shard[b]), at(own.shard[b]), kShard, ncclFloat32, ncclSum, own.across,
                            between));
  }
  if (between == stream) return gather_bucket(own, b, stream);
  ok(cuda.cuEventRecord(own.done[b], between));
}

void one_round(Rank& own, int round) {
  const bool late = bug == "side by side, in NCCL's order, in two orders" && own.rank % 3 == 0;
  for (size_t j = 0; j < kBuckets; ++j) {
    const size_t b = bug == "buckets swapped" && own.rank == 1 ? kBuckets - 1 - j : j;
    for (size_t i = 0; i < kNumel; ++i) own.values[b][i] = value_of(round, b, own.rank, i);
    ok(cuda.cuMemcpyHtoDAsync_v2(own.gradient[b], own.values[b].data(), sizeof(float) * kNumel, own.compute));
    ok(cuda.cuEventRecord(own.ready[b], own.compute));
    scatter_bucket(own, b);
    if (late && j == 0) continue;
    if (late && j == 1) sum_bucket(own, 0, false);
    sum_bucket(own, b, round == kRounds - 1 && j == kBuckets - 1);
  }
  for (size_t b = 0; b < kBuckets; ++b) {
    if (side_by_side) {
      ok(cuda.cuStreamWaitEvent(own.communicate, own.done[b], 0));
      gather_bucket(own, b, own.communicate);
    }
    if (bug != "no wait back") ok(cuda.cuStreamWaitEvent(own.compute, own.done[b], 0));
    ok(cuda.cuMemcpyDtoHAsync_v2(own.got[b].data(), own.gradient[b], sizeof(float) * kNumel, own.compute));
  }
  ok(cuda.cuStreamSynchronize(own.compute));
}

bool right(const Rank& own, int round) {
  for (size_t b = 0; b < kBuckets; ++b) {
    for (size_t i = 0; i < kNumel; ++i) {
      float want = 0;
      for (int rank = 0; rank < kRanks; ++rank) want += value_of(round, b, rank, i);
      if (own.got[b][i] != want) return false;
    }
  }
  return true;
}

// Each sends its rank to the next; then all get rank 1's, and the sum of halves.
bool others(Rank& own) {
  const CUstream stream = own.communicate;
  const int next = (own.rank + 1) % kRanks, before = (own.rank + kRanks - 1) % kRanks;
  float value = static_cast<float>(own.rank), half = 0.5f;
  ok(cuda.cuMemcpyHtoDAsync_v2(own.shard[0], &value, sizeof(value), stream));
  if (bug != "messages without a group") fine(nccl.ncclGroupStart());
  fine(nccl.ncclSend(at(own.shard[0]), 1, ncclFloat32, next, own.world, stream));
  fine(nccl.ncclRecv(at(own.shard[1]), 1, ncclFloat32, before, own.world, stream));
  if (bug != "messages without a group") fine(nccl.ncclGroupEnd());
  const int root = bug == "another root" && own.rank == 3 ? 0 : 1;
  fine(nccl.ncclBroadcast(at(own.shard[0]), at(own.shard[2]), 1, ncclFloat32, root, own.world, stream));
  ncclRedOp_t halves;
  fine(nccl.ncclRedOpCreatePreMulSum(&halves, &half, ncclFloat32, ncclScalarHostImmediate, own.world));
  fine(nccl.ncclAllReduce(at(own.shard[0]), at(own.shard[0]), 1, ncclFloat32, halves, own.world, stream));
  fine(nccl.ncclRedOpDestroy(halves, own.world));
  std::array<float, 3> got{};
  for (size_t i = 0; i < 3; ++i) ok(cuda.cuMemcpyDtoHAsync_v2(&got[i], own.shard[i], sizeof(float), stream));
  ok(cuda.cuStreamSynchronize(stream));
  return got[0] == 3.0f && got[1] == static_cast<float>(before) && got[2] == 1.0f;
}

void tear_down(Rank& own) {
  for (CUstream stream : {own.compute, own.communicate, own.second}) ok(cuda.cuStreamSynchronize(stream));
  for (size_t b = 0; b < kBuckets; ++b) {
    ok(cuda.cuMemFree_v2(own.gradient[b]));
    if (b == 0 || bug != "one shard for all") ok(cuda.cuMemFree_v2(own.shard[b]));
    ok(cuda.cuEventDestroy_v2(own.ready[b]));
    ok(cuda.cuEventDestroy_v2(own.done[b]));
  }
  for (ncclComm_t comm : {own.node, own.across}) fine(nccl.ncclCommDestroy(comm));
  if (bug == "destroyed communicator") nccl.ncclCommFinalize(own.node);
  if (bug != "communicator left") fine(nccl.ncclCommDestroy(own.world));
  for (CUstream stream : {own.compute, own.communicate, own.second}) ok(cuda.cuStreamDestroy_v2(stream));
}

void run(int rank, const ncclUniqueId& id) {
  std::string& said = outcome[static_cast<size_t>(rank)];
  try {
    Rank own = set_up(rank, id);
    said = "right";
    for (int round = 0; round < kRounds; ++round) {
      one_round(own, round);
      if (!right(own, round)) said = "wrong";
    }
    if (!others(own)) said = "wrong";
    tear_down(own);
  } catch (const std::string& error) {
    said = error;
  } catch (const std::exception& error) {
    said = error.what();
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  bug = argv[2];
  side_by_side = bug.find("side by side") != std::string::npos;
  void* handle = ::dlopen(argv[1], RTLD_NOW);
  if (handle == nullptr) return std::printf("error %s\n", ::dlerror()), 2;
  ::setenv("HYBRIDCOMM_CUDA", argv[1], 1);
  Search search;
  search.name = "the simulation", search.stem = "lib-that-nobody-has", search.variable = "HYBRIDCOMM_CUDA";
  const SharedLibrary library = SharedLibrary::open(search);
  cuda = Cuda::load(library);
  nccl = Nccl::load(library);
  const auto reset = reinterpret_cast<void (*)(unsigned, int, int)>(::dlsym(handle, "sim_reset"));
  const auto finish = reinterpret_cast<int (*)()>(::dlsym(handle, "sim_finish"));
  const auto report = reinterpret_cast<const char* (*)(int)>(::dlsym(handle, "sim_report"));
  if (bug.find("in NCCL's order") != std::string::npos) {
    reinterpret_cast<void (*)(int)>(::dlsym(handle, "sim_nccl_version"))(nccl_version(2, 26, 2));
    ::setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "1", 1);
  }
  const int first = std::atoi(argv[3]);
  for (int seed = first; seed < first + 20; ++seed) {
    ncclUniqueId id;
    nccl.ncclGetUniqueId(&id);
    reset(static_cast<unsigned>(seed), std::atoi(argv[4]), kRanks);
    std::vector<std::thread> ranks;
    for (int rank = 0; rank < kRanks; ++rank) ranks.emplace_back(run, rank, id);
    for (std::thread& each : ranks) each.join();
    bool all = true;
    for (const std::string& each : outcome) all &= each == "right";
    const int lines = finish();
    std::printf("seed %d %s\n", seed, all ? "right" : "wrong");
    for (int i = 0; i < lines; ++i) std::printf("  %s\n", report(i));
  }
  return 0;
}
