"""A vector over the learned parameters, and moving them along it for a moment.

Under ZeRO-3 a rank holds only a run of each parameter's elements; everywhere else it holds all of them. Gradients are
whole on every rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from vlscale.distributed import Ranks, all_reduce
from vlscale.models.rows import wide

BUCKET = 1 << 24  # numbers that travel at once: 64 MB
GOLDEN = -1640531527  # 2^32 over the golden ratio, as an int32: its multiples spread evenly over all of them


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
        return cls(list(parts) if ranks.group is None else _averaged(parts, parameters, ranks))

    def __getitem__(self, index: int) -> torch.Tensor:
        part = self._parts[index]
        assert part is not None, "a parameter that one pass reaches is reached by all of them"
        return part

    def along(self, index: int, held: Held) -> torch.Tensor | None:
        """The elements of one part that `held` has, where it has them, or None."""
        part = self._parts[index]
        if part is None:
            return None
        return part.reshape(-1)[held.start : held.start + held.values.numel()].to(held.values.device)

    def norm(self) -> torch.Tensor:
        return torch.stack([_norm(part) for part in self._parts if part is not None]).norm()

    def add_(self, other: "Gradients", scale: float | torch.Tensor = 1.0) -> "Gradients":
        """In place: self + scale * other."""
        for own, more in zip(self._parts, other._parts, strict=True):
            if own is None or more is None:
                continue
            if torch.is_tensor(scale):
                torch.addcmul(own, more, scale.to(own.dtype), out=own)
            else:
                own.add_(more, alpha=scale)
        return self


class Move(Protocol):
    def __call__(self, along: Gradients, rate: torch.Tensor, dither: bool = False) -> torch.Tensor: ...


@contextmanager
def moving(held: list[Held], ranks: Ranks | None) -> Iterator[Move]:
    """Inside the block `move(along, rate)` puts the parameters at where they were before it, plus rate * along; at its
    end they are put back bit for bit, also after an error.

    Every move starts from the master weights and is rounded once: to the nearest, or with `dither` (see `dithered`) so
    that many elements together move as far as they were to, where each is to move by less than the spacing of bf16. It
    gives the cosine () between the intended and the realised shift: 1 in float32; in bf16 it falls where a step is
    small against that spacing. `ranks`: over which the parameters are split; None: each holds them whole.
    """
    before = [own.values.clone() for own in held]
    try:
        yield lambda along, rate, dither=False: _move(held, before, along, rate, dither, ranks)
    finally:
        for own, values in zip(held, before, strict=True):
            own.values.copy_(values)


@torch.no_grad()
def _move(
    held: list[Held],
    before: list[torch.Tensor],
    along: Gradients,
    rate: torch.Tensor,
    dither: bool,
    ranks: Ranks | None,
) -> torch.Tensor:
    products = torch.zeros(3, dtype=torch.float64, device=rate.device)  # intended.realised, |intended|^2, |realised|^2
    for index, own in enumerate(held):
        part = along.along(index, own)
        if part is None:
            continue
        factor = rate.to(part.device)
        if own.values.dtype == torch.promote_types(part.dtype, torch.float32):  # its own master, and nothing is lost
            torch.addcmul(before[index], part, factor.to(part.dtype), out=own.values)
            continue
        intended = wide(part) * factor
        moved = wide(own.master()).to(part.device) + intended
        own.values.copy_(dithered(moved, own.start) if dither else moved)
        realised = wide(own.values) - wide(before[index])
        found = torch.stack([intended @ realised, intended @ intended, realised @ realised])
        products += found.double().to(products.device)
    if ranks is not None:
        ranks.sum(products)
    length = products[1].sqrt() * products[2].sqrt()
    return torch.where(length > 0, products[0] / length.clamp(min=1e-300), torch.ones_like(length)).float()


def dithered(values: torch.Tensor, start: int) -> torch.Tensor:
    """(n,) float32 to bfloat16: up where the share of the way to the next number exceeds a threshold, down elsewhere.

    Thresholds are a fixed sequence, evenly spread over [0, 1), of an element's place `start` + i in its parameter, so
    that every rank which holds an element rounds it alike, and a run that goes on from a checkpoint as well.
    """
    places = torch.arange(start, start + values.numel(), dtype=torch.int32, device=values.device)
    thresholds = ((places * GOLDEN >> 16) & 0xFFFF).float() / 0x10000
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp(torch.floor(mantissa * 256 + thresholds), exponent - 8).bfloat16()  # of 8 bits


def parameter_norm(held: list[Held], ranks: Ranks | None, device: torch.device) -> torch.Tensor:
    """() over all learned parameters; `ranks`: over which they are split."""
    norm = torch.stack([_norm(own.values) for own in held]).norm().to(device)
    return norm if ranks is None else ranks.sum(norm.square()).sqrt()


def _norm(values: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))


def _averaged(
    parts: tuple[torch.Tensor | None, ...], parameters: list[nn.Parameter], ranks: Ranks
) -> list[torch.Tensor | None]:
    """Every part's mean over ranks, by buckets of neighbours. What only some ranks have counts as zero on the others:
    they agree first on what travels, so that a rank which reached less cannot make the others wait."""
    reached = torch.tensor([part is not None for part in parts], dtype=torch.int32, device=ranks.device)
    anywhere = [index for index, count in enumerate(all_reduce(reached, ranks).tolist()) if count]
    shapes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in parameters]  # ZeRO-3's own is empty
    found: list[torch.Tensor | None] = [None] * len(parts)
    for bucket in _buckets(anywhere, shapes):
        own = [parameters[i].new_zeros(shapes[i]) if parts[i] is None else parts[i] for i in bucket]
        flat = torch.cat([wide(part).reshape(-1) for part in own])
        mean = all_reduce(flat, ranks).div_(ranks.size)
        for index, part, values in zip(bucket, own, mean.split([part.numel() for part in own]), strict=True):
            found[index] = values.view(part.shape).to(part.dtype)
    return found


def _buckets(indices: list[int], shapes: list[torch.Size]) -> Iterator[list[int]]:
    """Runs of at most BUCKET numbers, or of one tensor."""
    run, total = [], 0
    for index in indices:
        count = shapes[index].numel()
        if run and total + count > BUCKET:
            yield run
            run, total = [], 0
        run.append(index)
        total += count
    if run:
        yield run
