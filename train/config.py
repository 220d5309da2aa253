"""All settings of a training run, as validated data.

Precedence: defaults, then ``--preset``, then ``--config FILE``, then the command line. ``--print-config``
shows the outcome, which is itself a valid configuration file. Nothing here needs torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.computing import Computing
from model.config import MODEL_PRESETS, ModelConfig
from train import combinations
from train.errors import ConfigError
from train.synthetic import SyntheticConfig

__all__ = ["PRESETS", "OptimConfig", "TrainConfig", "WireConfig"]

_STRICT = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class OptimConfig(BaseModel):
    """AdamW and its schedule."""

    model_config = _STRICT

    lr: float = Field(4e-3, gt=0.0, description="Peak learning rate.")
    warmup_steps: int = Field(50, ge=0, description="Linear warm-up, in optimizer steps.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="Decay after the warm-up."
    )
    final_lr: float = Field(
        0.05, ge=0.0, le=1.0, description="Learning rate of the last step, as part of the peak."
    )
    weight_decay: float = Field(0.0, ge=0.0, description="Decoupled weight decay.")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="Decay of Adam's mean.")
    beta2: float = Field(0.999, ge=0.0, lt=1.0, description="Decay of Adam's second moment.")
    eps: float = Field(1e-8, gt=0.0, description="Adam's epsilon.")
    clip: float = Field(0.0, ge=0.0, description="Largest global gradient norm; 0 does not clip.")


class WireConfig(BaseModel):
    """How gradients travel."""

    model_config = _STRICT

    bucket_cap_mb: float | None = Field(
        None, gt=0.0, description="Bucket size, MiB; None lets the library choose."
    )
    timeout: float = Field(120.0, gt=0.0, description="Seconds without progress before a run gives up.")
    ddp_hook: Literal["none", "fp16", "powersgd"] = Field(
        "none", description="Communication hook of --comm ddp."
    )


class TrainConfig(BaseModel):
    """Trains a sequential recommender over several ranks and evaluates it by full ranking."""

    model_config = _STRICT

    preset: str = Field("demo", description="Named settings to start from: demo, scientific, speed.")
    data: Path | None = Field(
        None, description="Data directory (interactions.tsv.gz); without it data is generated."
    )
    nproc: int = Field(4, ge=1, description="Ranks to start on this machine (ignored under torchrun).")
    nodes: int = Field(2, ge=1, description="Virtual nodes to spread them over (ignored under torchrun).")
    epochs: int = Field(14, ge=1, description="Passes over the users.")
    batch_size: int = Field(128, ge=1, description="Users per optimizer step, over all ranks.")
    tp: int = Field(1, ge=1, description="Ranks of a node that share each layer (tensor parallelism).")
    sequence: bool = Field(
        False, description="Split tokens over the tp ranks between layers (sequence parallelism)."
    )
    pp: int = Field(1, ge=1, description="Pipeline ranks; what tp and pp leave are replicas.")
    schedule: str = Field(
        "auto", description="Of the pipeline: gpipe, 1f1b, interleaved, zb-h1, zbv, dualpipev; auto: zbv."
    )
    chunks: int | None = Field(None, ge=1, description="Stages per rank, of an interleaved schedule.")
    split_head: bool = Field(False, description="Split the items that are scored over all pipeline ranks.")
    negatives: int = Field(
        0, ge=0, description="Train against so many items, drawn anew in each step (sampled softmax); 0: all."
    )
    microbatches: int | None = Field(
        None, ge=1, description="Per optimizer step and replica (default: 1, with a pipeline 2 per rank)."
    )
    outer: Literal["dp", "pp"] = Field("pp", description="The axis that spans the nodes.")
    autocast: Literal["none", "bf16"] = Field(
        "none", description="bf16: products of blocks in bf16; weights, loss and gradients' sums stay fp32."
    )
    checkpoint: bool = Field(
        False, description="Keep each block's input alone for backward, which computes the block again."
    )
    compile: bool = Field(False, description="Compile blocks by torch.compile; the first steps take minutes.")
    zero: Literal[0, 1] = Field(
        0, description="1: a node's replicas share the optimizer's state out among themselves (ZeRO-1)."
    )
    eval_every: int = Field(
        2, ge=1, description="Epochs between validations; the best one's weights are tested."
    )
    max_steps: int = Field(0, ge=0, description="Stop after this many optimizer steps; 0 runs all epochs.")
    seed: int = Field(0, ge=0, description="Seed of weights, dropout and order.")
    device: Literal["cpu", "cuda"] = Field(
        "cpu",
        description="cuda: each rank trains on the GPU of its place on the node (torchrun's LOCAL_RANK).",
    )
    comm: Literal["hybridcomm", "ddp"] = Field(
        "hybridcomm", description="Who averages gradients; ddp is the peer."
    )
    compress: str = Field(
        "topk:0.01", description="Between nodes: none, topk:RATIO, int8, auto, ..., or none,topk:RATIO@STEP."
    )
    text_features: int = Field(256, ge=1, description="Width of the text features, for data with item text.")
    profile: bool = Field(
        False,
        description="Write the last step's timeline: profile.json (Perfetto), timeline.png, timeline.svg.",
    )
    emulate: float | None = Field(
        None,
        gt=0.0,
        description="Train nothing: a layer takes so many s per 1,000 tokens, communication is real.",
    )
    threads: int = Field(1, ge=1, description="Compute threads per rank.")
    run_dir: Path | None = Field(
        None, description="Where metrics.jsonl and config.json go (default: runs/TIME)."
    )
    model: ModelConfig = Field(ModelConfig(), description="Shape of the model.")
    optim: OptimConfig = Field(OptimConfig(), description="Optimizer and schedule.")
    wire: WireConfig = Field(WireConfig(), description="Communication details.")
    synthetic: SyntheticConfig = Field(SyntheticConfig(), description="Generated data, used without --data.")

    @property
    def pipeline(self) -> str:
        """The schedule by name: what ``auto`` stands for."""
        if self.schedule != "auto":
            return self.schedule
        return "zbv" if self.pp > 1 else "1f1b"

    @property
    def pieces(self) -> int:
        """Microbatches of a replica in an optimizer step."""
        return self.microbatches or (2 * self.pp if self.pp > 1 else 1)

    @property
    def computing(self) -> Computing:
        """How blocks are computed."""
        backend = "inductor" if self.compile else None
        return Computing(autocast=self.autocast, checkpoint=self.checkpoint, compile=backend)

    @model_validator(mode="after")
    def _options_act(self) -> TrainConfig:
        try:
            combinations.check(self)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if (
            self.optim.final_lr > 0
            and self.optim.schedule == "constant"
            and "final_lr" in self.optim.model_fields_set
        ):
            raise ValueError("--optim.final-lr does nothing with --optim.schedule constant")
        if self.pp == 1 and (self.schedule != "auto" or self.chunks is not None):
            raise ValueError("--schedule and --chunks act on a pipeline: pass --pp too")
        if self.chunks is not None and self.schedule != "interleaved":
            raise ValueError("--chunks acts on --schedule interleaved only")
        if self.split_head and self.pp == 1:
            raise ValueError("--split-head shares out the items over pipeline ranks: pass --pp too")
        if self.split_head and self.negatives:
            raise ValueError("--negatives leaves few items to score: leave out --split-head")
        if self.profile and self.comm == "ddp":
            raise ValueError("--profile draws what --comm hybridcomm runs; DDP has no list of instructions")
        if self.emulate is not None and self.comm == "ddp":
            raise ValueError("--emulate plays what --comm hybridcomm runs: leave out --comm ddp")
        self._backend_acts()
        if self.sequence and self.tp == 1:
            raise ValueError("--sequence splits tokens over tensor-parallel ranks: pass --tp too")
        if self.nodes > self.nproc:
            raise ValueError(
                f"--nodes {self.nodes} needs as many ranks or more, --nproc is {self.nproc}; pass both"
            )
        return self

    def _backend_acts(self) -> None:
        if self.comm != "ddp" and self.wire.ddp_hook != "none":
            raise ValueError("--wire.ddp-hook acts on --comm ddp only")
        if self.device == "cuda" and self.split_head:
            raise ValueError("--split-head on GPUs is not there yet: leave it out, or --device cuda")
        if self.device == "cuda" and (self.comm == "ddp" or self.emulate is not None):
            raise ValueError("--device cuda goes with --comm hybridcomm, and without --emulate")


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "scientific": {
        "epochs": 20,
        "batch_size": 128,
        "optim": {"lr": 3e-3, "warmup_steps": 200},
        "model": {"dropout": 0.4},
    },
    "speed": {
        "epochs": 2,
        "optim": {"lr": 1e-3},
        "model": MODEL_PRESETS["wide"],
        "synthetic": {"users": 4000, "items": 4400, "clusters": 40},
    },
}
"""``demo``: under two minutes on two cores. ``scientific``: for amazon-scientific-2018. ``speed``: a model of
4.6 M parameters, to measure communication; it takes --data too."""
