"""Weight gradients put off: the same bits as plain backward, when asked for. Over several ranks: test_linear.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hybridcomm.errors import UnsupportedError
from model.linear import Linear
from model.weight_gradients import recompute
from tests.model.stacks import grads, inputs, output, queued, same, stack
from tests.numerics import gamma


def plainly(microbatches: int, *, autocast: bool = False, checkpointed: bool = False) -> tuple[list, list]:
    """(weight gradients, input gradients) of plain backward over some microbatches."""
    module, found = stack(), []
    for microbatch in range(microbatches):
        x = inputs(microbatch)
        output(module, x, autocast=autocast, checkpointed=checkpointed).square().sum().backward()
        found.append(x.grad)
    return grads(module), found


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
