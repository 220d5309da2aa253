"""The decoder recommender, or a contiguous part of it: item sequence in, a loss or one score per catalogue item out.

1. embed    item id embedding, plus a projection of the item's frozen text features when there are any
2. decode   pre-norm blocks under a causal mask that also keeps packed users apart
3. score    the final state against every item (tied or own table)

A pipeline stage is a `Recommender` of a part. Parameters have the same names and the same first values in every part,
so the states of all stages together are the state of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hybridcomm.errors import UnsupportedError
from model.computing import PLAIN, Computing
from model.config import ModelConfig
from model.dropout import Dropout, derive_draws, fresh_draws
from model.layers import Block, RMSNorm, RotaryTables
from model.linear import Linear
from model.parts import Part
from model.ranking import target_ranks
from model.sharding import draw_whole
from model.tensor_parallel import ALONE, COPY, GATHER, TensorParallel, through
from model.vocab import ItemTable, Negatives, embed, item_loss, sampled_item_loss

__all__ = ["Recommender", "draw_seed", "draw_unit"]


def draw_seed() -> int:
    """What a model's weights are drawn from; taken from torch's generator."""
    return int(torch.randint(2**40, ()))


def draw_unit(unit: nn.Module, seed: int, std: float, *, rank: int) -> None:
    """Draws the linear weights of a block or table from N(0, std^2), and a table's rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(unit, ItemTable):
            unit.draw(std)
        for layer in unit.modules():
            if isinstance(layer, Linear):
                draw_whole(layer, "weight", lambda whole: nn.init.normal_(whole, std=std), rank=rank)


