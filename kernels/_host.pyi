from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

def available_isas() -> list[str]: ...
def active_isa() -> str: ...
def set_isa(isa: str | None) -> None: ...
def topk_nbytes(block: int, k: int, value_bits: int, numel: int) -> int: ...
def topk_encode(
    block: int,
    k: int,
    value_bits: int,
    grad: npt.NDArray[np.float32],
    e_in: npt.NDArray[np.float32] | None,
    e_out: npt.NDArray[np.float32] | None,
    payload: npt.NDArray[np.uint8],
    digest: int,
    isa: str | None,
) -> int: ...
def topk_decode(
    block: int,
    k: int,
    value_bits: int,
    payloads: Sequence[npt.NDArray[np.uint8]],
    out: npt.NDArray[np.float32],
    weight: float,
    digest: int,
    clear: bool,
    isa: str | None,
) -> tuple[int, int]: ...
