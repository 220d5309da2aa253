"""What embedding and head cost beside a layer, in multiply-adds: what a model is cut into stages by."""

from __future__ import annotations

from train.replica import ModelSpec

__all__ = ["relative_costs"]

_ROW = 64  # tokens of a row, which attention looks at
_TOKENS = 512  # of a microbatch, among which the projection of all items' text is shared out
_AGAIN = 4 / 3  # what is computed once more in backward: the head's scores, checkpointed layers


def relative_costs(spec: ModelSpec) -> tuple[float, float]:
    """(embedding, head), where a layer is 1: forward and backward for a token."""
    config = spec.config
    layer = 4 * config.dim**2 + 3 * config.dim * config.hidden + 2 * _ROW * config.dim
    layer *= _AGAIN if spec.computing.checkpoint else 1
    text = 0.0
    if spec.features is not None and config.text:
        text = spec.num_items * spec.features.shape[1] * config.dim / _TOKENS
    head = _AGAIN * config.dim * spec.num_items + (text if config.tied else 0.0)
    return text / layer, head / layer
