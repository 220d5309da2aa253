#include "bindings.h"

PYBIND11_MODULE(_C, module) {
  module.doc() =
      "The hybridcomm engines: of hosts (shared memory inside a node, TCP between nodes) and of GPUs (CUDA, "
      "NCCL).";
  hybridcomm::bind_errors(module);
  hybridcomm::bind_program(module);
  hybridcomm::bind_custom(module);
  hybridcomm::bind_engine(module);
  hybridcomm::bind_prepared(module);
  hybridcomm::bind_handshake(module);
  hybridcomm::bind_reduce(module);
  hybridcomm::bind_gpu(module);
}
