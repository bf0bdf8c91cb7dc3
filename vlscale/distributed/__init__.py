"""Ranks and the collectives that training needs, with exact gradients."""

from vlscale.distributed.gather import gather_rows
from vlscale.distributed.ranks import Ranks

__all__ = ["Ranks", "gather_rows"]
