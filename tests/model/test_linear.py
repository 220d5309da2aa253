"""Linear layers against torch's, and weight gradients put off: the same bits as plain backward, when asked for."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybridcomm.context import Context
from hybridcomm.errors import UnsupportedError
from hybridcomm.topology import Topology
from model import linear
from model.config import ModelConfig
from model.linear import ColumnLinear, Linear, RowLinear
from model.sharding import join_states
from model.tensor_parallel import ALONE, TensorParallel
from model.weight_gradients import Deferrable, WeightGradients, recompute, weight_gradient
from tests.engine_ranks import engine_contexts
from tests.model.parallel import CONFIG, FEW_HEADS, Decoder, batch, bound, build, built
from tests.numerics import gamma
from tests.ranks import run_ranks


def stack() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(Linear(7, 9), nn.SiLU(), Linear(9, 9), nn.SiLU(), Linear(9, 5))


def inputs(microbatch: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 + microbatch)
    return torch.randn(2, 6, 7, generator=generator, requires_grad=True)


def grads(module: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in module.parameters()]


def same(left: list[Tensor | None], right: list[Tensor | None]) -> bool:
    return all(
        a is not None and b is not None and torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


def queued(module: nn.Module) -> WeightGradients:
    return WeightGradients(Deferrable.of(module))


def plainly(microbatches: int, *, autocast: bool = False, checkpointed: bool = False) -> tuple[list, list]:
    """(weight gradients, input gradients) of plain backward over some microbatches."""
    module, found = stack(), []
    for microbatch in range(microbatches):
        x = inputs(microbatch)
        output(module, x, autocast=autocast, checkpointed=checkpointed).square().sum().backward()
        found.append(x.grad)
    return grads(module), found


def output(module: nn.Module, x: Tensor, *, autocast: bool = False, checkpointed: bool = False) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (0, 7)])
def test_equals_torch(shape: tuple[int, ...], autocast: bool) -> None:
    ours = Linear(7, 4)
    torchs = nn.Linear(7, 4, bias=False)
    torchs.load_state_dict(ours.state_dict())
    results = []
    for module in (ours, torchs):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
        y = output(module, x, autocast=autocast)
        y.float().square().sum().backward()
        results.append((y, x.grad, module.weight.grad))
    for left, right in zip(*results, strict=True):
        assert left.dtype == right.dtype
        size = float(right.detach().abs().max()) if right.numel() else 0.0
        bound = 2 * gamma(2 * max(shape[0] * 3, 7, 4), "bfloat16" if autocast else "float32") * size
        torch.testing.assert_close(left, right, rtol=0.0, atol=bound)


def test_dtypes_mix_under_autocast_only() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        Linear(7, 4)(torch.ones(2, 7, dtype=torch.bfloat16))


def test_one_seed_draws_torchs_weights() -> None:
    torch.manual_seed(5)
    ours = Linear(7, 4)
    torch.manual_seed(5)
    assert torch.equal(ours.weight, nn.Linear(7, 4, bias=False).weight)
    torch.manual_seed(5)
    assert torch.equal(ours.weight, ColumnLinear(7, 4).weight)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointed", [None, "inputs kept", "recomputed"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_put_off_gradients_are_those_of_plain_backward(
    order: tuple[int, ...], checkpointed: str | None, autocast: bool
) -> None:
    """Three microbatches in flight: after all backward passes no weight has a gradient, inputs have theirs."""
    options = {"autocast": autocast, "checkpointed": checkpointed is not None}
    weights, xs = plainly(3, **options)
    module, given = stack(), [inputs(microbatch) for microbatch in range(3)]
    if checkpointed == "recomputed":
        recompute(module)
    queues, outputs = [queued(module) for _ in given], []
    for queue, x in zip(queues, given, strict=True):
        with queue.collect():
            outputs.append(output(module, x, **options).square().sum())
    found = [queue.backward(y, x=x) for queue, y, x in zip(queues, outputs, given, strict=True)]
    assert grads(module) == [None] * 3
    assert same(found, xs)
    assert [len(queue) for queue in queues] == [3, 3, 3]
    if order == (0, 1, 2):
        for queue in queues:
            queue.run()
        assert same(grads(module), weights)
        assert all(len(queue) == 0 for queue in queues)
    else:  # sums in another order: of other bits, but of the same value
        for place in order:
            queues[place].run()
        for found, exact in zip(grads(module), weights, strict=True):
            torch.testing.assert_close(
                found, exact, rtol=0.0, atol=gamma(8, "float32") * 3 * float(exact.abs().max())
            )


def test_plain_and_put_off_microbatches_mix() -> None:
    weights, _ = plainly(2)
    module = stack()
    queue = queued(module)
    with queue.collect():
        y = output(module, inputs(0)).square().sum()
    queue.backward(y)
    queue.run()
    output(module, inputs(1)).square().sum().backward()
    assert same(grads(module), weights)


def test_done_is_called_once_when_a_weight_is_complete() -> None:
    """Also for a weight that is used twice; the parameters' hooks do not fire."""
    shared, last = Linear(7, 7), Linear(7, 7)
    queue, fired = queued(nn.ModuleList([shared, last])), []
    for parameter in (shared.weight, last.weight):
        parameter.register_post_accumulate_grad_hook(fired.append)
    with queue.collect():
        y = last(shared(shared(inputs(0)).tanh())).sum()
    queue.backward(y)
    seen: list[tuple[Tensor, Tensor]] = []
    queue.run(lambda weight: seen.append((weight, weight.grad.clone())))
    assert fired == []
    assert [weight is each for (weight, _), each in zip(seen, (last.weight, shared.weight), strict=True)] == [
        True
    ] * 2
    assert all(torch.equal(then, weight.grad) for weight, then in seen)
    assert queue.run(seen.append) is None
    assert len(seen) == 2


