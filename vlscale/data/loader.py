"""From places in the order to decoded arrays: one part of a global batch, for a run of lanes.

All that can fail for one sample is met here: the lane's next sample takes the place of one that does, so the outcome
is the same wherever and however often it is made. b samples of this part, S the picture's side.
"""

import itertools
import json
from dataclasses import dataclass, field, replace

import numpy as np

from vlscale.data.faults import BadSample
from vlscale.data.images import NUM_DRAWS, ImageSpec, decode_train
from vlscale.data.keyed import hash64, uniforms
from vlscale.data.lanes import LANE_STATE, BlockTable, Lane, SourceLane
from vlscale.data.manifest import Manifest
from vlscale.data.reader import Sample, SampleReader
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
    images: np.ndarray  # (b, S, S, 3) uint8
    second_images: np.ndarray | None
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
        seconds = [part.second_images for part in parts]
        lists = ("keys", "pair_id", "captions", "second_captions", "faults")
        return cls(
            np.concatenate([part.states for part in parts]),
            np.concatenate([part.images for part in parts]),
            None if seconds[0] is None else np.concatenate(seconds),
            **{name: [item for part in parts for item in getattr(part, name)] for name in lists},
        )


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

    def split(self, count: int) -> list["LoaderJob"]:
        """At most `count` jobs, each of a run of these lanes."""
        ends = [len(self.states) * i // count for i in range(count + 1)]
        return [
            replace(self, first=self.first + start, states=self.states[start:end])
            for start, end in itertools.pairwise(ends)
            if end > start
        ]


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
                    )
                    for source, (table, state) in enumerate(zip(tables, states, strict=True))
                ],
                job.weights,
                job.data.max_repeats,
            )
            for i, states in enumerate(job.states)
        ]
        self.pair_field = pair_field(job.data)
        self.with_json = self.pair_field is not None or job.data.caption_key.startswith("json:")

    def next(self) -> Part:
        count, side = self.job.per_lane * len(self.lanes), self.job.spec.size
        images = np.empty((count, side, side, 3), dtype=np.uint8)
        second_images = np.empty_like(images) if self.job.views.second_picture else None
        part = Part(np.zeros(self.job.states.shape, LANE_STATE), images, second_images)
        for lane in self.lanes:
            for _ in range(self.job.per_lane):
                self._place_one(lane, part)
        part.states[:] = [[source.state for source in lane.sources] for lane in self.lanes]
        return part

    def close(self) -> None:
        self.reader.close()

    def _place_one(self, lane: Lane, part: Part) -> None:
        """The next sample that is whole, of the source whose turn it is."""
        source = lane.choose()
        for _ in range(_MOST_FAILURES):
            epoch, shard, row = source.next()
            try:
                self._load(epoch, shard, row, part)
                source.taken += 1
                return
            except BadSample as fault:
                source.skipped += 1
                last = f"{self.reader.key(shard, row)} of {self.job.manifest.urls[shard]}: {fault}"
                part.faults.append(last)
        raise ValueError(
            f"{_MOST_FAILURES} samples in a row cannot be used, the last is {last}; "
            "`vlscale data check` counts what is wrong"
        )

    def _load(self, epoch: int, shard: int, row: int, part: Part) -> None:
        """Appends the sample to `part`, or raises BadSample and leaves `part` as it was."""
        sample = self.reader.read(shard, row, with_json=self.with_json)
        key = hash64("sample", self.job.seed, epoch, sample.key)
        pair = pair_hash(sample, self.pair_field)
        draws = uniforms(key, 2 * NUM_DRAWS + 2)
        at = len(part.keys)
        part.images[at] = self._decode(sample, draws[2 : 2 + NUM_DRAWS])
        if part.second_images is not None:
            part.second_images[at] = self._decode(sample, draws[2 + NUM_DRAWS :])
        part.keys.append(sample.key)
        part.pair_id.append(pair)
        first, second = self._choose(sample.captions, draws[:2])
        part.captions.append(first)
        if self.job.views.second_caption:
            part.second_captions.append(second)

    def _decode(self, sample: Sample, draws: np.ndarray) -> np.ndarray:
        data = self.data
        return decode_train(sample.image, self.job.spec, data.augment, data.decode, data.max_pixels, draws)

    def _choose(self, captions: list[str], draws: np.ndarray) -> tuple[str, str]:
        """The caption that trains, and another one where there is another."""
        first = int(draws[0] * len(captions)) if self.data.captions == "random" else 0
        other = 1 + int(draws[1] * (len(captions) - 1))
        return captions[first], captions[(first + other) % len(captions)]


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
