"""From places in the order to decoded arrays: one part of a global batch, for a run of lanes.

All that can fail for one sample is met here: the lane's next sample takes the place of one that does, so the outcome
is the same wherever and however often it is made. b samples of this part, S the picture's side.
"""

import itertools
import json
from dataclasses import dataclass, field, replace

import numpy as np

from vlscale.data.fast_tokens import FastTokens, TokenRows
from vlscale.data.faults import BadSample, BadShard, UnreadableShard
from vlscale.data.images import NUM_DRAWS, ImageSpec, Piece, decode_piece, decode_train
from vlscale.data.keyed import hash64, uniforms
from vlscale.data.lanes import LANE_STATE, BlockTable, Lane, SourceLane
from vlscale.data.manifest import Manifest
from vlscale.data.reader import Sample, SampleReader
from vlscale.data.teacher_files import cache_place
from vlscale.data.teacher_join import TeacherJoin
from vlscale.sections import DataConfig

_MOST_FAILURES = 1000  # in a row, in one lane


@dataclass(frozen=True)
class Views:
    """What of each sample is wanted beside one picture and one caption."""

    second_picture: bool = False
    second_caption: bool = False


@dataclass
class Part:
    """Lanes' next samples, lane after lane."""

    states: np.ndarray  # (lanes of the part, sources) LANE_STATE, after these samples
    images: np.ndarray | list[Piece]  # (b, S, S, 3) uint8; pieces with data.decode=device
    second_images: np.ndarray | list[Piece] | None
    progress: np.ndarray | None = None  # (lanes of the part,) passes over their shares, with data.captions=all
    teacher_image: np.ndarray | None = None  # (b, D) float32
    teacher_text: np.ndarray | None = None
    tokens: TokenRows | None = None  # of the captions, where the tokenizer can be had here
    second_tokens: TokenRows | None = None
    keys: list[str] = field(default_factory=list)
    pair_id: list[int] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    second_captions: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # a line for each sample that failed

    @classmethod
    def join(cls, parts: list["Part"]) -> "Part":
        """Parts of neighbouring lanes as one."""
        if len(parts) == 1:
            return parts[0]
        joined: dict = {}
        for name, first in vars(parts[0]).items():
            values = [getattr(part, name) for part in parts]
            if isinstance(first, list):
                joined[name] = list(itertools.chain(*values))
            elif isinstance(first, TokenRows):
                joined[name] = TokenRows.join(values)
            else:
                joined[name] = None if first is None else np.concatenate(values)
        return cls(**joined)


