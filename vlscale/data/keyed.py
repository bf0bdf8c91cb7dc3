"""Randomness that is a pure function of keys: hashes, uniform numbers and permutations without state.

Nothing here depends on a library's generator, so an order can be resumed after any upgrade.
"""

from hashlib import blake2b

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_ROUNDS = 4
_RUN = 1 << 16  # positions that are permuted together: their temporaries stay in the cache


def hash64(*parts: int | str | bytes) -> int:
    """A 64-bit hash of the parts; ("a", "b") and ("ab",) differ."""
    joined = b"\0".join(
        part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape") for part in parts
    )
    return int.from_bytes(blake2b(joined, digest_size=8).digest(), "little")


def mix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, element by element: a bijection in which every output bit depends on all input."""
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLY_1
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLY_2
    return values ^ (values >> np.uint64(31))


def random64(key: int, count: int, start: int = 0) -> np.ndarray:
    """Numbers `start` to `start + count` of the stream of `key`, (count,) uint64."""
    return random64_at(key, np.arange(start, start + count, dtype=np.uint64))


def random64_at(key: int, places: np.ndarray) -> np.ndarray:
    """Those numbers of the stream of `key`, uint64, of any shape."""
    return mix64(np.uint64(key) + (places.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def uniforms(key: int, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1)."""
    return uniforms_at(key, np.arange(count, dtype=np.uint64))


def uniforms_at(key: int, places: np.ndarray) -> np.ndarray:
    """Those of the stream of `key`, float64, of any shape."""
    return (random64_at(key, places) >> np.uint64(11)) * (0.5**53)


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed permutation of range(size) takes `positions`, (n,) int64.

    A balanced Feistel network on the next even power of two; what falls outside the range walks on, which ends since
    the network is a bijection of the larger range. Memory is that of `positions`, whatever the size.
    """
    if size == 1:
        return np.zeros_like(positions)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = random64(key, _ROUNDS)
    found = np.empty(len(positions), np.int64)
    for start in range(0, len(positions), _RUN):
        out = positions[start : start + _RUN].astype(np.uint64)
        todo = np.arange(len(out))
        while len(todo):
            left, right = out[todo] >> half, out[todo] & mask
            for round_key in round_keys:
                left, right = right, left ^ (mix64(right + round_key) & mask)
            out[todo] = (left << half) | right
            todo = todo[out[todo] >= np.uint64(size)]
        found[start : start + _RUN] = out
    return found
