"""One rank of several processes: ``python -m hybridcomm.selftest`` as it is, with a simulated GPU in place of torch's.

    python -m hybridcomm.launch --nproc 2 -m tests.gpu.selftest_process ARGS

HYBRIDCOMM_SIM and HYBRIDCOMM_SIM_BROKER are set. What the simulation has reported goes to stderr; the exit code is 3
then.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Any
from unittest import mock

from hybridcomm.selftest import __main__ as command
from hybridcomm.selftest import gpu as gpus
from tests.gpu.selftest_ranks import SimulatedGpu, own_allreduce
from tests.gpu.simulated import Simulation
from tests.gpu.simulation import library


def main() -> int:
    os.environ["HYBRIDCOMM_CUDA"] = os.environ["HYBRIDCOMM_NCCL"] = str(library())
    simulation = Simulation(seed=int(os.environ["RANK"]), eager_percent=60, threads=0)
    simulation.register_shipped_kernels()
    simulation.nccl_version(21805)
    made: list[SimulatedGpu] = []

    def simulated(_: int) -> Any:
        made.append(SimulatedGpu(simulation, 0))
        return made[0]

    with (
        simulation,
        mock.patch.object(gpus, "TorchGpu", simulated),
        mock.patch.object(gpus, "nccl_peer", own_allreduce),
        mock.patch.object(command, "_no_gpu", return_value=""),
    ):
        simulation.share_hosts()  # of the rank and its watchdog
        code = command.main(sys.argv[1:])
        for each in made:
            each.close()
        gc.collect()
        reports = simulation.finish()
        for each in made:
            each.over = True
    print(*reports, sep="\n", file=sys.stderr)
    return 3 if reports else code


if __name__ == "__main__":
    sys.exit(main())
