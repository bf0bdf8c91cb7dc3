"""Ranks compare what they bring to a collective loss before any of it travels, so that a difference cannot hang.

A few numbers whose largest value the loss needs anyway (the bound of its logits) go through one all_reduce of some
forty bytes, and the check rides along in it: every rank takes part in every step, whatever it brings, so a batch that
is short on one rank, or an argument that one rank refuses, is an error on all of them.
"""

from collections.abc import Sequence
from types import TracebackType
from zlib import crc32

import torch

from vlscale.distributed.arrival import arrived
from vlscale.distributed.collectives import all_reduce
from vlscale.distributed.ranks import Ranks


class Agreement:
    """`with Agreement(...) as agreement:` around the checks of a loss's arguments; they end in `agreement.offer`.

    Afterwards `largest` holds the largest over ranks of each offered number. A ValueError inside is raised on every
    rank, as is any difference between the ranks; one wait for the device.
    """

    def __init__(self, name: str, ranks: Ranks, numbers: int = 0):
        self.name, self.ranks = name, ranks
        self.largest = torch.zeros(numbers, dtype=torch.float64, device=ranks.device)
        self._rows, self._details = 0, []

    def offer(self, rows: int, details: Sequence[object], numbers: torch.Tensor | None = None) -> None:
        """This rank's rows; what else has to be the same everywhere, as text; its numbers (n,)."""
        self._rows, self._details = rows, [str(detail) for detail in details]
        if numbers is not None:
            self.largest = numbers.double()

    def __enter__(self) -> "Agreement":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not isinstance(error, ValueError):
            return
        arrived()
        brought = (self._rows, self._details, None if error is None else str(error))
        mark = crc32(repr(brought).encode())
        marks = self.largest.new_tensor([mark, -mark])
        least_and_largest = all_reduce(torch.cat([marks, self.largest]), self.ranks, largest=True)
        self.largest = least_and_largest[2:]
        if least_and_largest[0] != -least_and_largest[1]:
            everyone = self.ranks.gather_objects(brought)
            if error is None:
                raise ValueError(f"{self.name}: {_difference(everyone)}")


def _difference(everyone: Sequence[tuple[int, list[str], str | None]]) -> str:
    refused = [(rank, why) for rank, (_, _, why) in enumerate(everyone) if why is not None]
    if refused:
        return f"rank {refused[0][0]} refused its input: {refused[0][1]}"
    if len({rows for rows, _, _ in everyone}) > 1:
        listed = ", ".join(f"rank {rank} has {rows}" for rank, (rows, _, _) in enumerate(everyone))
        return f"every rank needs the same number of rows, {listed}; give each rank an equal part of the batch"
    listed = ", ".join(f"rank {rank} has {' '.join(details)}" for rank, (_, details, _) in enumerate(everyone))
    return f"every rank needs the same kind of input, {listed}"