class Recommender(nn.Module):
    """Scores the next item of a sequence.

    ``text_features`` is a frozen fp32 tensor [items, features] or None. It is a buffer that checkpoints
    leave out: it is a pure function of the data. Sequences of several users may share a row: ``segments``
    tells them apart. ``tp``: the ranks that share each layer. ``part``: the whole by default; a part that neither
    embeds nor (tied) scores has no item table. ``split_head``: items are scored elsewhere (`model.head`); the last part
    ends with the states that are to be scored.
    ``computing``: see `Computing`.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_items: int,
        text_features: Tensor | None = None,
        *,
        part: Part | None = None,
        tp: TensorParallel = ALONE,
        split_head: bool = False,
        computing: Computing = PLAIN,
    ) -> None:
        super().__init__()
        seed = draw_seed()  # before layers are made, which draw too: as many as the part has
        self.split_head = split_head
        self.config, self.num_items, self.tp = config, num_items, tp
        self.computing = computing
        self.part = Part.whole(config.layers) if part is None else part
        self.part.check(config.layers)
        features = text_features if config.text else None
        self.table = self.head = None
        if self.part.embeds or (self.part.scores and config.tied and not split_head):
            self.table = ItemTable(num_items, config.dim, features=features, tp=tp)
        self.embedding_dropout = Dropout(config.dropout, place=0, channels=config.dim, tp=tp)
        self.rotary = RotaryTables(config)
        self.blocks = nn.ModuleDict({str(layer): Block(config, tp=tp) for layer in self.part.layers})
        for block in self.blocks.values():
            computing.prepare(block)
        if self.part.scores:
            self.final_norm = RMSNorm(config.dim, tp=tp)
            if not config.tied and not split_head:
                self.head = ItemTable(num_items, config.dim, tp=tp)
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int) -> None:
        """Draws all weights: table, head and each block from a seed of its own, so a part has what the whole has there.

        The constructor takes ``seed`` from the global torch generator; seed that first.
        """
        units = [(0, self.table), (1, self.head), *((2 + int(k), block) for k, block in self.blocks.items())]
        for number, unit in units:
            if unit is not None:
                draw_unit(unit, seed * 4096 + number, self.config.init_std, rank=self.tp.rank)

    def forward(
        self,
        items: Tensor,
        segments: Tensor,
        positions: Tensor,
        picks: Tensor,
        targets: Tensor | None = None,
        x: Tensor | None = None,
        *,
        negatives: Negatives | None = None,
        draws: Tensor | None = None,
    ) -> Tensor:
        """Runs the part: from items, or ``x``, what the part before it gave; to the loss, scores, or what comes next.

        ``items``, ``segments``, ``positions`` (below ``max_len``) are int64 [B, T]; tokens attend to earlier tokens of
        their own segment.
        Between parts go vectors [B, T, D]; under sequence parallelism this rank's tokens of them, [n, D]. ``picks`` is
        int64 [N], indices into the B * T tokens. The last part returns with ``targets`` [N] the sum over the picked
        tokens of the cross-entropy over all items, in nats, equal on all ranks (``negatives``: over these alone, as
        `sampled_item_loss` has it); without them the scores of the items that this rank's table has, [N, rows]. With a
        split head it returns the picked tokens' states, [N, D].

        ``draws`` int64 [B, T] are what dropout makes its masks of, a number for each token: with those of (step, user,
        position) the masks are the same however users are shared out and models cut up. Without, they come from
        torch's generator, which ranks that share layers refuse.

        A sum and not a mean: the caller divides once by the global number of predictions, so that the gradient of a
        ragged batch over any number of ranks is that of one process (a mean of means is not).
        """
        x, rows = self._run(items, segments, positions, x, draws)
        if not self.part.scores:
            return x
        hidden = self._final(x, segments.numel(), picks)
        if self.split_head:  # each rank's gradient is of its own shards: summed here, as GATHER does
            return hidden if self.tp.sequence else through(hidden, COPY, self.tp)
        table, rows = self._scoring(rows)
        if targets is None:
            return hidden @ rows.T
        if negatives is not None:
            return sampled_item_loss(hidden, rows, targets, table.items, negatives=negatives)
        return item_loss(hidden, rows, targets, table.items, owner=table)

    def target_ranks(
        self,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor],
        targets: Tensor,
        histories: Sequence[np.ndarray],
        x: Tensor | None = None,
    ) -> Tensor:
        """The last part, for evaluation: each target's rank among the items that are not in its history, int64 [N].

        ``inputs`` are the first four arguments of `forward`; see `model.ranking.target_ranks`. Equal on all ranks.
        """
        items, segments, positions, picks = inputs
        x, rows = self._run(items, segments, positions, x)
        table, rows = self._scoring(rows)
        hidden = self._final(x, segments.numel(), picks)
        return target_ranks(hidden, rows, targets, table.items, histories=histories)

    def _run(
        self,
        items: Tensor,
        segments: Tensor,
        positions: Tensor,
        x: Tensor | None,
        draws: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What comes out of the part's last block, and the rows of its table."""
        if draws is None and self.embedding_dropout.active:
            draws = fresh_draws(segments, self.tp)
        with self.computing.precision(items):
            rows = None if self.table is None else self.table()
            if self.table is not None and rows is not None and self.part.embeds:
                x = self.embedding_dropout(embed(items, rows, self.table.items), draws)
            if x is None:
                raise UnsupportedError(
                    f"the part {self.part} continues another one: give it that one's output"
                )
            return self._decode(x, segments, positions, draws), rows

    def _scoring(self, rows: Tensor | None) -> tuple[ItemTable, Tensor]:
        """The table that items are scored with, and its rows: those of the input's, if the model is tied."""
        if self.head is not None:
            return self.head, self.head()
        if self.table is None or rows is None:
            raise UnsupportedError(f"the part {self.part} does not score")
        return self.table, rows

    def _decode(self, x: Tensor, segments: Tensor, positions: Tensor, draws: Tensor | None) -> Tensor:
        mask = (segments[:, :, None] == segments[:, None, :]).tril_()[:, None]
        cos, sin = self.rotary(positions)
        tables = cos.to(x.dtype), sin.to(x.dtype)
        for layer, block in self.blocks.items():
            drawn = None if draws is None else derive_draws(draws, 1 + int(layer))
            x = self.computing.run(block, x, tables, mask, drawn)
        return x

    def _final(self, x: Tensor, tokens: int, picks: Tensor) -> Tensor:
        hidden = self.final_norm(x)
        if self.tp.sequence:
            hidden = through(hidden, GATHER, self.tp, tokens=tokens)
        return hidden.reshape(-1, self.config.dim).index_select(0, picks)
