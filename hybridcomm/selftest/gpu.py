"""What the self-test asks of a rank's GPU beside what the engine does: streams, graphs, delays, times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from hybridcomm.errors import UnsupportedError
from hybridcomm.store import C10dStore, DirectoryStore
from hybridcomm.stream_provider import StreamProvider, TorchCuda

if TYPE_CHECKING:
    import torch

    from hybridcomm.bootstrap import World

__all__ = ["Gpu", "TorchGpu", "nccl_peer"]

_CYCLES_PER_US = 1500  # of a clock of 1.5 GHz, as far as delays need it


class Gpu(StreamProvider, Protocol):
    """A provider that cases can also play with; one per rank, used by one thread."""

    @property
    def name(self) -> str:
        """The model, as its vendor calls it."""
        ...

    def synchronize(self) -> None:
        """The host waits for the current stream."""
        ...

    def other_stream(self) -> AbstractContextManager[int]:
        """A second stream, which is the current one meanwhile; at the end the host waits for it."""
        ...

    def capture(self) -> AbstractContextManager[list[Any]]:
        """What is put on the current stream goes into a graph, which stands in the list behind the end."""
        ...

    def replay(self, graph: Any) -> None:
        """Launches a graph on the current stream."""
        ...

    def forget(self, graph: Any) -> None: ...

    def delay(self, microseconds: int) -> None:
        """Keeps the current stream busy for about so long."""
        ...

    def mark(self) -> Any:
        """A point on the current stream."""
        ...

    def seconds(self, begin: Any, end: Any) -> float:
        """Device time between two points, in s; the host waits for the second."""
        ...


class TorchGpu(TorchCuda):
    """torch's current device in this process."""

    def __init__(self, ordinal: int) -> None:
        import torch

        super().__init__(torch.device("cuda", ordinal))
        if ordinal >= torch.cuda.device_count():
            raise UnsupportedError(
                f"GPU {ordinal} is not there: torch sees {torch.cuda.device_count()}, and each rank needs its own"
            )
        torch.cuda.set_device(self.device)

    @property
    def name(self) -> str:
        import torch

        return str(torch.cuda.get_device_name(self.device))

    def synchronize(self) -> None:
        import torch

        torch.cuda.current_stream(self.device).synchronize()

    @contextmanager
    def other_stream(self) -> Iterator[int]:
        import torch

        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            yield int(stream.cuda_stream)
            stream.synchronize()

    @contextmanager
    def capture(self) -> Iterator[list[Any]]:
        """Thread-local, so that the engine's watchdog may ask the driver meanwhile."""
        import torch

        graph: Any = torch.cuda.CUDAGraph()
        made: list[Any] = []
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            yield made
        made.append(graph)

    def replay(self, graph: Any) -> None:
        graph.replay()

    def forget(self, graph: Any) -> None:
        self.synchronize()
        graph.reset()

    def delay(self, microseconds: int) -> None:
        import torch

        torch.cuda._sleep(microseconds * _CYCLES_PER_US)  # type: ignore[no-untyped-call]

    def mark(self) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


@contextmanager
def nccl_peer(
    world: World, device: torch.device, timeout: float
) -> Iterator[Callable[[torch.Tensor], object]]:
    """torch.distributed's all-reduce over NCCL, with communicators of its own; all ranks enter it.

    Raises `UnsupportedError` where this torch has none.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available()):
        raise UnsupportedError("this torch is built without NCCL")
    if dist.is_initialized():
        raise UnsupportedError("torch.distributed has a process group already")
    dist.init_process_group(
        "nccl",
        store=_store(world),
        rank=world.rank,
        world_size=world.world_size,
        timeout=timedelta(seconds=timeout),
        device_id=device,
    )
    try:
        yield dist.all_reduce
    finally:
        dist.destroy_process_group()


def _store(world: World) -> Any:
    import torch.distributed

    dist: Any = torch.distributed  # which does not say that it exports its stores
    if isinstance(world.store, DirectoryStore):
        return dist.FileStore(str(world.store._path / "nccl-peer"), world.world_size)
    if isinstance(world.store, C10dStore):
        return dist.PrefixStore("nccl-peer", world.store._store)
    return dist.HashStore()
