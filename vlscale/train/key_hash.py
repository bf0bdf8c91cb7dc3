"""What all ranks together know of an update's samples: the hash of their keys, and how much was lost.

The hash is the sum over positions of a 64-bit hash of (position, sample key), modulo 2^64: each rank adds its own part,
so it is equal at any number of ranks.
"""

from hashlib import blake2b

import torch

from vlscale.distributed import Ranks
from vlscale.train.drawn import Drawn

_WRAP = 1 << 64


def batch_facts(drawn: Drawn, ranks: Ranks) -> dict[str, str | int]:
    """`keys`: 16 hexadecimal digits for the whole update; `skipped`: samples left out since the start; `truncated`:
    captions of this update that were cut. One int64 all_reduce."""
    keys = [key for batch in drawn.batches for key in batch.keys]
    truncated = sum(batch.truncated for batch in drawn.batches)
    own = [key_hash(keys, torch.cat(drawn.positions(ranks))), drawn.last.skipped, truncated]
    keys, skipped, truncated = ranks.sum(torch.tensor(own, dtype=torch.int64, device=ranks.device)).tolist()
    return {"keys": f"{keys % _WRAP:016x}", "skipped": skipped, "truncated": truncated}


def key_hash(keys: list[str], positions: torch.Tensor) -> int:
    """Of some pairs of a batch, as a signed 64-bit integer; sums of parts wrap to the hash of the whole."""
    total = sum(
        int.from_bytes(blake2b(f"{position}:{key}".encode(), digest_size=8).digest(), "little")
        for position, key in zip(positions.tolist(), keys, strict=True)
    )
    return (total + (_WRAP >> 1)) % _WRAP - (_WRAP >> 1)