def test_frozen_weights_are_left_out() -> None:
    module = stack()
    module[2].weight.requires_grad_(False)
    queue = queued(module)
    with queue.collect():
        y = output(module, inputs(0)).sum()
    queue.backward(y)
    assert len(queue) == 2


class Projected(nn.Module):
    """rows = own + projection: both have one gradient, which torch hands to both as one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.own, self.projection = nn.Parameter(torch.randn(6, 4)), Linear(5, 4)

    def forward(self, features: Tensor) -> Tensor:
        return self.own + self.projection(features)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
def test_a_leafs_gradient_is_its_own(recomputed: bool, expanded: bool) -> None:
    """Adding a second microbatch's to it changes nothing that is still to be computed from the first one's."""
    features = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(4))
    gradients = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(5))

    def gradient(microbatch: int) -> Tensor:
        return gradients[microbatch, :1].expand(6, 4) if expanded else gradients[microbatch].clone()

    plain, module = Projected(), Projected()
    if recomputed:
        recompute(module)
    queues = [queued(module) for _ in features]
    for microbatch, queue in enumerate(queues):
        plain(features[microbatch]).backward(gradient(microbatch))
        with queue.collect():
            y = module(features[microbatch])
        queue.backward(y, gradient(microbatch))
    for queue in queues:
        queue.run()
    assert same(grads(module), grads(plain))


def test_two_queues_at_once_are_refused() -> None:
    module = stack()
    with queued(module).collect(), pytest.raises(UnsupportedError, match="another queue"):  # noqa: SIM117
        with queued(module[0]).collect():
            pass
    assert all(layer.queue is None for layer in module.modules() if isinstance(layer, Linear))


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_computed_weight_cannot_be_put_off(recomputed: bool) -> None:
    layer = Linear(7, 4)
    if recomputed:
        recompute(layer)
    queue = queued(layer)
    doubled = {"weight": layer.weight * 2}
    with pytest.raises(UnsupportedError, match="computed from others"):  # noqa: PT012 (in one of two parts)
        with queue.collect():
            y = torch.func.functional_call(layer, doubled, (inputs(0),)).sum()
        queue.backward(y)


def test_a_queue_that_is_forgotten_goes_with_what_it_holds(contexts: list[Context]) -> None:
    """After an error nobody runs it."""

    def body(context: Context) -> tuple[weakref.ref, weakref.ref]:
        layers = stacks[context.rank]
        queue = queued(layers)
        x = torch.ones(3, 4, requires_grad=True)
        with queue.collect():
            y = layers(x)
        queue.backward(y.sum(), x=x)
        assert len(queue) == 2
        return weakref.ref(queue), weakref.ref(y)

    stacks = built(contexts, 2, lambda tp: nn.Sequential(ColumnLinear(4, 6, tp=tp), RowLinear(6, 4, tp=tp)))
    found = run_ranks(body, contexts[:2])
    assert [ref() for refs in found for ref in refs] == [None] * 4


def test_control_a_gradient_put_off_by_another_sum_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that replaces instead of adds, as a reader of ``weight.grad is None`` might get wrong."""
    weights, _ = plainly(2)
    module = stack()
    queues = [queued(module), queued(module)]
    for microbatch, queue in enumerate(queues):
        with queue.collect():
            y = output(module, inputs(microbatch)).square().sum()
        queue.backward(y)
    queues[0].run()
    module.zero_grad()
    queues[1].run()
    assert not same(grads(module), weights)


