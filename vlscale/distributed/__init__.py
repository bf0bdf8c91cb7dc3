"""Ranks and the collectives that training needs, with exact gradients."""

from vlscale.distributed.agree import Agreement
from vlscale.distributed.blocks import COMMS, Block, Blocks, Gather, choose_comm
from vlscale.distributed.collectives import all_gather, all_reduce
from vlscale.distributed.exchange import Exchange, plan_exchange
from vlscale.distributed.gather import gather_rows
from vlscale.distributed.half_ring import HalfRing
from vlscale.distributed.memory import agreed_memory, gather_budget, rank_memory
from vlscale.distributed.ranks import Ranks
from vlscale.distributed.ring import Ring
from vlscale.distributed.sums import mean_over_ranks, sum_over_ranks
from vlscale.distributed.traffic import count_traffic

__all__ = [
    "COMMS",
    "Agreement",
    "Block",
    "Blocks",
    "Exchange",
    "Gather",
    "HalfRing",
    "Ranks",
    "Ring",
    "agreed_memory",
    "all_gather",
    "all_reduce",
    "choose_comm",
    "count_traffic",
    "gather_budget",
    "gather_rows",
    "mean_over_ranks",
    "plan_exchange",
    "rank_memory",
    "sum_over_ranks",
]
