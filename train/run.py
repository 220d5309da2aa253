"""``python -m train.run``: trains the recommender on several ranks and prints what came out.

1. settings    from the command line (cli.py)
2. ranks       started here by way of hybridcomm.launch, unless a launcher (torchrun, SLURM) has done so
3. per rank    data, backend (mesh, model, gradients), optimizer, loop, report

Exit codes: 0 fine, 2 for what the command line got wrong, 1 for malformed data and failures.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train.config import TrainConfig
from train.data import Dataset, Split, load_directory, split_leave_one_out
from train.errors import ConfigError, DataError, ScheduleError, TrainError
from train.synthetic import generate

if TYPE_CHECKING:
    from torch import Tensor

    from train.backend import Backend
    from train.loop import Trainer
    from train.replica import ModelSpec
    from train.report import Reporter

__all__ = ["main", "train"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    leader = not launched or os.environ["RANK"] == "0"
    config: TrainConfig | None = None
    try:
        from train.cli import parse

        config = parse(arguments)
        if config is None:
            return 0
        _check_compressor(config.compress)
        if launched:
            return train(config)
        return _start_ranks(config, arguments)
    except TrainError as error:
        if leader or not isinstance(error, (ConfigError, DataError)):  # those are the same on every rank
            _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _failed(error, config)


def train(config: TrainConfig) -> int:
    """One rank's whole run; raises typed errors. Returns 0."""
    import torch

    from train.evaluate import evaluate_scores, popularity_scores
    from train.loop import Trainer
    from train.optim import build_optimizer
    from train.replica import ModelSpec
    from train.report import Reporter, final_table, summary

    torch.set_num_threads(config.threads)
    data, split = _load(config, int(os.environ.get("WORLD_SIZE", "1")))
    backend = _connect(config)
    run_dir = config.run_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    reporter = Reporter(config, run_dir, active=backend.rank == 0)
    try:
        features = _features(config, data, backend)
        spec = ModelSpec(
            config=config.model, num_items=data.num_items, features=features, seed=config.seed,
            computing=config.computing, negatives=config.negatives,
        )  # fmt: skip
        parameters = backend.build(spec)
        optimizer = build_optimizer(backend.updated(), config.optim)
        trainer = Trainer(
            config, data=data, split=split, backend=backend, parameters=parameters, optimizer=optimizer,
            reporter=reporter,
        )  # fmt: skip
        reporter.line(_describe(config, data, sum(p.numel() for p in parameters)))
        if config.emulate is not None:
            _emulate(config, spec, trainer, backend, reporter, run_dir)
            backend.close()
            return 0
        outcome = trainer.run()
        _tell_steps(config, backend, reporter, run_dir)
        popular = popularity_scores(data, split)
        popularity = evaluate_scores(
            lambda histories: popular.expand(len(histories), -1), data, split, which="test",
            rank=backend.replica, world_size=backend.replicas, reduce=backend.sum,
        )  # fmt: skip
        values = summary(outcome, popularity, data.best_ndcg, *_wire_per_step(backend, outcome.steps))
        reporter.event("final", **values)
        reporter.close()
        reporter.console.print(final_table(values))
        reporter.line(f"metrics: {run_dir / 'metrics.jsonl'}")
    finally:
        reporter.close()
    backend.close()
    return 0


def _tell_steps(
    config: TrainConfig, backend: Backend, reporter: Reporter, run_dir: Path, kind: str = ""
) -> None:
    """Where the last steps went; with --profile the timeline of the very last."""
    from train.breakdown import breakdown_table
    from train.profile import write

    traces = backend.traces()
    if not traces:
        return
    table, rows = breakdown_table(traces, kind)
    reporter.console.print(table)
    for trace, row in zip(traces, rows, strict=True):
        reporter.event("step_times", emulated=bool(kind), rank=trace.rank, clock_error_s=trace.error, **row)
    if config.profile:
        title = f"{kind}{config.pipeline}, tp {config.tp} x pp {config.pp} x dp {backend.replicas}"
        facts = {"schedule": config.pipeline, "tp": config.tp, "pp": config.pp, "dp": backend.replicas}
        facts["emulated"] = bool(kind)
        paths = write(traces, run_dir, title, facts)
        reporter.line(f"timeline of the last step: {', '.join(map(str, paths))}")


def _emulate(
    config: TrainConfig,
    spec: ModelSpec,
    trainer: Trainer,
    backend: Backend,
    reporter: Reporter,
    run_dir: Path,
) -> None:
    """Plays the first step with computation that is time, and tells what came of it."""
    from train.backend_hybrid import HybridBackend
    from train.emulate import Emulation, emulated_table

    assert isinstance(backend, HybridBackend)  # noqa: S101 (the settings say so)
    reporter.line(backend.describe())
    emulation = Emulation(config.emulate or 0.0, spec, backend.held, backend.context, trainer.first_batches())
    figures = emulation.run(config.max_steps or 10)
    mesh = f"tp {config.tp} x pp {config.pp} x dp {backend.replicas}"
    what = f"{mesh}, {backend.schedule.name}, compress {config.compress}"
    reporter.event("emulated", what=what, **figures)
    _tell_steps(config, backend, reporter, run_dir, kind="emulated: ")
    reporter.console.print(emulated_table(figures, what))


