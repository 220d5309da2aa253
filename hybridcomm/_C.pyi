"""The engine's Python face (csrc/bind_*.cpp). Addresses are those of caller-owned memory: see arrays.py."""

from collections.abc import Sequence
from typing import Any, final

OWN_REGION: int
"""Among the sources of a sum: this rank's own tensor."""

def best_isa() -> int: ...
def reduce(
    dtype: int, op: int, out: int, sources: Sequence[int], numel: int, *, divisor: int = 1, isa: int
) -> None: ...
def scale(dtype: int, data: int, numel: int, factor: float) -> None: ...
def blake2s(key: bytes, data: bytes) -> bytes: ...
def single_copy_pays() -> bool: ...
def describe(collective: int, dtype: int, op: int, codec: int, numel: int) -> str: ...

@final
class Kind:
    put: Kind
    reduce: Kind
    encode: Kind
    send: Kind
    receive: Kind
    sum: Kind
    decode: Kind
    publish: Kind
    get: Kind
    share: Kind
    collect: Kind
    decode_add: Kind
    __members__: dict[str, Kind]
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    def __index__(self) -> int: ...
    def __hash__(self) -> int: ...

class Program:
    scratch_nbytes: int
    def __init__(
        self,
        *,
        digest: int,
        numel: int,
        collective: int,
        dtype: int,
        op: int,
        codecs: Sequence[tuple[int, int, int, int, int]] = (),
        group: int = 0,
        members: str = "",
    ) -> None: ...
    @property
    def size(self) -> int: ...
    def add(
        self,
        kind: Kind,
        *,
        stream: int,
        step: int,
        peer: int = -1,
        begin: int = 0,
        count: int = 0,
        in_scratch: bool = False,
        offset: int = 0,
        nbytes: int = 0,
        residual: int = 0,
        divisor: int = 1,
        deliver: bool = False,
        after: Sequence[int] = ...,
        sources: Sequence[int] = ...,
        codec: int = 0,
        momentum: bool = False,
    ) -> int: ...

def set_custom(program: Program, codec: object) -> None: ...

class Listener:
    def __init__(self, host: str, port: int) -> None: ...
    @property
    def port(self) -> int: ...

class Work:
    """No constructor: an engine makes it."""

    def is_completed(self) -> bool: ...
    def wait(self, limit_s: float, /) -> bool: ...
    @property
    def seconds(self) -> float: ...
    @property
    def wire_nbytes(self) -> int: ...

