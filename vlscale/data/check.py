"""The health of a corpus: every member read, every picture unpacked; counts, sizes and what is wrong.

Shards of img2dataset are also held against the statistics that it leaves beside them.
"""

import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from vlscale.data import img2dataset
from vlscale.data.faults import BadSample, BadShard
from vlscale.data.images import open_picture
from vlscale.data.keyed import hash64
from vlscale.data.manifest import Manifest, shard_index
from vlscale.data.processes import core_count, in_processes
from vlscale.data.reader import Sample, SampleReader
from vlscale.data.tar import NO_SAMPLE
from vlscale.progress import Progress
from vlscale.sections import DataConfig

_NAMED = 200  # faults that are kept by name
_PERCENTILES = (0, 5, 50, 95, 100)


@dataclass
class CorpusReport:
    """n good samples, c captions."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    bad_shards: list[str] = field(default_factory=list)  # why each cannot be used
    incomplete: list[str] = field(default_factory=list)  # shards that can, but are not what img2dataset wrote
    downloads: Counter = field(default_factory=Counter)  # of img2dataset's statistics
    faults: Counter = field(default_factory=Counter)  # samples by kind of fault
    named: list[str] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)  # (n,)
    heights: list[int] = field(default_factory=list)  # (n,)
    picture_bytes: list[int] = field(default_factory=list)  # (n,)
    captions: list[int] = field(default_factory=list)  # (n,), how many a sample has
    words: list[int] = field(default_factory=list)  # (c,)
    scripts: Counter = field(default_factory=Counter)  # captions by their most frequent script
    picture_hashes: Counter = field(default_factory=Counter)  # samples by perceptual hash, when asked for

    @property
    def duplicates(self) -> int:
        """Samples whose picture another sample before them has."""
        return self.picture_hashes.total() - len(self.picture_hashes)

    def add(self, other: "CorpusReport") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        del self.named[_NAMED:]

    def summary(self) -> dict:
        """Plain values, for people and for json."""
        return {
            "shards": self.shards,
            "samples": self.samples,
            "bytes": self.bytes,
            "downloads": dict(self.downloads) or None,
            "bad_shards": self.bad_shards,
            "incomplete": self.incomplete,
            "faults": dict(self.faults.most_common()),
            "named": self.named,
            "width": _spread(self.widths),
            "height": _spread(self.heights),
            "picture_bytes": _spread(self.picture_bytes),
            "captions_per_sample": _spread(self.captions),
            "words_per_caption": _spread(self.words),
            "scripts": dict(self.scripts.most_common()),
            "duplicates": self.duplicates if self.picture_hashes else None,
        }


def check_corpus(
    shards: list[str],
    data: DataConfig,
    *,
    duplicates: bool = False,
    processes: int | None = None,
    progress: bool = True,
) -> CorpusReport:
    report = CorpusReport()
    with Progress("checking", len(shards), "shards", shown=progress) as bar:
        known = img2dataset.folders_with_statistics(shards)
        jobs = [(shard, data, duplicates, known) for shard in shards]
        for part in in_processes(check_shard, jobs, min(processes or core_count(), len(shards))):
            report.add(part)
            bar.advance()
    report.bad_shards.sort()
    report.incomplete.sort()
    report.named.sort()
    return report


def check_shard(path: str, data: DataConfig, duplicates: bool, with_statistics: set[Path]) -> CorpusReport:
    report = CorpusReport(shards=1)
    statistics = img2dataset.beside(path)
    if statistics is not None and statistics.parent not in with_statistics:
        statistics = None
    if statistics is not None:
        report.downloads = img2dataset.read_statistics(statistics) or Counter()
    try:
        summary, place = shard_index(path, data)
        report.bytes = summary.size
        report.faults.update(summary.skipped)
        report.named = [f"{line} ({path})" for line in summary.named[:_NAMED]]
        reader = SampleReader(Manifest([path], np.array([summary.count]), [summary.digest], [place], Counter()), data)
        for row in range(summary.count):
            try:
                _check_sample(reader.read(0, row, with_json=True), data, duplicates, report)
            except BadSample as fault:
                report.faults[fault.kind] += 1
                report.named.append(f"{reader.key(0, row)}: {fault} ({path})")
        reader.close()
        if statistics and (remark := img2dataset.remark(statistics, summary.count + _left_out(summary.skipped))):
            report.incomplete.append(f"shard {path}: {remark}")
    except BadShard as error:
        remark = statistics and img2dataset.remark(statistics, None)
        report.bad_shards.append(f"{error}; {remark}" if remark else str(error))
    return report


def _left_out(skipped: dict[str, int]) -> int:
    """Samples, without the members that belong to none."""
    return sum(count for reason, count in skipped.items() if reason != NO_SAMPLE)


def perceptual_hash(picture: np.ndarray) -> int:
    """64 bits of which grey neighbours are brighter, on a 9 x 8 grid: equal for most copies that were resized."""
    grey = cv2.resize(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA).astype(int)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def _check_sample(sample: Sample, data: DataConfig, duplicates: bool, report: CorpusReport) -> None:
    picture = open_picture(sample.image, data.max_pixels)
    report.samples += 1
    report.widths.append(picture.width)
    report.heights.append(picture.height)
    report.picture_bytes.append(len(sample.image))
    report.captions.append(len(sample.captions))
    for caption in sample.captions:
        report.words.append(len(caption.split()))
        report.scripts[_script(caption)] += 1
    if duplicates:
        report.picture_hashes[perceptual_hash(np.asarray(picture))] += 1


def _script(caption: str) -> str:
    """LATIN, CYRILLIC, CJK, ...: the first word of the letters' names, the most frequent of it."""
    names = Counter(unicodedata.name(letter, "OTHER").split()[0] for letter in caption if letter.isalpha())
    return names.most_common(1)[0][0] if names else "NO LETTERS"


def _spread(values: list[int]) -> dict[str, float] | None:
    if not values:
        return None
    found = np.percentile(values, _PERCENTILES)
    return {f"p{name}": round(float(value), 1) for name, value in zip(_PERCENTILES, found, strict=True)}


def chosen_rows(manifest: Manifest, count: int) -> list[tuple[int, int]]:
    """(shard, row) of `count` samples spread over the corpus by their own hash, the same each time."""
    ends = np.cumsum(manifest.counts)
    order = sorted(range(min(manifest.num_samples, 50 * count)), key=lambda i: hash64("sheet", i))[:count]
    picked = sorted(i * manifest.num_samples // min(manifest.num_samples, 50 * count) for i in order)
    shards = np.searchsorted(ends, picked, side="right")
    return [(int(s), int(i - ends[s] + manifest.counts[s])) for s, i in zip(shards, picked, strict=True)]
