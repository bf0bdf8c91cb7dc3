"""Who takes part in a global batch: this rank, how many there are, their process group and device."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """`rank` counts within `group`; it is None when there is one rank: nothing is then ever communicated."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element by element over the ranks; integers wrap. In place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Small host objects only."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's value on every rank: the group's, which in all the processes that there are may be another."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]
