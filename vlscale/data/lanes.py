"""The order in which samples are seen: blocks, permuted by epoch, dealt to V lanes, shuffled in windows of K blocks.

It is a pure function of (counts of the shards, V, K, seed): nothing about ranks, workers or prefetch enters, and a
lane's place in it is four numbers a source. S shards, n samples, V lanes, K blocks a window.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from vlscale.data.keyed import hash64, permute, random64

LANE_STATE = np.dtype(  # of a lane, for one source
    [
        ("epoch", "<u4"),
        ("position", "<u4"),
        ("window", "<u4"),
        ("caption", "<u4"),  # with data.captions=all: how many of the next sample's have trained
        ("skipped", "<u8"),
        ("taken", "<u8"),
    ]
)
MAX_BLOCK = 1000
DEFAULT_LANES = 64  # of batches up to LANE_PAIRS times as many pairs; larger ones get more, for more ranks
LANE_PAIRS = 32
MOST_LANES = 4096


@dataclass(frozen=True)
class StreamState:
    """Where lanes `first` to `first + len(rows)` of V stand. States of ranks merge and split freely."""

    manifest: str  # hash
    seed: int
    lanes: int
    window: int
    samples: int  # of the global stream consumed so far
    first: int
    weights: tuple[float, ...]  # of the sources
    rows: np.ndarray  # (lanes of this part, sources) LANE_STATE
    buckets: int = 1  # as data.length_buckets
    quarantined: tuple[int, ...] = ()  # shards that all lanes leave out from here on

    def part(self, first: int, count: int) -> "StreamState":
        """Lanes `first` to `first + count`, which have to lie in this state."""
        start = first - self.first
        if start < 0 or start + count > len(self.rows):
            raise ValueError(
                f"stream state holds lanes {self.first} to {self.first + len(self.rows)}, "
                f"lanes {first} to {first + count} were asked for; merge the states of all ranks first"
            )
        return replace(self, first=first, rows=self.rows[start : start + count].copy())

    def next_epoch(self, manifest: str) -> "StreamState":
        """Over to other shards: every lane starts its next epoch, as its place in this one means nothing there."""
        rows = self.rows.copy()
        rows["epoch"] += 1
        rows["window"] = rows["position"] = rows["caption"] = 0
        return replace(self, manifest=manifest, rows=rows, quarantined=())


def merge_states(states: list[StreamState]) -> StreamState:
    """The state of all lanes from the states of all ranks, in any order."""
    ordered = sorted(states, key=lambda state: state.first)
    head, at = ordered[0], 0
    for state in ordered:
        same = replace(state, first=0, rows=head.rows) == replace(head, first=0, rows=head.rows)
        if not same or state.first != at:
            raise ValueError("stream states do not belong to one step of one run, or a rank's state is missing")
        at += len(state.rows)
    if at != head.lanes:
        raise ValueError(f"stream states hold {at} of {head.lanes} lanes; expected the states of all ranks")
    return replace(head, first=0, rows=np.concatenate([state.rows for state in ordered]))


def choose_lanes(global_batch_size: int, world_size: int, lanes: int | None) -> int:
    """V: as asked, or the largest power of two that divides the batch and is at most 64 or, of a large batch, one for
    every 32 pairs and at most 4,096. It never depends on the world size, since the batches depend on it."""
    if global_batch_size % world_size:
        near = sorted({global_batch_size // world_size * world_size, -(-global_batch_size // world_size) * world_size})
        raise ValueError(
            f"train.global_batch_size={global_batch_size} cannot be divided by the world size {world_size}; "
            f"nearest that can: {', '.join(str(size) for size in near if size)}"
        )
    asked = lanes is not None
    if not asked:
        most = min(max(DEFAULT_LANES, global_batch_size // LANE_PAIRS), MOST_LANES)
        lanes = min(1 << most.bit_length() - 1, global_batch_size & -global_batch_size)
    if global_batch_size % lanes or lanes % world_size:
        fit = [v for v in range(world_size, global_batch_size + 1, world_size) if global_batch_size % v == 0]
        near = sorted(sorted(fit, key=lambda v: abs(v - lanes))[:4])
        raise ValueError(
            f"data.lanes={lanes}{'' if asked else ' (the default)'} has to divide the global batch size "
            f"{global_batch_size} and be a multiple of the world size {world_size}; nearest that fit: "
            f"{', '.join(map(str, near))}"
        )
    return lanes


class BlockTable:
    """Blocks of a corpus: runs of at most `block_size` samples, none over a shard's end."""

    def __init__(self, counts: np.ndarray, lanes: int):
        self.num_samples = int(counts.sum())
        self.block_size = min(max(self.num_samples // (8 * lanes), 1), MAX_BLOCK)
        self.counts = counts
        self.first_block = np.concatenate([[0], np.cumsum(-(-counts // self.block_size))])
        self.num_blocks = int(self.first_block[-1])

    def samples(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All samples of `blocks`, in order: their shards and their places in them, both (m,) int64."""
        shard = np.searchsorted(self.first_block, blocks, side="right") - 1
        start = (blocks - self.first_block[shard]) * self.block_size
        length = np.minimum(self.counts[shard] - start, self.block_size)
        shift = np.repeat(start - np.concatenate([[0], np.cumsum(length)[:-1]]), length)
        return np.repeat(shard, length), shift + np.arange(int(length.sum()))


Lengths = Callable[[np.ndarray, np.ndarray], np.ndarray]  # shards and places (m,) to lengths of captions (m,)


class SourceLane:
    """A lane's share of one source: an endless sequence of samples, by (epoch, shard, place in the shard).

    With `buckets` above one, the captions of a window come in so many groups of alike length. The groups' order is that
    of all lanes, and their windows are about equally long, so that a global batch holds captions of alike length.
    """

    def __init__(
        self,
        table: BlockTable,
        source: int,
        lane: int,
        *,
        lanes: int,
        window: int,
        seed: int,
        state: np.void,
        buckets: int = 1,
        lengths: Lengths | None = None,
    ):
        self.buckets, self.lengths = buckets, lengths
        self.table, self.source, self.lane, self.lanes, self.seed = table, source, lane, lanes, seed
        self.window_blocks = window
        self.share = len(range(lane, table.num_blocks, lanes))
        if self.share == 0:
            raise ValueError(
                f"source {source} has {table.num_samples} samples, too few for {lanes} lanes; lower data.lanes"
            )
        self.epoch, self.position, self.window, self.caption, self.skipped, self.taken = state.item()
        self._open()

    @property
    def state(self) -> tuple[int, int, int, int, int, int]:
        return self.epoch, self.position, self.window, self.caption, self.skipped, self.taken

    @property
    def passes(self) -> int:
        """Whole passes over the share so far."""
        at_end = self.position >= len(self._shards) and (self.window + 1) * self.window_blocks >= self.share
        return self.epoch + at_end

    @property
    def progress(self) -> float:
        """Passes over the share so far and the part of this one, counted in blocks."""
        before = self.window * self.window_blocks
        blocks = min(self.window_blocks, self.share - before) * self.position / len(self._shards)
        return self.epoch + (before + blocks) / self.share

    def next(self) -> tuple[int, int, int, int]:
        """Epoch, shard, place in it, and which of the sample's captions is due: 0 unless the sample was kept."""
        if self.position >= len(self._shards):
            self.window, self.position = self.window + 1, 0
            if self.window * self.window_blocks >= self.share:
                self.epoch, self.window = self.epoch + 1, 0
            self._open()
        at, caption = self.position, self.caption
        self.position, self.caption = at + 1, 0
        return self.epoch, self._shards[at], self._places[at], caption

    def keep(self, caption: int) -> None:
        """The sample that came last comes next too, with this caption."""
        self.position, self.caption = self.position - 1, caption

    def _open(self) -> None:
        """Lists the window's samples in their order. No data is read."""
        first = self.window * self.window_blocks
        slots = np.arange(first, min(first + self.window_blocks, self.share), dtype=np.int64)
        key = hash64("blocks", self.seed, self.source, self.epoch)
        blocks = permute(slots * self.lanes + self.lane, self.table.num_blocks, key)
        shards, places = self.table.samples(blocks)
        key = hash64("window", self.seed, self.source, self.epoch, self.lane, self.window)
        order = np.argsort(random64(key, len(shards)), kind="stable")
        shards, places = shards[order], places[order]
        if self.buckets > 1:
            order = self._by_length(self.lengths(shards, places))
            shards, places = shards[order], places[order]
        self._shards, self._places = shards.tolist(), places.tolist()

    def _by_length(self, lengths: np.ndarray) -> np.ndarray:
        """Shortest to longest in equal groups, each in the order it has, the groups in one that lanes share."""
        groups = np.array_split(np.argsort(lengths, kind="stable"), self.buckets)
        key = hash64("buckets", self.seed, self.source, self.epoch, self.window)
        shuffled = np.argsort(random64(key, self.buckets), kind="stable")
        return np.concatenate([np.sort(groups[group]) for group in shuffled])


class Lane:
    """One lane: its share of every source, mixed by weight.

    The next sample is of the source that is furthest behind its weight, so the mixture is exact in every stretch of the
    lane, and a function of what was taken alone.
    """

    def __init__(self, sources: list[SourceLane], weights: tuple[float, ...], max_repeats: int | None):
        self.sources, self.weights, self.max_repeats = sources, weights, max_repeats

    @property
    def progress(self) -> float:
        """Passes over its share of all sources together."""
        sizes = [source.table.num_samples for source in self.sources]
        return float(np.average([source.progress for source in self.sources], weights=sizes))

    def choose(self) -> SourceLane:
        live = range(len(self.sources))
        if self.max_repeats is not None:
            live = [s for s in live if self.sources[s].passes < self.max_repeats]
            if not live:
                raise ValueError(
                    f"every source has been passed data.max_repeats={self.max_repeats} times; raise it, add data, or "
                    "lower train.max_steps"
                )
        return self.sources[min(live, key=lambda s: (self.sources[s].taken + 1) / self.weights[s])]
