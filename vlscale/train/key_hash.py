"""The hash of a global batch's sample keys, equal at any number of ranks.

It is the sum over positions of a 64-bit hash of (position, sample key), modulo 2^64, so each rank adds its own part.
"""

from hashlib import blake2b

import torch

from vlscale.distributed import Ranks


def batch_key_hash(keys: list[str], positions: torch.Tensor, ranks: Ranks) -> str:
    """Keys of this rank and their places in the global batch, to 16 hexadecimal digits of the whole batch."""
    total = sum(
        int.from_bytes(blake2b(f"{position}:{key}".encode(), digest_size=8).digest(), "little")
        for position, key in zip(positions.tolist(), keys, strict=True)
    )
    total %= 1 << 64
    signed = total - (1 << 64) if total >= 1 << 63 else total
    summed = ranks.sum(torch.tensor(signed, dtype=torch.int64, device=ranks.device))
    return f"{int(summed) % (1 << 64):016x}"
