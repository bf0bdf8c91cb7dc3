"""What one update is made of: one global batch, or the several whose losses it is the mean of.

`train.accumulate_losses` adds up losses, not pairs: every global batch has its own full loss, and pairs of different
batches never meet in one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from vlscale.data.batch import Batch
from vlscale.distributed import Ranks


@dataclass(frozen=True)
class Drawn:
    """This rank's parts of an update's batches, in order, each with the one that a meta step tests on."""

    pairs: list[tuple[Batch, Batch]]

    @property
    def batches(self) -> list[Batch]:
        return [batch for batch, _ in self.pairs]

    @property
    def last(self) -> Batch:
        """Its `state` is the stream's after this update."""
        return self.pairs[-1][0]

    def keys(self, ranks: Ranks) -> list[str]:
        """Of all samples on all ranks, batch by batch. On all ranks together."""
        everyone = ranks.gather_objects([batch.keys for batch in self.batches])
        return [key for parts in zip(*everyone, strict=True) for part in parts for key in part]

    def positions(self, ranks: Ranks) -> list[torch.Tensor]:
        """Of this rank's samples among all of the update's, for each batch (B,)."""
        return [batch.positions + k * ranks.size * len(batch.keys) for k, batch in enumerate(self.batches)]


def draw(pairs: Iterator[tuple[Batch, Batch]], losses: int) -> Iterator[Drawn]:
    while taken := list(islice(pairs, losses)):
        yield Drawn(taken)


def mean_of(parts: list[dict[str, float]]) -> dict[str, float]:
    """The numbers of an update from those of its losses: their means, and the gradient norm, which the last one has."""
    numbers = {name: sum(part[name] for part in parts) / len(parts) for name in parts[-1]}
    return numbers | {"grad_norm": parts[-1]["grad_norm"]}
