"""Is a plan a correct schedule? Four questions, each of which raises `PlanError` with the step at fault.

1. structure      every step is well formed, and the owners are those of the topology
2. coverage       a symbolic execution: every element ends as the collective promises, each rank counted once
3. dependencies   two steps of a rank that touch the same elements are ordered by ``after``
4. progress       no deadlock with FIFO streams and bounded lanes (`hybridcomm.plan_streams`)
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from hybridcomm.errors import PlanError
from hybridcomm.plan import ALL, OPS, Part, Plan, Step
from hybridcomm.plan_streams import check_progress

__all__ = ["check_plan"]

_IN_NODE = ("reduce", "gather", "reduce_all", "reduce_payload")
_SUMS_ALL = ("reduce_all", "exchange_reduce_all", "allreduce_flat")
_ROOTLESS = _SUMS_ALL
_ANYBODY = ("reduce_all", "allreduce_flat", "compress_intra")  # not the owners of a shard alone
_EITHER = ("exchange_payload",)  # with a root, or without
_ALONE = ("compress_intra", "compress", "recompress", "decompress")
_PAIRWISE = ("reduce", "gather", "scatter", "all_to_all", "monitored_barrier")
"""Collectives that also copy from one rank to another."""

_PROMISES = {
    "broadcast": ("root", "all"),
    "all_gather": ("rank", "all"),
    "monitored_barrier": ("rank", "all"),
    "reduce": ("all", "root"),
    "reduce_scatter": ("all", "rank"),
    "gather": ("rank", "root"),
    "scatter": ("root", "rank"),
    "all_to_all": ("rank", "rank"),
}
"""Collective -> (source, target) of its parts; the rest have none: from all, to all."""


def check_plan(plan: Plan, *, slots: int = 4) -> None:
    """Raises `PlanError` unless ``plan`` answers all four questions; linear in steps times group size."""
    for place, step in enumerate(plan.steps):
        _check_step(plan, step, place)
    _check_parts(plan)
    _check_whole_regions(plan)
    atoms = _Atoms(plan)
    _check_coverage(plan, atoms)
    _check_dependencies(plan, atoms)
    check_progress({rank: plan.for_rank(rank) for rank in range(plan.topology.world_size)}, slots=slots)


def _fail(step: Step, what: str) -> PlanError:
    return PlanError(f"step {step.id}: {what}\n    {step}")


# -- 1. structure ------------------------------------------------------------------------------------------


def _check_step(plan: Plan, step: Step, place: int) -> None:
    if step.id != place:
        raise _fail(step, f"stands at place {place}; ids are places in the global order")
    if step.op not in OPS:
        raise _fail(step, f"unknown op {step.op!r}")
    if not 0 <= step.region.begin < step.region.end <= plan.numel:
        raise _fail(step, f"region is empty or not within the {plan.numel} elements")
    if any(not 0 <= rank < plan.topology.world_size for rank in step.group):
        raise _fail(step, f"group names a rank outside 0..{plan.topology.world_size - 1}")
    if step.op not in _EITHER and (step.op in _ROOTLESS) != (step.root == -1):
        raise _fail(step, "needs a root" if step.root == -1 else "takes no root")
    if step.root != -1 and step.root not in step.group:
        raise _fail(step, f"root {step.root} is not in the group")
    if step.divisor not in (1, plan.topology.world_size if plan.op == "mean" else 1):
        raise _fail(step, f"divisor {step.divisor} does not belong to op={plan.op!r}")
    _check_group(plan, step)
    for before in step.after:
        if not 0 <= before < step.id:
            raise _fail(
                step, f"waits for step {before}, which does not come before it: a cycle or wrong order"
            )
        if not set(step.group) & set(plan.steps[before].group):
            raise _fail(step, f"waits for step {before}, with which it shares no rank")


def _check_group(plan: Plan, step: Step) -> None:
    topology = plan.topology
    nodes = [topology.node_of(rank) for rank in step.group]
    if step.op in _ALONE:
        if step.group != (step.root,):
            raise _fail(step, "runs on its root alone")
    elif step.op in _IN_NODE:
        _check_in_node(plan, step)
    elif step.op == "allreduce_flat":
        if list(step.group) != list(range(topology.world_size)):
            raise _fail(step, "group must be all ranks, ascending")
    elif plan.collective in (*_PAIRWISE, "broadcast") and step.op == "exchange_gather":
        if nodes != sorted(set(nodes)) or len(nodes) < 2:
            raise _fail(step, "group must hold ranks of two or more nodes, in node order")
    elif nodes != list(range(len(topology.nodes))) or len(nodes) < 2:
        raise _fail(step, "group must hold one rank per node, in node order, of two or more nodes")
    if plan.collective in ("allreduce", "barrier") and step.op not in _ANYBODY:
        owners = topology.owners(step.shard)
        wrong = [r for r in (step.group if step.stream == "exchange" else (step.root,)) if r not in owners]
        if wrong:
            raise _fail(step, f"rank {wrong[0]} does not own shard {step.shard}: the owners are {owners}")


def _check_in_node(plan: Plan, step: Step) -> None:
    node = plan.topology.nodes[plan.topology.node_of(step.group[0])]
    if plan.collective in _PAIRWISE and step.op == "gather":
        if list(step.group) != sorted(set(step.group) & set(node)) or len(step.group) < 2:
            raise _fail(step, "group must be two or more ranks of one node, ascending")
    elif step.group != node or len(step.group) < 2:
        raise _fail(step, "group must be all ranks of one node of two or more, ascending")


def _check_parts(plan: Plan) -> None:
    """The parts tile the buffer, and are of the kind that the collective promises."""
    kinds = _PROMISES.get(plan.collective, ("all", "all"))
    at = 0
    for part in plan.parts:
        if part.begin != at or part.end <= part.begin:
            raise PlanError(
                f"part {part}: parts must tile the {plan.numel} elements, the next begins at {at}"
            )
        at = part.end
        for kind, rank in zip(kinds, (part.source, part.target), strict=True):
            good = {"all": rank == ALL, "root": rank == plan.root, "rank": rank != ALL}[kind]
            if not good or not ALL <= rank < plan.topology.world_size:
                raise PlanError(f"part {part}: no part of {plan.collective} with root {plan.root}")
    if (plan.parts and at != plan.numel) or (not plan.parts and plan.numel and kinds != ("all", "all")):
        raise PlanError(f"the parts of {plan.collective} end at {at} of {plan.numel} elements")


def _check_whole_regions(plan: Plan) -> None:
    """A codec that selects over a whole region must get each shard, or in two stages each slice, in one piece."""
    slices = sorted((s.region.begin, s.root) for s in plan.steps if s.op == "exchange_payload")
    begins = [begin for begin, _ in slices]
    first: dict[tuple[str, int, int, int], Step] = {}
    for step in _of_whole_regions(plan):
        at = bisect_right(begins, step.region.begin)
        place = (step.op, step.root, step.shard, slices[at - 1][1] if at else -1)
        if first.setdefault(place, step) is not step:
            what = "a slice of shard" if plan.exchange == "two_stage" else "shard"
            raise _fail(step, f"cuts {what} {step.shard}, which its compressor needs whole")


def _of_whole_regions(plan: Plan) -> list[Step]:
    """The steps that encode with a codec that selects over a whole region."""
    from hybridcomm.kernels.spec import CODECS, name_of, parse

    codecs = dict.fromkeys(("compress", "recompress"), plan.compressor)
    codecs["compress_intra"] = plan.intra_compressor
    whole = [op for op, text in codecs.items() if name_of(text) in CODECS and parse(text).whole_region]
    return [step for step in plan.steps if step.op in whole]


# -- 2. coverage -------------------------------------------------------------------------------------------


class _Atoms:
    """The elements between two neighbouring boundaries of regions: no step tells them apart."""

    def __init__(self, plan: Plan) -> None:
        parts = plan.parts or (Part(0, plan.numel, ALL, ALL),)
        edges = {0, plan.numel} | {edge for step in plan.steps for edge in step.region}
        edges |= {part.begin for part in parts}
        self.edges = sorted(edges)
        self.count = len(self.edges) - 1
        begins = [part.begin for part in parts]
        self.parts = [parts[bisect_right(begins, edge) - 1] for edge in self.edges[:-1]]  # of each atom

    def of(self, step: Step) -> range:
        return range(bisect_left(self.edges, step.region.begin), bisect_left(self.edges, step.region.end))

    def name(self, atom: int) -> str:
        return f"[{self.edges[atom]}:{self.edges[atom + 1]}]"


_Value = tuple[int, int]
"""What a rank holds in an atom: (bit mask of the ranks summed into it, divisor applied). Mask 0: garbage."""


class _Symbols:
    """Symbolic buffers and payloads of all ranks."""

    def __init__(self, plan: Plan, atoms: _Atoms) -> None:
        world = plan.topology.world_size
        self.atoms = atoms
        self.held: list[list[_Value]] = [
            [(1 << rank if part.source in (ALL, rank) else 0, 1) for part in atoms.parts]
            for rank in range(world)
        ]
        self.payloads: list[dict[tuple[int, int, int], list[_Value]]] = [{} for _ in range(world)]

    def run(self, step: Step) -> None:
        if step.op in ("reduce", "exchange_reduce"):
            for atom in self.atoms.of(step):
                values = [self.held[rank][atom] for rank in step.group]
                self.held[step.root][atom] = self._add(step, values, step.divisor)
        elif step.op in _SUMS_ALL:
            for atom in self.atoms.of(step):
                total = self._add(step, [self.held[rank][atom] for rank in step.group], step.divisor)
                for rank in step.group:
                    self.held[rank][atom] = total
        elif step.op in ("gather", "exchange_gather"):
            for atom in self.atoms.of(step):
                for rank in step.group:
                    self.held[rank][atom] = self._defined(step, self.held[step.root][atom])
        else:
            self._run_payload(step)

    def _run_payload(self, step: Step) -> None:
        for atom in self.atoms.of(step):
            key = (step.shard, step.chunk, atom)
            if step.op in ("compress", "compress_intra"):
                self.payloads[step.root][key] = [self._defined(step, self.held[step.root][atom])]
            elif step.op == "exchange_payload":
                own = [self.payloads[rank].get(key, []) for rank in step.group]
                if any(len(values) != 1 for values in own):
                    raise _fail(step, "an owner has no fresh payload of this shard and chunk to send")
                every = [values[0] for values in own]
                for rank in step.group if step.root == -1 else (step.root,):
                    self.payloads[rank][key] = every
            elif step.op == "reduce_payload":
                others = [self.payloads[rank].pop(key, []) for rank in step.group if rank != step.root]
                if any(len(values) != 1 for values in others):
                    raise _fail(step, "a rank of the node has no fresh payload of this shard and chunk")
                values = [self.held[step.root][atom], *(value for (value,) in others)]
                self.held[step.root][atom] = self._add(step, values, step.divisor)
            elif step.op == "recompress":
                total = self._add(step, self.payloads[step.root].get(key, []), step.divisor)
                self.payloads[step.root][key] = [total]
                self.held[step.root][atom] = (0, 1)  # the sum was only passing through: nobody else has it
            elif step.op == "exchange_recompressed":
                second = self.payloads[step.root].get(key, [])
                if len(second) != 1:
                    raise _fail(step, "its root has no second payload of this shard and chunk to send")
                for rank in step.group:
                    self.payloads[rank][key] = second
            else:
                values = self.payloads[step.root].get(key, [])
                self.held[step.root][atom] = self._add(step, values, step.divisor)

    @staticmethod
    def _defined(step: Step, value: _Value) -> _Value:
        if not value[0]:
            raise _fail(step, "reads elements that nothing was written to")
        return value

    def _add(self, step: Step, values: list[_Value], divisor: int) -> _Value:
        mask = 0
        for part, _ in values:
            if mask & part:
                raise _fail(step, f"counts rank {_first_common(mask, part)} twice")
            mask |= self._defined(step, (part, 1))[0]
        divisors = {before for _, before in values}
        if len(divisors) != 1:
            raise _fail(step, "has no payloads to add" if not values else "adds means to sums")
        return mask, divisors.pop() * divisor


def _first_common(left: int, right: int) -> int:
    common = left & right
    return (common & -common).bit_length() - 1


def _check_coverage(plan: Plan, atoms: _Atoms) -> None:
    symbols = _Symbols(plan, atoms)
    for step in plan.steps:
        symbols.run(step)
    world = plan.topology.world_size
    reduced: _Value = ((1 << world) - 1, world if plan.op == "mean" else 1)
    for rank in range(world):
        for atom, part in enumerate(atoms.parts):
            if part.target not in (ALL, rank):
                continue
            want = reduced if part.source == ALL else (1 << part.source, 1)
            if symbols.held[rank][atom] != want:
                mask, divisor = symbols.held[rank][atom]
                got = [r for r in range(world) if mask >> r & 1]
                raise PlanError(
                    f"rank {rank} ends with ranks {got} / {divisor} in elements {atoms.name(atom)}; "
                    f"{plan.collective} promises {[r for r in range(world) if want[0] >> r & 1]} / {want[1]}"
                )


# -- 3. dependencies ---------------------------------------------------------------------------------------


def _accesses(step: Step, rank: int) -> Iterator[tuple[str, bool]]:
    """(what, whether it is written) that ``step`` touches on ``rank``, for the elements of its region."""
    if step.op in ("reduce", "exchange_reduce"):
        yield "buffer", rank == step.root
    elif step.op in ("gather", "exchange_gather"):
        yield "buffer", rank != step.root
    elif step.op in _SUMS_ALL:
        yield "buffer", True
    elif step.op == "reduce_payload":
        yield ("buffer", True) if rank == step.root else ("payload", False)
    elif step.op in ("compress", "compress_intra"):
        yield "buffer", False
        yield "payload", True
    elif step.op == "exchange_payload":
        yield "payload", step.root in (-1, rank)
    elif step.op == "exchange_recompressed":
        yield "payload", rank != step.root
    elif step.op == "recompress":
        yield "payload", True
        yield "buffer", True
    else:
        yield "payload", False
        yield "buffer", True


def _check_dependencies(plan: Plan, atoms: _Atoms) -> None:
    """Every access must come, by a path of ``after`` on its rank, behind those that conflict with it."""
    for rank in range(plan.topology.world_size):
        writer: dict[tuple[str, int], int] = {}
        readers: dict[tuple[str, int], list[int]] = {}
        for step in plan.for_rank(rank):
            need: set[int] = set()
            for what, written in _accesses(step, rank):
                for atom in atoms.of(step):
                    place = (what, atom)
                    if place in writer:
                        need.add(writer[place])
                    if written:
                        need.update(readers.pop(place, ()))
                        writer[place] = step.id
                    else:
                        readers.setdefault(place, []).append(step.id)
            missing = need - _behind(plan, step, rank, min(need, default=0))
            if missing:
                raise _fail(step, f"on rank {rank} needs step {min(missing)} first; `after` misses it")


def _behind(plan: Plan, step: Step, rank: int, oldest: int) -> set[int]:
    """Ids, not older than ``oldest``, that ``step`` waits for on ``rank``, directly or through others."""
    seen: set[int] = set()
    todo = [before for before in step.after if before >= oldest]
    while todo:
        before = todo.pop()
        if before not in seen and rank in plan.steps[before].group:
            seen.add(before)
            todo += [older for older in plan.steps[before].after if older >= oldest]
    return seen
