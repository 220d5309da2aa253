from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Params = tuple[int, int, int, int, int]

def available_isas() -> list[str]: ...
def active_isa() -> str: ...
def set_isa(isa: str | None) -> None: ...
def nbytes(params: Params, numel: int) -> int: ...
def whole_region(params: Params) -> bool: ...
def encode(
    params: Params,
    grad: npt.NDArray[np.float32],
    e_in: npt.NDArray[np.float32] | None,
    e_out: npt.NDArray[np.float32] | None,
    payload: npt.NDArray[np.uint8],
    digest: int,
    decay: float,
    seed: int,
    isa: str | None,
) -> int: ...
def decode(
    params: Params,
    payloads: Sequence[npt.NDArray[np.uint8]],
    out: npt.NDArray[np.float32],
    weight: float,
    digest: int,
    clear: bool,
    isa: str | None,
) -> tuple[int, int]: ...
