"""A vector over the learned parameters, and moving them along it for a moment.

Under ZeRO-3 a rank holds only a run of each parameter's elements; everywhere else it holds all of them. Gradients are
whole on every rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from vlscale.distributed import Ranks
from vlscale.models.rows import wide


@dataclass(frozen=True)
class Held:
    """What this rank holds of one learned parameter."""

    values: torch.Tensor  # (n,), a view: writing to it changes the parameter
    start: int  # the place of its first element in the whole parameter
    master: Callable[[], torch.Tensor]  # (n,), the same elements as the optimizer has them


class Gradients:
    """One tensor for each learned parameter, of its shape and dtype; None where nothing reaches it."""

    def __init__(self, parts: list[torch.Tensor | None]):
        self._parts = parts

    @classmethod
    def of(cls, loss: torch.Tensor, parameters: list[nn.Parameter], ranks: Ranks) -> "Gradients":
        """Of the global batch: averaged over ranks in float32 at least, as a data-parallel engine does."""
        parts = torch.autograd.grad(loss, parameters, allow_unused=True)
        return cls([part if part is None else _average(part, ranks) for part in parts])

    def __getitem__(self, index: int) -> torch.Tensor:
        part = self._parts[index]
        assert part is not None, "a parameter that one pass reaches is reached by all of them"
        return part

    def along(self, index: int, held: Held) -> torch.Tensor | None:
        """The elements of one part that `held` has, or None."""
        part = self._parts[index]
        return None if part is None else part.reshape(-1)[held.start : held.start + held.values.numel()]

    def norm(self) -> torch.Tensor:
        return torch.stack([wide(part).norm() for part in self._parts if part is not None]).norm()

    def add_(self, other: "Gradients", scale: float | torch.Tensor = 1.0) -> "Gradients":
        """In place: self + scale * other."""
        for own, more in zip(self._parts, other._parts, strict=True):
            if own is not None and more is not None:
                own.add_((wide(more) * scale).to(own.dtype))
        return self


@contextmanager
def shifted(held: list[Held], along: Gradients, rate: torch.Tensor, ranks: Ranks | None) -> Iterator[torch.Tensor]:
    """Parameters moved by rate * along inside the block, and put back bit for bit at its end, also after an error.

    The shift starts from the master weights and is rounded once. Gives the cosine () between the intended and the
    realised shift: 1 in float32; in bf16 it falls where a step is small against the spacing of the weights. `ranks`:
    over which the parameters are split; None: each holds them whole.
    """
    before = [own.values.clone() for own in held]
    try:
        yield _move(held, before, along, rate, ranks)
    finally:
        for own, values in zip(held, before, strict=True):
            own.values.copy_(values)


@torch.no_grad()
def _move(
    held: list[Held], before: list[torch.Tensor], along: Gradients, rate: torch.Tensor, ranks: Ranks | None
) -> torch.Tensor:
    products = torch.zeros(3, dtype=torch.float64, device=rate.device)  # intended.realised, |intended|^2, |realised|^2
    for index, own in enumerate(held):
        part = along.along(index, own)
        if part is None:
            continue
        intended = wide(part) * rate
        if own.values.dtype == intended.dtype:  # the values are their own master, and nothing is lost
            own.values.add_(intended)
            continue
        own.values.copy_(wide(own.master()) + intended)
        realised = wide(own.values) - wide(before[index])
        products += torch.stack([intended @ realised, intended @ intended, realised @ realised]).double()
    if ranks is not None:
        ranks.sum(products)
    length = products[1].sqrt() * products[2].sqrt()
    return torch.where(length > 0, products[0] / length.clamp(min=1e-300), torch.ones_like(length)).float()


def parameter_norm(held: list[Held], ranks: Ranks | None) -> torch.Tensor:
    """() over all learned parameters; `ranks`: over which they are split."""
    squares = torch.stack([wide(own.values).square().sum() for own in held]).sum()
    return squares.sqrt() if ranks is None else ranks.sum(squares).sqrt()


def _average(part: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    return part if ranks.group is None else (ranks.sum(wide(part).clone()) / ranks.size).to(part.dtype)
