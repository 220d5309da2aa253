// Finds and loads a library as the engine does, and says what came of it; run by test_loading.py.
//
//   loader cuda|nccl [--map FILE]... [--file FILE]... [--soname NAME]
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

void load_nccl(const SharedLibrary& library) {
  const Nccl nccl = Nccl::load(library);
  std::printf("version %d\nnewer", nccl.version);
  for (const std::string& name : nccl.newer()) std::printf(" %s", name.c_str());
  std::printf("\n");
}

void load_cuda(const SharedLibrary& library) {
  const Cuda cuda = Cuda::load(library);
  std::printf("version %d\n", cuda.version);
  std::printf("devices %d\n", cuda.device_count());
}

}  // namespace

int main(int argc, char** argv) {
  const bool nccl = argc > 1 && std::strcmp(argv[1], "nccl") == 0;
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
    if (option == "--map" && ::dlopen(argv[i + 1], RTLD_NOW | RTLD_LOCAL) == nullptr) {
      std::printf("error %s\n", ::dlerror());
      return 2;
    }
  }
  try {
    const SharedLibrary library = SharedLibrary::open(search);
    tell(library);
    nccl ? load_nccl(library) : load_cuda(library);
  } catch (const std::exception& error) {
    std::printf("error %s\n", error.what());
    return 1;
  }
  return 0;
}