@dataclass(frozen=True)
class LoaderJob:
    """Lanes `first` to `first + len(states)` of V, from the states given: all that a loader or a worker has to know."""

    manifest: Manifest
    data: DataConfig
    spec: ImageSpec
    views: Views
    lanes: int
    seed: int
    first: int
    states: np.ndarray  # (lanes of the job, sources) LANE_STATE
    weights: tuple[float, ...]  # of the sources
    per_lane: int  # samples of each lane in one part
    quarantined: frozenset[int] = frozenset()  # shards that are left out
    teacher_cache: str | None = None  # folder whose rows are joined to the samples
    tokenizer: str | None = None  # as `fast_tokens.state_of` gives it; None: captions are left as they are

    def split(self, count: int) -> list["LoaderJob"]:
        """At most `count` jobs, each of a run of these lanes."""
        ends = [len(self.states) * i // count for i in range(count + 1)]
        return [
            replace(self, first=self.first + start, states=self.states[start:end])
            for start, end in itertools.pairwise(ends)
            if end > start
        ]


@dataclass(frozen=True)
class _Opened:
    """A sample with its pictures, for as many captions as it trains with."""

    place: tuple[int, int, int]  # epoch, shard, row
    sample: Sample
    pair: int
    draws: np.ndarray
    picture: np.ndarray | Piece  # (S, S, 3)
    second: np.ndarray | Piece | None


class PartLoader:
    """Makes the parts of a job, one after another."""

    def __init__(self, job: LoaderJob):
        self.job, self.data = job, job.data
        self.reader = SampleReader(job.manifest, job.data)
        tables = [BlockTable(counts, job.lanes) for counts in job.manifest.source_counts()]
        self.lanes = [
            Lane(
                [
                    SourceLane(
                        table,
                        source,
                        job.first + i,
                        lanes=job.lanes,
                        window=job.data.window,
                        seed=job.seed,
                        state=state,
                        buckets=job.data.length_buckets,
                        lengths=self._lengths,
                    )
                    for source, (table, state) in enumerate(zip(tables, states, strict=True))
                ],
                job.weights,
                job.data.max_repeats,
            )
            for i, states in enumerate(job.states)
        ]
        self._opened: _Opened | None = None
        self.teachers = (
            None if job.teacher_cache is None else TeacherJoin(cache_place(job.teacher_cache, job.data), job.manifest)
        )
        self.tokens = None if job.tokenizer is None else FastTokens(job.tokenizer)
        self.pair_field = pair_field(job.data)
        self.with_json = self.pair_field is not None or job.data.caption_key.startswith("json:")

    def next(self) -> Part:
        count = self.job.per_lane * len(self.lanes)
        images = self._room(count)
        second_images = self._room(count) if self.job.views.second_picture else None
        part = Part(np.zeros(self.job.states.shape, LANE_STATE), images, second_images)
        if self.teachers is not None:
            header = self.teachers.header
            part.teacher_image = np.empty((count, header.image.width), np.float32)
            part.teacher_text = np.empty((count, header.text.width), np.float32)
        for lane in self.lanes:
            for _ in range(self.job.per_lane):
                self._place_one(lane, part)
        if self.tokens is not None:
            part.tokens = self.tokens(part.captions)
            part.second_tokens = self.tokens(part.second_captions) if part.second_captions else None
        part.states[:] = [[source.state for source in lane.sources] for lane in self.lanes]
        if self.data.captions == "all":
            part.progress = np.array([lane.progress for lane in self.lanes])
        return part

    def close(self) -> None:
        self.reader.close()

    def _room(self, count: int) -> np.ndarray | list:
        if self.data.decode == "device":
            return [None] * count
        return np.empty((count, self.job.spec.size, self.job.spec.size, 3), dtype=np.uint8)

    def _place_one(self, lane: Lane, part: Part) -> None:
        """The next sample that is whole, of the source whose turn it is."""
        source = lane.choose()
        for _ in range(_MOST_FAILURES):
            epoch, shard, row, caption = self._next_place(source)
            try:
                due = self._load((epoch, shard, row), caption, part)
            except BadSample as fault:
                source.skipped += 1
                last = f"{self.reader.key(shard, row)} of {self.job.manifest.urls[shard]}: {fault}"
                part.faults.append(last)
                continue
            source.taken += 1
            if due is not None:
                source.keep(due)
            return
        raise ValueError(
            f"{_MOST_FAILURES} samples in a row cannot be used, the last is {last}; "
            "`vlscale data check` counts what is wrong"
        )

    def _next_place(self, source: SourceLane) -> tuple[int, int, int, int]:
        while True:
            epoch, shard, row, caption = source.next()
            if shard not in self.job.quarantined:
                return epoch, shard, row, caption
            source.skipped += 1

    def _load(self, place: tuple[int, int, int], caption: int, part: Part) -> int | None:
        """Appends the sample to `part`, or raises BadSample and leaves `part` as it was. With data.captions=all,
        returns the caption that is due after this one; None after the last."""
        found = self._open(place)
        sample, at = found.sample, len(part.keys)
        part.images[at] = found.picture
        if part.second_images is not None:
            part.second_images[at] = found.second
        first, second = self._choose(sample, place[0], caption, found.draws[:2])
        if self.teachers is not None:
            rows = self.teachers.rows(place[1], sample.key, sample.captions, first)
            part.teacher_image[at], part.teacher_text[at] = rows
        part.keys.append(sample.key)
        part.pair_id.append(found.pair)
        part.captions.append(sample.captions[first])
        if self.job.views.second_caption:
            part.second_captions.append(sample.captions[second])
        return first + 1 if self.data.captions == "all" and first + 1 < len(sample.captions) else None

    def _open(self, place: tuple[int, int, int]) -> _Opened:
        """The sample at (epoch, shard, row), decoded once for all of its captions that follow each other."""
        if self._opened is None or self._opened.place != place:
            epoch, shard, row = place
            sample = self._read(shard, row)
            pair = pair_hash(sample, self.pair_field)
            draws = uniforms(hash64("sample", self.job.seed, epoch, sample.key), 2 * NUM_DRAWS + 2)
            picture = self._decode(sample, draws[2 : 2 + NUM_DRAWS])
            second = self._decode(sample, draws[2 + NUM_DRAWS :]) if self.job.views.second_picture else None
            self._opened = _Opened(place, sample, pair, draws, picture, second)
        return self._opened

    def _lengths(self, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Bytes of captions, which go with their tokens and are in the index; 0 in a shard that is left out."""
        found = np.zeros(len(shards), np.int64)
        for shard in set(np.unique(shards).tolist()) - self.job.quarantined:
            here = shards == shard
            try:
                found[here] = self.reader.text_sizes(shard, rows[here])
            except BadShard as error:
                raise UnreadableShard(shard, str(error)) from error
        return found

    def _read(self, shard: int, row: int) -> Sample:
        try:
            return self.reader.read(shard, row, with_json=self.with_json)
        except BadShard as error:
            raise UnreadableShard(shard, str(error)) from error

    def _decode(self, sample: Sample, draws: np.ndarray) -> np.ndarray | Piece:
        data = self.data
        if data.decode == "device":
            return decode_piece(sample.image, self.job.spec, data.augment, data.max_pixels, draws)
        return decode_train(sample.image, self.job.spec, data.augment, data.decode, data.max_pixels, draws)

    def _choose(self, sample: Sample, epoch: int, due: int, draws: np.ndarray) -> tuple[int, int]:
        """The number of the caption that trains, and of another one where there is another."""
        captions = len(sample.captions)
        if self.data.captions == "all":
            first = due % captions
        elif self.data.captions == "in_turn":
            first = (hash64("caption", self.job.seed, sample.key) + epoch) % captions
        else:
            first = int(draws[0] * captions) if self.data.captions == "random" else 0
        other = 1 + int(draws[1] * (captions - 1))
        return first, (first + other) % captions


def pair_field(data: DataConfig) -> str | None:
    if data.pair_id is None:
        return None
    if not data.pair_id.startswith("json:") or data.pair_id == "json:":
        raise ValueError(f"data.pair_id={data.pair_id!r}: expected json:FIELD, or null for a positive of its own")
    return data.pair_id.removeprefix("json:")


def pair_hash(sample: Sample, name: str | None) -> int:
    """63 bits: of the key, or of the json field that says which samples are positives of each other."""
    if name is None:
        return hash64(sample.key) >> 1
    if name not in sample.meta:
        raise BadSample("no pair id", f"its json has no field {name!r}")
    return hash64(json.dumps(sample.meta[name], sort_keys=True)) >> 1
