// In-host all-reduce of fp32 by MPI, as bench_inhost times it: sums in place, the input rewritten before every call,
// small sizes in batches whose rewriting, by all ranks that share a core, is taken off.
//
// usage: mpirun -n RANKS mpi_allreduce BYTES BATCH ROUNDS   rank 0 prints the median ms per call
#include <mpi.h>

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<long>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int rank = 0, world = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &world);
  if (argc != 4) return std::fprintf(stderr, "usage: mpi_allreduce BYTES BATCH ROUNDS\n"), 2;
  const size_t count = std::strtoull(argv[1], nullptr, 10) / sizeof(float);
  const int batch = std::atoi(argv[2]), rounds = std::atoi(argv[3]);
  std::vector<float> own(count), tensor(count);
  for (size_t i = 0; i < count; ++i) own[i] = static_cast<float>(rank + 1 + static_cast<int>(i % 100));
  std::vector<double> timed, rewriting;
  for (int round = -2; round < rounds; ++round) {  // two rounds to warm up
    tensor = own;
    MPI_Barrier(MPI_COMM_WORLD);
    double begin = MPI_Wtime();
    for (int call = 0; call < batch; ++call) {
      if (call > 0) std::copy(own.begin(), own.end(), tensor.begin());
      MPI_Allreduce(MPI_IN_PLACE, tensor.data(), static_cast<int>(count), MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    }
    const double took = MPI_Wtime() - begin;
    for (size_t i = 0; i < count; ++i) {
      const auto want = static_cast<float>(world * (world + 1) / 2 + world * static_cast<int>(i % 100));
      if (tensor[i] != want) return std::fprintf(stderr, "wrong sum at %zu\n", i), MPI_Abort(MPI_COMM_WORLD, 1);
    }
    begin = MPI_Wtime();
    for (int call = 1; call < batch; ++call) std::copy(own.begin(), own.end(), tensor.begin());
    if (round >= 0) timed.push_back(took), rewriting.push_back(MPI_Wtime() - begin);
  }
  // Of the machine, not of this process: MPI may have bound it to one core.
  const double sharing = std::max(1.0, world / static_cast<double>(sysconf(_SC_NPROCESSORS_ONLN)));
  if (rank == 0) std::printf("%.6f\n", (median(timed) - sharing * median(rewriting)) / batch * 1e3);
  MPI_Finalize();
  return 0;
}