def _connect(config: TrainConfig) -> Backend:
    """Joins the job; raises HybridCommError or TrainError naming who did not come."""
    if config.comm == "ddp":
        from train.backend_ddp import DDPBackend

        return DDPBackend(config)
    from train.backend_hybrid import HybridBackend

    return HybridBackend(config)


def _start_ranks(config: TrainConfig, arguments: list[str]) -> int:
    """Checks what can be checked once, then starts the ranks."""
    from hybridcomm.launch import launch
    from train.report import refuse_used

    _load(config, config.nproc)
    _check_mesh(config)
    if config.run_dir is not None:
        refuse_used(config.run_dir)
    if config.run_dir is None:
        arguments = [*arguments, "--run-dir", str(Path("runs") / time.strftime("%Y%m%d-%H%M%S"))]
    return launch(["-m", "train.run", *arguments], nproc=config.nproc, nodes=config.nodes)


def _check_compressor(text: str) -> None:
    """Before any rank starts: an unknown compressor or a ratio out of range is a usage error."""
    from hybridcomm.compression_policy import CompressionPolicy
    from hybridcomm.errors import CompressorError

    try:
        CompressionPolicy.of(text)
    except CompressorError as error:
        raise ConfigError(f"--compress: {error}") from None


def _check_mesh(config: TrainConfig) -> None:
    """Before any rank starts: a mesh that cannot be, or a model that cannot be cut into so many stages."""
    from hybridcomm.errors import UnsupportedError
    from hybridcomm.topology import Topology
    from model.parts import split
    from train.mesh import Mesh
    from train.pipeline import make_schedule

    topology = Topology.even(config.nodes, config.nproc)
    mesh = Mesh.over(topology, pp=config.pp, tp=config.tp, outer=config.outer)
    if config.zero:
        mesh.check_shared_state()
    try:
        schedule = make_schedule(config.pipeline, config.pp, config.pieces, chunks=config.chunks)
        split(config.model.layers, schedule.stages)
    except (ScheduleError, UnsupportedError) as error:
        raise ConfigError(f"--pp {config.pp} --schedule {config.pipeline}: {error}") from None


def _load(config: TrainConfig, ranks: int) -> tuple[Dataset, Split]:
    data = generate(config.synthetic) if config.data is None else load_directory(config.data)
    if config.negatives > data.num_items:
        raise ConfigError(f"--negatives {config.negatives}: there are {data.num_items} items to draw from")
    split = split_leave_one_out(data)
    if ranks > len(split.users):
        raise ConfigError(
            f"{ranks} ranks but only {len(split.users)} users with three items or more: use fewer ranks"
        )
    return data, split


def _features(config: TrainConfig, data: Dataset, backend: Backend) -> Tensor | None:
    """Text features of all items, computed once in the job; None without text."""
    import torch

    from train.text import text_features

    if data.texts is None or not config.model.text:
        return None
    if backend.rank == 0:
        return backend.share(text_features(data.texts, config.text_features))
    return backend.share(torch.zeros(data.num_items, config.text_features))


def _wire_per_step(backend: Backend, steps: int) -> tuple[int | None, int | None]:
    import numpy as np

    mine = backend.wire_nbytes()
    if mine is None:
        return None, None
    sent, dense = backend.sum_of_ranks(np.array([mine, backend.dense_wire_nbytes()], dtype=np.int64))
    return int(sent) // steps, int(dense)


def _describe(config: TrainConfig, data: Dataset, parameters: int) -> str:
    text = "with text" if data.texts is not None and config.model.text else "without text"
    return (
        f"{data.name}: {data.num_users} users, {data.num_items} items ({text}), {len(data.items)} "
        f"interactions; {parameters / 1e6:.2f} M parameters {_where(config)}; {config.batch_size} users per step"
        f"{config.computing.describe()}"
        + (f"; loss against {config.negatives} drawn items" if config.negatives else "")
    )


def _where(config: TrainConfig) -> str:
    return "per rank" if config.pp * config.tp > 1 else "on each rank"


def _failed(error: Exception, config: TrainConfig | None) -> int:
    """One line for errors the library raises on purpose; a traceback in a file for those nobody expected."""
    from hybridcomm.errors import HybridCommError

    rank = os.environ.get("RANK", "0")
    if isinstance(error, HybridCommError):
        text = str(error)
        _complain(text if text.startswith("rank ") else f"rank {rank}: {text}")
        return 1
    where = "stderr"
    if config is not None and config.run_dir is not None and config.run_dir.is_dir():
        path = config.run_dir / f"rank{rank}.err"
        path.write_text(traceback.format_exc(), encoding="utf-8")
        where = str(path)
    else:
        traceback.print_exc()
    _complain(f"rank {rank}: {type(error).__name__}: {error}; traceback in {where}")
    return 1


def _complain(text: str) -> None:
    sys.stderr.write(f"train.run: error: {text}\n")  # one write: lines of several ranks must not mix
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
