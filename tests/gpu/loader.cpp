// Finds and loads a library as the engine does, and says what came of it; run by loading.py.
//
//   loader cuda|nccl [--map FILE]... [--file FILE]... [--soname NAME] [--start 0|1]
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <exception>

#include "gpu_tables.h"

using namespace hybridcomm::gpu;

namespace {

void tell(const SharedLibrary& library) {
  std::printf("path %s\nhow %s\n", library.path().c_str(), library.how().c_str());
}

// Then begins a communicator, of this process alone, where it is to `start`.
void load_nccl(const SharedLibrary& library, bool start) {
  const Nccl nccl = Nccl::load(library);
  std::printf("version %d\nnewer", nccl.version);
  for (const std::string& name : nccl.newer()) std::printf(" %s", name.c_str());
  std::printf("\n");
  if (!start) return;
  ncclUniqueId id{};
  ncclComm_t comm = nullptr;
  ncclConfig_t config;
  ncclResult_t result = nccl.ncclGetUniqueId(&id);
  if (result == ncclSuccess) result = nccl.ncclCommInitRankConfig(&comm, 1, id, 0, &config);
  std::printf("started %d %s: %s\n", result, nccl.ncclGetErrorString(result), nccl.ncclGetLastError(comm));
}

// What the driver answers, as the engine would say it.
void start_cuda(const Cuda& cuda) {
  try {
    cuda.check(cuda.cuInit(0), "cuInit");
    std::printf("cuInit: well\n");
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
}

void load_cuda(const SharedLibrary& library) {
  const Cuda cuda = Cuda::load(library);
  std::printf("version %d\n", cuda.version);
  start_cuda(cuda);
  std::printf("devices %d\n", cuda.device_count());
}

}  // namespace

int main(int argc, char** argv) {
  const bool nccl = argc > 1 && std::strcmp(argv[1], "nccl") == 0;
  bool start = false;
  Search search;
  search.name = nccl ? "NCCL" : "CUDA's driver";
  search.stem = nccl ? "libnccl.so" : "libcuda.so";
  search.variable = nccl ? "HYBRIDCOMM_NCCL" : "HYBRIDCOMM_CUDA";
  search.soname = nccl ? "libnccl.so.2" : "libcuda.so.1";
  search.advice = "install it";
  for (int i = 2; i + 1 < argc; i += 2) {
    const std::string option = argv[i];
    if (option == "--file") search.files.emplace_back(argv[i + 1]);
    if (option == "--soname") search.soname = argv[i + 1];
    if (option == "--start") start = std::strcmp(argv[i + 1], "1") == 0;
    if (option == "--map" && ::dlopen(argv[i + 1], RTLD_NOW | RTLD_LOCAL) == nullptr) {
      std::printf("error %s\n", ::dlerror());
      return 2;
    }
  }
  try {
    const SharedLibrary library = SharedLibrary::open(search);
    tell(library);
    nccl ? load_nccl(library, start) : load_cuda(library);
  } catch (const std::exception& error) {
    std::printf("error %s\n", error.what());
    return 1;
  }
  return 0;
}
