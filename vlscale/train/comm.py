"""How a run's losses meet rows of other ranks: `engine.comm`, or what its `auto` takes, decided once for all."""

from dataclasses import dataclass

from vlscale.distributed import choose_comm, gather_budget

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Comm:
    asked: str  # engine.comm
    gathered: int  # bytes that all rows take on a rank by gather
    memory: int  # bytes that the rank with the least has

    @property
    def way(self) -> str:
        """gather, ring or half_ring, which is ring for terms that are no relation. By gather or in a ring, gradients
        differ by rounding alone."""
        return choose_comm(self.asked, self.gathered, relation=True, budget=gather_budget(self.memory))

    def __str__(self) -> str:
        if self.asked != "auto":
            return f"{self.way}, as engine.comm says"
        way = "gather" if self.way == "gather" else "half_ring (ring for contrasts)"
        of = f"{in_units(self.gathered)} to gather, of at most {in_units(gather_budget(self.memory))}"
        return f"{way}: {of} on a rank with {in_units(self.memory)}"


def in_units(count: float) -> str:
    power = min(len(UNITS) - 1, max(0, (int(max(count, 1)).bit_length() - 1) // 10))
    return f"{count / 1024**power:,.1f} {UNITS[power]}"
