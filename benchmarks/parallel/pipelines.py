"""The peers' pipelines: torch.distributed.pipelining, and DeepSpeed's PipelineModule where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.parallel import plain
from benchmarks.parallel.case import LR, Case, Competitor
from benchmarks.parallel.splits import Cut
from model.vocab import Items, item_loss

__all__ = ["TORCH_SCHEDULES", "DeepSpeedPipeline", "TorchPipeline", "deepspeed_reason"]

TORCH_SCHEDULES = {"1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zbv": "ZBVZeroBubble"}
"""Ours -> torch's name."""


def _choice(schedule: str, cut: Cut, tiles: bool) -> str:
    return f"{schedule} {'+'.join(map(str, cut))}" + (", our loss" if tiles else "")


def _stages(case: Case, cut: Cut, *, tiles: bool) -> list[nn.Sequential]:
    """Embedding before the first, head behind the last stage's layers."""
    embedding, *blocks, head = plain.layers(case, tiles=tiles)
    ends = list(itertools.accumulate(cut))
    parts = [blocks[end - count : end] for count, end in zip(cut, ends, strict=True)]
    parts[0].insert(0, embedding)
    parts[-1].append(head)
    return [nn.Sequential(*part) for part in parts]


def _sum_of_losses(case: Case, table: nn.Parameter | None) -> Callable[[Tensor, Tensor], Tensor]:
    if table is None:
        return lambda out, targets: F.cross_entropy(out, targets.reshape(-1), reduction="sum")
    return lambda out, targets: item_loss(out, table, targets.reshape(-1), Items(count=case.items))


def _table(stage: nn.Sequential) -> nn.Parameter | None:
    return getattr(stage[-1], "table", None)


class TorchPipeline(Competitor):
    """A schedule of torch.distributed.pipelining on the two ranks of torch's default group."""

    name = "torch.distributed.pipelining"

    def __init__(self, case: Case, schedule: str, cut: Cut, *, tiles: bool) -> None:
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

        self.choice = _choice(schedule, cut, tiles)
        rank, last = dist.get_rank(), len(cut) - 1
        made = get_schedule_class(TORCH_SCHEDULES[schedule])
        own = {
            stage: module
            for stage, module in enumerate(_stages(case, cut, tiles=tiles))
            if _rank_of(schedule, stage, len(cut)) == rank
        }
        pieces = [PipelineStage(m, stage, len(cut), torch.device("cpu")) for stage, m in own.items()]
        table = _table(own[last]) if last in own else None
        total = _sum_of_losses(case, table)
        self._schedule = made(
            pieces[0] if issubclass(made, PipelineScheduleSingle) else pieces,  # type: ignore[arg-type]
            n_microbatches=case.microbatches,
            loss_fn=lambda out, targets: total(out, targets) / case.predictions,
            scale_grads=False,
        )
        batches = case.batches()
        self._inputs = [torch.cat([batch.items for batch in batches])] if 0 in own else []
        targets = torch.cat([batch.targets.view(case.rows, -1) for batch in batches])
        self._targets = targets if last in own else None
        parameters = [p for module in own.values() for p in module.parameters()]
        self._optimizer = torch.optim.SGD(parameters, lr=LR)

    def step(self) -> float:
        self._optimizer.zero_grad()
        losses: list[Tensor] = []
        self._schedule.step(*self._inputs, target=self._targets, losses=losses)
        self._optimizer.step()
        return sum(loss.item() for loss in losses)


def _rank_of(schedule: str, stage: int, stages: int) -> int:
    """Stages of a V come back to rank 0; others go round."""
    return (0, 1, 1, 0)[stage] if schedule == "zbv" else stage * 2 // stages if stages == 2 else stage % 2


def deepspeed_reason() -> str | None:
    """Why DeepSpeed cannot be compared with, or None."""
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    try:
        with _quiet():
            import deepspeed.pipe  # noqa: F401
    except Exception as error:
        return f"deepspeed cannot be imported: {type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints what it is made of, on every rank."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


class DeepSpeedPipeline(Competitor):
    """DeepSpeed's pipeline engine, whose only schedule for training is 1F1B."""

    name = "DeepSpeed PipelineModule"

    def __init__(self, case: Case, cut: Cut, *, tiles: bool) -> None:
        with _quiet():
            self._engine = self._make(case, cut, tiles=tiles)
        self.choice = _choice("1f1b", cut, tiles)
        self._batches = [(batch.items, batch.targets.view(case.rows, -1)) for batch in case.batches()]

    @staticmethod
    def _make(case: Case, cut: Cut, *, tiles: bool) -> Any:
        import deepspeed
        from deepspeed.pipe import PipelineModule

        deepspeed.init_distributed(dist_backend="gloo")

        class Cutting(PipelineModule):
            def _partition_layers(self, method: str = "uniform") -> None:
                del method
                self.parts = [0, 1 + cut[0], case.layers + 2]
                stage = self._topo.get_coord(self.global_rank).pipe
                self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

        layers = plain.layers(case, tiles=tiles)
        total = _sum_of_losses(case, layers[-1].table if tiles else None)
        per_microbatch = case.predictions // case.microbatches
        net = Cutting(
            layers=layers, num_stages=2, loss_fn=lambda out, targets: total(out, targets) / per_microbatch
        )
        parameters = [p for p in net.parameters() if p.requires_grad]
        config = {
            "train_micro_batch_size_per_gpu": case.rows,
            "gradient_accumulation_steps": case.microbatches,
            "steps_per_print": 1 << 30,
            "gradient_clipping": 0.0,  # its default is 1
        }
        engine, *_ = deepspeed.initialize(
            model=net, optimizer=torch.optim.SGD(parameters, lr=LR), config=config
        )
        return engine

    def step(self) -> float:
        return float(self._engine.train_batch(iter(self._batches))) / 2  # both ranks know it