class SharedMemory:
    """No constructor: `Engine.allocate` makes it. A writable buffer of bytes, whole pages."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

class Engine:
    def __init__(
        self,
        *,
        rank: int,
        local_ranks: Sequence[int],
        remote_peers: Sequence[tuple[int, str, int]],
        token: bytes,
        name: str,
        slot_nbytes: int,
        timeout_s: float,
        crowded: bool,
        single_copy: bool = True,
        listener: Listener,
        others: Sequence[tuple[int, str, int]] = ...,
    ) -> None: ...
    def run(
        self,
        program: Program,
        tensor: int,
        residual_in: int = 0,
        residual_out: int = 0,
        name: int = 0,
        pieces: Sequence[tuple[int, int]] = ...,
        timeout_s: float = 0.0,
        feedback: tuple[float, float, bool, int, int] = ...,
    ) -> Work: ...
    def submit(
        self,
        program: Program,
        tensor: int,
        residual_in: int = 0,
        residual_out: int = 0,
        name: int = 0,
        pieces: Sequence[tuple[int, int]] = ...,
        timeout_s: float = 0.0,
        feedback: tuple[float, float, bool, int, int] = ...,
    ) -> Work: ...
    def post(self, messages: Sequence[tuple[bool, int, int, int, int, int, int]]) -> Work: ...
    def exchange(self, messages: Sequence[tuple[bool, int, int, int, int, int, int]]) -> Work: ...
    def allocate(self, nbytes: int, /) -> SharedMemory | None: ...
    def shared_nbytes(self) -> int: ...
    def reach(self) -> dict[int, str]: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def listen(self) -> None: ...
    def counters(self) -> dict[str, int]: ...

class PreparedCalls:
    paused: bool
    def __init__(self, engine: Engine) -> None: ...
    def remember(self, like: Any, op: Any, program: Program) -> None: ...
    def run(self, array: Any, op: Any) -> bool: ...
    def remember_dtype(self, like: Any, dtype: int) -> None: ...
    def post(self, send: bool, array: Any, peer: int, group: int, tag: int) -> Work | None: ...
    def stamp(self, program: Program, name: int) -> int: ...

DEVICE_START: int

class DeviceKind:
    launch: DeviceKind
    copy: DeviceKind
    fill: DeviceKind
    all_reduce: DeviceKind
    reduce: DeviceKind
    reduce_scatter: DeviceKind
    all_gather: DeviceKind
    broadcast: DeviceKind
    all_to_all: DeviceKind
    send: DeviceKind
    receive: DeviceKind
    __members__: dict[str, DeviceKind]
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    def __index__(self) -> int: ...
    def __hash__(self) -> int: ...

class DeviceOp:
    """No constructor: `device_op` and `device_launch` make it."""

def device_op(
    kind: DeviceKind,
    *,
    stream: int,
    step: int,
    after: Sequence[int],
    group: int = -1,
    source: int = 0,
    target: int = 0,
    count: int = 0,
    comm: int = -1,
    peer: int = -1,
    dtype: int = 7,
    op: int = 0,
    divisor: int = 1,
    value: int = 0,
    factor: float | None = None,
) -> DeviceOp: ...
def device_launch(
    *,
    stream: int,
    step: int,
    after: Sequence[int],
    function: int,
    blocks: int,
    threads: int,
    shared_nbytes: int,
    arguments: bytes,
) -> DeviceOp: ...

class DeviceProgram:
    def __init__(
        self,
        *,
        digest: int,
        name: str,
        ops: Sequence[DeviceOp],
        tail: int,
        memory: Sequence[tuple[int, int]],
    ) -> None: ...

class GpuWork:
    """No constructor: `GpuEngine.start` makes it."""

    @property
    def captured(self) -> bool: ...

class GpuMemory:
    """No constructor: `GpuEngine.allocate` makes it."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def windows(self) -> int: ...

class GpuEngine:
    def __init__(
        self,
        *,
        device: int,
        streams: int,
        timeout_s: float,
        watch_s: float,
        nccl_files: Sequence[str],
        host: Engine | None,
        copy_engines: bool = False,
    ) -> None: ...
    @property
    def cuda_version(self) -> int: ...
    @property
    def nccl_version(self) -> int: ...
    @property
    def cuda_path(self) -> str: ...
    @property
    def nccl_path(self) -> str: ...
    @property
    def newer(self) -> list[str]: ...
    @property
    def copy_engines(self) -> bool: ...
    @property
    def compute_capability(self) -> int: ...
    def unique_id(self) -> bytes: ...
    def join(self, unique_ids: bytes, rank: int, size: int) -> int: ...
    def split(self, parent: int, color: int | None, key: int) -> int: ...
    def load(self, image: bytes, symbol: str, shared_nbytes: int) -> int: ...
    def capturing(self, stream: int) -> bool: ...
    def start(self, program: DeviceProgram, producer: int) -> GpuWork: ...
    def wait(self, work: GpuWork, consumer: int) -> None: ...
    def synchronize(self, work: GpuWork, limit_s: float) -> bool: ...
    def done(self, work: GpuWork) -> bool: ...
    def allocate(self, nbytes: int, windows: Sequence[int] = ...) -> GpuMemory: ...
    def fail(self, why: str) -> None: ...
    def check(self) -> None: ...
    def close(self) -> None: ...
