"""Shape of the recommender, as validated data."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["MODEL_PRESETS", "ModelConfig"]

MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "wide": {"dim": 384, "layers": 2, "heads": 6, "hidden": 768},
    "deep": {"dim": 256, "layers": 6, "heads": 4, "hidden": 688},
}
"""Named shapes: ``small`` trains in about a minute on two cores; ``wide`` and ``deep`` have several million
parameters and are for measuring communication."""


class ModelConfig(BaseModel):
    """Shape of a decoder recommender; the number of items and the text width come from the data."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    dim: int = Field(64, ge=2, description="Width of the residual stream and of an item embedding.")
    layers: int = Field(2, ge=1, description="Number of decoder blocks.")
    heads: int = Field(2, ge=1, description="Attention heads; dim / heads must be even (RoPE turns pairs).")
    hidden: int = Field(128, ge=1, description="Inner width of the SwiGLU feed-forward layer.")
    max_len: int = Field(
        50, ge=1, description="Longest history the model reads, in items (most recent kept)."
    )
    dropout: float = Field(0.2, ge=0.0, lt=1.0, description="Dropout probability, training only.")
    tied: bool = Field(
        True, description="Score items with the input embeddings (tied) or a table of their own."
    )
    text: bool = Field(
        True, description="Add a projection of the item's text features when the data has text."
    )
    rope_base: float = Field(10_000.0, gt=1.0, description="Base of the rotary frequencies.")
    init_std: float = Field(0.02, gt=0.0, description="Standard deviation of the initial weights.")

    @model_validator(mode="after")
    def _head_width_is_even(self) -> ModelConfig:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(
                f"dim={self.dim} must be an even multiple of heads={self.heads}: RoPE turns pairs of channels"
            )
        return self
