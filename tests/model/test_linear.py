"""Linear layers against torch's, and over several ranks, where weight gradients are put off too."""

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
from model.weight_gradients import recompute, weight_gradient
from tests.engine_ranks import engine_contexts
from tests.model.parallel import CONFIG, FEW_HEADS, Decoder, batch, bound, build, built
from tests.model.stacks import grads, inputs, output, queued, same, stack
from tests.numerics import gamma
from tests.ranks import run_ranks


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


# -- over several ranks ------------------------------------------------------------------------------------


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
