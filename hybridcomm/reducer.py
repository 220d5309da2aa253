"""Step 1 of 7: ready.

In: a module whose backward is about to run. Out: ``p.grad`` of every parameter is the mean over all ranks, by
way of buckets that are all-reduced while backward goes on.

A hook fires when a parameter's gradient is complete and copies it into its bucket. Buckets are launched in
index order on all ranks, whatever order the hooks fire in: a full bucket waits for those before it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from hybridcomm import reducer_report as report
from hybridcomm import reducer_setup as setup
from hybridcomm.bucket import Bucket, BucketLayout, BucketState
from hybridcomm.compress import LinkCompressors
from hybridcomm.compression_policy import CompressionPolicy
from hybridcomm.errors import DataTypeError, HybridCommError, ResidualError, UnsupportedError
from hybridcomm.reducer_report import ReducerStats
from hybridcomm.reducer_setup import ContextLike, WorkLike
from hybridcomm.residual import Residual
from hybridcomm.residual_layout import RegionsByOp
from hybridcomm.step_guard import StepGuard

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

__all__ = ["Reducer", "ReducerStats"]


class Reducer:
    """Averages the gradients of ``module`` over all ranks of ``ctx`` during backward, on GPUs where it lies there.

    Call `finalize` after each synchronised backward and before clipping or stepping; `attach` the optimizer
    so that its steps commit the residual. Parameters (and buffers) start as rank 0's unless
    ``sync_parameters=False``.

    ``compress``: as in `allreduce`, for all parameters but norms, biases and other vectors, which stay dense; or a
    `Schedule`; or a `CompressionPolicy`, which decides by name, role and size. Parameters that are compressed alike
    share buckets, which are then fp32. A mapping by link class may hold either as ``inter_node``; its ``intra_node``
    acts on buckets while they are compressed between nodes. ``exchange``: as in `allreduce`. ``bucket_cap_mb``: MiB
    per bucket, None lets policy choose. ``unused``: what to do with parameters that got no gradient, "error" or
    "zero" (their share of the mean is zero). Raises typed errors naming rank and parameters.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        ctx: ContextLike,
        compress: setup.ChoiceByLink = None,
        bucket_cap_mb: float | None = None,
        residual: Residual | None = None,
        exchange: str = "auto",
        unused: str = "error",
        sync_parameters: bool = True,
    ) -> None:
        if unused not in ("error", "zero"):
            raise UnsupportedError(f"unused={unused!r}: use 'error' or 'zero'")
        choice, self.intra = setup.by_link(compress)
        self.policy = CompressionPolicy.of(choice)
        self.requested = "policy" if choice is self.policy else str(choice or "none")
        self._unused = unused
        self._sync = True
        self._scaler: GradScaler | None = None
        self._scale = 1.0
        self._parameters = setup.trainable(module)
        self.ctx = ctx = setup.placed(ctx, next(iter(self._parameters.values())))
        self._moves = setup.mover(ctx, next(iter(self._parameters.values())).device)
        choices = setup.choices_of(module, self._parameters, self.policy)
        self.layouts = setup.layouts_of(
            self._parameters, choices, bucket_cap_mb, getattr(ctx, "bucket_parts", 1)
        )
        compresses = any(layout.compress != "none" for layout in self.layouts)
        if residual is not None and not compresses:
            raise UnsupportedError("residual= has nothing to do without compress=")
        setup.check_links(exchange, self.intra, compresses)
        self.residual = Residual() if residual is None else residual
        self.residual.rekey()
        setup.check_agreement(
            ctx, self.layouts, f"{self.policy} {self.intra} {exchange} {self.residual.settings}"
        )
        decided = setup.decided(ctx, self.layouts, choices, exchange)
        self.schedules = tuple(schedule for schedule, _ in decided)
        self.exchanges = tuple(way for _, way in decided)
        setup.check_feedback(self.residual, self.schedules)
        self._guard = StepGuard(self.residual, counts=compresses)
        if sync_parameters:
            setup.sync_parameters(ctx, module)
        self._names = {parameter: name for name, parameter in self._parameters.items()}
        self._buckets = [Bucket(layout) for layout in self.layouts]
        self._flats = [setup.flat_buffer(ctx, layout, self._moves) for layout in self.layouts]
        self._regions: dict[int, RegionsByOp] = {}  # by bucket, where its residual lies
        self._works: list[WorkLike] = []
        self._running, self._held, self._released = False, False, 0
        self._place = setup.places(self._parameters, self.layouts, self._flats)
        self._steps = self._wire = self._total_wire = 0
        self.exposed_seconds = self._total_exposed = 0.0
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(name))  # type: ignore[no-untyped-call]
            for name, parameter in self._parameters.items()
        ]

    # -- set-up --------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer, *, scaler: GradScaler | None = None) -> None:
        """Commits the residual after each applied step of ``optimizer``, rolls back after a skipped one.

        With ``scaler`` gradients are reduced in unscaled units, so that a scale that grows or backs off keeps
        the residual law; its scale must stay a power of two. Several optimizers may be attached: all must
        step.
        """
        number = self._guard.attach()
        if scaler is not None:
            if self._scaler is not None and self._scaler is not scaler:
                raise UnsupportedError("attach(): one reducer takes one GradScaler")
            self._scaler = scaler

        def before(*_: object) -> None:
            if self._running:
                raise HybridCommError(
                    f"rank {self.ctx.rank}: optimizer step before finalize(); call it after each backward"
                )

        def after(stepped: torch.optim.Optimizer, *_: object) -> None:
            found = getattr(stepped, "found_inf", None)  # fused optimizers are called, and skip inside
            self._guard.stepped(number, applied=found is None or not bool(found))

        self._hooks += [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]

    def close(self) -> None:
        """Removes all hooks; the module and the optimizer are as before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # -- backward ------------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate into ``p.grad``; the next one outside reduces the total."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def _hook(self, name: str) -> Any:
        def ready(parameter: torch.Tensor) -> None:
            if self._sync:
                self._on_ready(name, parameter)

        return ready

    def ready(self, parameter: torch.nn.Parameter) -> None:
        """The gradient of ``parameter`` is complete and in ``.grad``; what its hook says after a backward.

        For gradients that are added to ``.grad`` outside of backward, as those that a pipeline puts off: run the
        backward under `no_sync` then. Each parameter once in a step, in the same order on all ranks.
        """
        self._on_ready(self._names[parameter], parameter)

    def hold(self) -> None:
        """From now on buckets are launched in the steps' own order: full ones wait for `release` too."""
        self._held = True

    def release(self, count: int) -> None:
        """The step's first ``count`` buckets may go: at once if they are full, else as soon as they are."""
        self._released = max(self._released, count)
        if self._running:
            self._launch_ready()

    def launched(self, bucket: int) -> bool:
        """Whether the all-reduce of this step's bucket has been started."""
        return self._running and bucket < len(self._works)

    def launches(self) -> list[tuple[float, float]]:
        """Of each bucket of the latest step: when it was launched (``time.perf_counter``), s that the engine took."""
        return [(work.begun, work.seconds) for work in self._works]

    @property
    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """All that are averaged, in the order of the module."""
        return tuple(self._names)

    def _on_ready(self, name: str, parameter: torch.Tensor) -> None:
        if not self._running:
            self._begin()
        index, view = self._place[name]
        grad = parameter.grad
        if grad is None or grad.is_sparse:
            raise DataTypeError(f"rank {self.ctx.rank}: gradient of {name!r} is not dense; use sparse=False")
        self._buckets[index].mark_ready(name)
        scaled = self._scale != 1.0 and bool(self.schedules[index].codecs)
        self._moves.copy([view], [grad], 1.0 / self._scale if scaled else 1.0)
        self._launch_ready()

    def _begin(self) -> None:
        self._guard.begin(self._was_skipped)
        self._scale = setup.loss_scale(self._scaler, self.schedules, self.ctx.rank)
        for bucket, flat in zip(self._buckets, self._flats, strict=True):
            bucket.reset()
            self._moves.zero(flat[bucket.layout.used :])  # a skipped step may have left NaN in the padding
        self._works.clear()
        self._running = True

    def _launch_ready(self) -> None:
        """Launches full buckets in index order; a gap, or one that is held back, stops it until that is over."""
        end = min(self._released, len(self._buckets)) if self._held else len(self._buckets)
        while len(self._works) < end:
            bucket = self._buckets[len(self._works)]
            if bucket.state is not BucketState.READY:
                return
            bucket.advance(BucketState.IN_FLIGHT)
            self._works.append(self._launch(bucket.layout))

    def _launch(self, layout: BucketLayout) -> Any:
        flat, schedule = self._flats[layout.index], self.schedules[layout.index]
        codec = schedule.at(self._guard.applied)
        if codec is None:
            if schedule.codecs:
                self._deliver(layout, flat)
            return self.ctx.allreduce(flat, op="mean", async_op=True, residual_key=layout.key)
        return self.ctx.allreduce(
            flat,
            op="mean",
            compress=LinkCompressors(inter_node=codec, intra_node=self.intra),
            residual=self.residual,
            exchange=self.exchanges[layout.index],
            async_op=True,
            residual_key=layout.key,
            spans=layout.spans,
        )

    def _deliver(self, layout: BucketLayout, flat: torch.Tensor) -> None:
        """A dense phase: what compressed steps left is part of what this rank puts in."""
        if layout.index not in self._regions:
            codec, exchange = self.schedules[layout.index].codecs[0], self.exchanges[layout.index]
            self._regions[layout.index] = setup.regions_of(self.ctx, layout, codec, self.intra, exchange)
        regions = self._regions[layout.index]
        values = flat if hasattr(self.ctx, "provider") else flat.numpy()
        self.residual.deliver(layout.key, values, regions=regions, spans=layout.spans)

    # -- after backward ------------------------------------------------------------------

    def finalize(self) -> None:
        """Waits for all buckets and writes the means into ``p.grad``; call it after each synchronised
        backward.

        Raises `UnsupportedError` naming the parameters that got no gradient (unless ``unused="zero"``). After
        any error the residual is rolled back and the next backward starts afresh.
        """
        if not self._running:
            raise HybridCommError(
                f"rank {self.ctx.rank}: finalize() without a synchronised backward before it "
                "(none ran since the last one, or it ran under no_sync())"
            )
        try:
            self._fill_unused()
            if len(self._works) < len(self._buckets):
                raise HybridCommError(
                    f"rank {self.ctx.rank}: buckets {len(self._works)}..{len(self._buckets) - 1} are held back; "
                    "call release() for them before finalize()"
                )
            exposed, wire = 0.0, 0
            for bucket, work in zip(self._buckets, self._works, strict=True):
                begin = time.perf_counter()
                work.wait()
                exposed += time.perf_counter() - begin
                wire += work.wire_nbytes
                bucket.advance(BucketState.DONE)
                self._unpack(bucket.layout)
            self._check_claimed()
        except BaseException:
            self._abandon()
            raise
        self._running, self._released = False, 0
        self._guard.reduced()
        self._steps += 1
        self.exposed_seconds, self._wire = exposed, wire
        self._total_exposed += exposed
        self._total_wire += wire

    def _fill_unused(self) -> None:
        missing = [name for bucket in self._buckets for name in bucket.missing]
        if missing and self._unused == "error":
            raise UnsupportedError(
                f"rank {self.ctx.rank}: {len(missing)} parameters got no gradient in this backward: "
                f"{', '.join(missing[:20])}{', ...' if len(missing) > 20 else ''}; use them in the loss, set "
                "requires_grad=False before building the Reducer, or pass unused='zero'"
            )
        for name in missing:
            index, view = self._place[name]
            self._moves.zero(view)
            self._buckets[index].mark_ready(name)
        self._launch_ready()

    def _check_claimed(self) -> None:
        if self.residual.unclaimed:
            raise ResidualError(
                f"rank {self.ctx.rank}: the loaded residual holds parameters that this module does "
                f"not train: {', '.join(self.residual.unclaimed[:20])}; load the state of this model"
            )

    def _unpack(self, layout: BucketLayout) -> None:
        scaled = self._scale != 1.0 and bool(self.schedules[layout.index].codecs)
        targets, sources = [], []
        for name in layout.names:
            parameter, view = self._parameters[name], self._place[name][1]
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            targets.append(parameter.grad)
            sources.append(view)
        self._moves.copy(targets, sources, self._scale if scaled else 1.0)

    def _abandon(self) -> None:
        """A step failed: let what is in flight end, then forget the step."""
        for work in self._works:
            try:
                work.wait()
            except HybridCommError:
                continue  # the first error is already on its way to the caller
        self._works.clear()
        self._running, self._released = False, 0
        self._guard.rollback()

    # -- around the optimizer step -------------------------------------------------------

    def commit(self) -> None:
        """The reduced gradients were applied; only needed without `attach`."""
        self._guard.commit()

    def rollback(self) -> None:
        """The reduced gradients were not applied (a skipped step): the residuals of all buckets go back."""
        if self._running:
            self._abandon()
        else:
            self._guard.rollback()

    def _was_skipped(self) -> bool:
        """Whether the last reduced step must have been skipped: not finite, or the loss scale backed off."""
        if self._scaler is not None and self._scaler.get_scale() < self._scale:
            return True
        return not all(self._finite(name) for name in self._parameters)

    def _finite(self, name: str) -> bool:
        limit = torch.finfo(self._parameters[name].dtype).max
        return self._moves.finite(self._place[name][1], limit)

    # -- reports -------------------------------------------------------------------------

    def table(self) -> str:
        """Text: per link and per kind of bucket, what was requested, what is active now, and the ratio of bytes."""
        active = [schedule.at(self._guard.applied) for schedule in self.schedules]
        links = [
            None if codec is None else LinkCompressors(inter_node=codec, intra_node=self.intra)
            for codec in active
        ]
        return report.table(self.ctx.topology, self.layouts, self.requested, links, self.exchanges)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: ``applied`` optimizer steps, which schedules go by, and the committed ``residual``."""
        return {"applied": self._guard.applied, "residual": self.residual.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict` of the same rank and settings; raises `ResidualError` where it does not fit."""
        self.residual.load_state_dict(state["residual"])
        self._guard.resume(int(state["applied"]))

    def stats(self) -> ReducerStats:
        """Counters; see `ReducerStats`."""
        return ReducerStats(
            steps=self._steps,
            applied=self._guard.applied,
            skipped=self._guard.skipped,
            exposed_seconds=self.exposed_seconds,
            total_exposed_seconds=self._total_exposed,
            wire_nbytes=self._wire,
            total_wire_nbytes=self._total_wire,
            residual_nbytes=self.residual.nbytes,
        )