# -- over several ranks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("config", [CONFIG, FEW_HEADS], ids=["tied", "untied"])
def test_ranks_put_off_the_same_bits(
    contexts: list[Context], config: ModelConfig, sequence: bool, checkpointed: bool
) -> None:
    """A decoder's gradients over 3 ranks, put off for two microbatches and run afterwards, equal plain ones.

    A table of its own is put off as well; one that is computed from features gets its gradient at once.
    """

    def body(decoders: list[Decoder], context: Context) -> None:
        plain, delayed = decoders[context.rank]
        if checkpointed:
            for block in (*plain.blocks, *delayed.blocks):
                wrap(block)
            recompute(delayed)
        data = batch()
        for _ in range(2):
            plain.loss(data).backward()
        queues, losses = [queued(delayed), queued(delayed)], []
        for queue in queues:
            with queue.collect():
                losses.append(delayed.loss(data))
        for queue, loss in zip(queues, losses, strict=True):
            queue.backward(loss)
        split = [layer for layer in delayed.modules() if isinstance(layer, Linear)]
        assert all(layer.weight.grad is None for layer in split)
        assert delayed.table.embedding.grad is not None
        assert delayed.head is None or delayed.head.embedding.grad is None
        for queue in queues:
            queue.run()
        assert same(grads(delayed), grads(plain))

    models = built(contexts, 3, lambda tp: (build(tp, config), build(tp, config)), sequence=sequence)
    run_ranks(lambda context: body(models, context), contexts[:3])


def wrap(block: nn.Module) -> None:
    inner = block.forward
    block.forward = lambda *args: checkpoint(inner, *args, use_reentrant=False)


@pytest.mark.parametrize("sequence", [False, True])
def test_autocast_over_ranks(contexts: list[Context], sequence: bool) -> None:
    """A column and a row layer over 3 ranks against fp64: products and sums over ranks in bf16, gradients in fp32."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(10, 8, generator=generator)

    def body(context: Context) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        pair = pairs[context.rank]
        tp = pair[0].tp
        own = (x.split(list(tp.sizes(10)))[tp.rank] if sequence else x).clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = pair[1](pair[0](own, 10), 10)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        return y.detach(), own.grad, {name: p.grad for name, p in pair.named_parameters()}

    def make(tp: TensorParallel) -> nn.ModuleList:
        torch.manual_seed(6)
        return nn.ModuleList([ColumnLinear(8, 7, tp=tp), RowLinear(7, 5, tp=tp)])

    pairs = built(contexts, 3, make, sequence=sequence)
    found = run_ranks(body, contexts[:3])
    first, second = (weight.double() for weight in make(ALONE).parameters())
    first, second = first.detach().requires_grad_(), second.detach().requires_grad_()
    wide = x.double().requires_grad_()
    exact = wide @ first.T @ second.T
    exact.sum().backward()
    # Operands, the inner activation or gradient, each rank's product and the steps of the sum are rounded to bf16.
    error = gamma(3 + 1 + 1 + 3, "bfloat16")
    sizes = [x.abs().double(), first.detach().abs(), second.detach().abs()]
    ones = torch.ones(10, 5, dtype=torch.float64)
    y, grad = (torch.cat([each[part] for each in found]) if sequence else found[0][part] for part in (0, 1))
    assert ((y.double() - exact).abs() <= error * (sizes[0] @ sizes[1].T @ sizes[2].T)).all()
    assert ((grad.double() - wide.grad).abs() <= error * (ones @ sizes[2] @ sizes[1])).all()
    whole = join_states([weights for _, _, weights in found], pairs[0])
    assert ((whole["0.weight"] - first.grad).abs() <= error * ((ones @ sizes[2]).T @ sizes[0])).all()
    assert ((whole["1.weight"] - second.grad).abs() <= error * (ones.T @ (sizes[0] @ sizes[1].T))).all()


@pytest.mark.parametrize("size", [1, 2])
def test_compiled_blocks_work_and_put_off(size: int) -> None:
    """Linear layers are breaks in the graphs, so queues collect there too: tracing one block is enough to see it. A
    rank may wait long for one that traces, so the contexts have patience."""
    with engine_contexts(Topology.virtual(1, size), timeout=100.0) as patient:
        models = built(patient, size, lambda tp: (build(tp), build(tp)))
        for _, compiled in models:
            compiled.blocks[0].compile(backend="eager")
        run_ranks(lambda context: compare(*models[context.rank]), patient, timeout=110.0)


def compare(plain: Decoder, compiled: Decoder) -> None:
    plain.loss(batch()).backward()
    queue = queued(compiled)
    with queue.collect():
        loss = compiled.loss(batch())
    queue.backward(loss)
    assert len(queue) == 4 * len(compiled.blocks) + 1
    queue.run()
    for found, exact in zip(grads(compiled), grads(plain), strict=True):
        torch.testing.assert_close(found, exact, rtol=0.0, atol=bound(exact, "float64"))


def test_layers_that_put_nothing_off_are_torchs_own() -> None:
    """The same bits from a plain product, and a block that compiles in one graph."""
    module, plain = stack(), stack()
    recompute(module)  # an autograd function of ours
    for each in (module, plain):
        each(inputs(0)).square().sum().backward()
    assert same(grads(plain), grads(module))
    assert "MmBackward" in type(plain[:1](inputs(0).flatten(0, 1)).grad_fn).__name__
    decoder = build(ALONE)
    want = decoder.loss(batch()).detach()
    torch.compiler.reset()  # what other tests have compiled counts towards a limit, past which frames are left out
    for block in decoder.blocks:
        block.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(decoder.loss(batch()), want, rtol=bound(want, "float64"), atol=0.0)


class Recorded:
    """A group that notes what is issued and waited for."""

    def __init__(self, group: object, log: list[str]) -> None:
        self._group, self._log = group, log

    def __getattr__(self, name: str) -> object:
        return getattr(self._group, name)

    def allreduce(self, tensor: Tensor, *, async_op: bool = False) -> object:
        self._log.append("all-reduce" + (", asynchronous" if async_op else ""))
        work = self._group.allreduce(tensor, async_op=async_op)
        return Waited(work, self._log) if async_op else work


class Waited:
    def __init__(self, work: object, log: list[str]) -> None:
        self._work, self._log = work, log

    def wait(self) -> None:
        self._log.append("wait")
        self._work.wait()


def test_the_sum_over_ranks_is_under_way_while_the_weight_gradient_is_computed(
    contexts: list[Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs: list[list[str]] = [[], []]
    right = weight_gradient

    def noted(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        logs[int(x[0, 0] > 0)].append("weight gradient")
        return right(grad, x, dtype)

    monkeypatch.setattr(linear, "weight_gradient", noted)

    def body(context: Context) -> None:
        layer, x = layers[context.rank], torch.full((3, 4), float(context.rank), requires_grad=True)
        layer(x).sum().backward()

    tps = [
        TensorParallel(group=Recorded(context.group([0, 1]), logs[context.rank])) for context in contexts[:2]
    ]
    layers = [ColumnLinear(4, 6, tp=tp) for tp in tps]
    run_ranks(body, contexts[:2])
    assert logs == [["all-reduce, asynchronous", "weight gradient", "wait"]] * 2


@pytest.mark.parametrize("sizes", [(3, 4), (7,), (3, 3, 1)])
def test_sizes_that_do_not_fit_are_refused(contexts: list[Context], sizes: tuple[int, ...]) -> None:
    tp = TensorParallel(group=contexts[0].group([0, 1]))
    with pytest.raises(UnsupportedError, match="cannot be split over 2 ranks"):
        RowLinear(8, 4, tp=tp, sizes=sizes)


def test_a_whole_layer_is_its_own_single_rank() -> None:
    layer = ColumnLinear(4, 6, tp=ALONE)
    assert layer.weight.shape == (6, 4)
    assert layer(torch.ones(2, 4)).shape == (2, 6)
