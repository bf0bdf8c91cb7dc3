"""`vlscale data teach`: the embeddings that frozen teachers give of a corpus, as a teacher cache.

The teachers see every picture as it is, through their own processor, and every caption through their own tokenizer;
what training does to a picture (data.augment) they do not see. Ranks deal the shards among them and never talk; a shard
whose file is there is left alone, so the same command goes on where an earlier one was stopped.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from vlscale.data.faults import BadSample
from vlscale.data.images import decode_eval
from vlscale.data.manifest import Manifest
from vlscale.data.processes import core_count
from vlscale.data.reader import Sample, SampleReader
from vlscale.data.samples import open_corpus
from vlscale.data.teacher_cache import (
    DTYPES,
    BadTeacherCache,
    CacheHeader,
    ShardFile,
    TeacherRows,
    read_header,
    write_shard_file,
)
from vlscale.logging import get_logger, without_secrets
from vlscale.models.teachers import check_not_constant
from vlscale.sections import DataConfig, ObjectiveConfig
from vlscale.train.frozen_teachers import ImageTeacher, TextTeacher, load_image_teacher, load_text_teacher

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}
CAPTIONS = ("all", "first")


@dataclass(frozen=True)
class TeachRequest:
    urls: list[str]
    data: DataConfig
    out: Path
    image: str
    text: str
    dtype: str = "fp16"
    compute: str = "fp32"
    captions: str = "all"
    batch_size: int = 256
    rank: int = 0
    ranks: int = 1
    threads: int = field(default_factory=core_count)  # that decode
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass
class TeachJob:
    """This rank's share: `total` samples, of which `done` were embedded before."""

    request: TeachRequest
    image: ImageTeacher
    text: TextTeacher
    manifest: Manifest
    header: CacheHeader
    left_out: Counter = field(default_factory=Counter)  # samples of this run by kind of fault
    weak: set[str] = field(default_factory=set)  # teachers that were warned of

    def __post_init__(self) -> None:
        shards = range(self.request.rank, len(self.manifest.urls), self.request.ranks)
        self.shards = [shard for shard in shards if self.manifest.counts[shard]]
        self.missing = [shard for shard in self.shards if not self._is_there(shard)]

    @property
    def total(self) -> int:
        return int(self.manifest.counts[self.shards].sum())

    @property
    def done(self) -> int:
        return self.total - int(self.manifest.counts[self.missing].sum())

    def run(self, on_batch: Callable[[int], None] = lambda samples: None) -> None:
        started, count, todo = time.perf_counter(), 0, self.total - self.done
        with ThreadPoolExecutor(self.request.threads) as threads:
            for shard in self.missing:
                rows = self._teach(shard, threads, on_batch)
                if shard == self.missing[0]:
                    self._claim()  # not before: teachers that are refused leave nothing behind
                digest, url = self.manifest.digests[shard], self.manifest.urls[shard]
                write_shard_file(self.request.out, self.header, digest, without_secrets(url), rows)
                count += int(self.manifest.counts[shard])
                if not sys.stderr.isatty():  # where there is a terminal, the caller's bar says so
                    rate = count / (time.perf_counter() - started)
                    left = (todo - count) / rate
                    get_logger().info("taught %d of %d samples, %.0f/s, %.0f s left", count, todo, rate, left)

    def _claim(self) -> None:
        _check_out(self.request.out, self.header)
        self.header.save(self.request.out)

    def _is_there(self, shard: int) -> bool:
        """A whole file; a damaged one is made again."""
        try:
            ShardFile(self.request.out, self.header, self.manifest.digests[shard])
        except FileNotFoundError:
            return False
        except BadTeacherCache as error:
            get_logger().warning("made again: %s", error)
            return False
        return True

    @torch.no_grad()
    def _teach(self, shard: int, threads: ThreadPoolExecutor, on_batch: Callable[[int], None]) -> TeacherRows:
        keys, captions, image, text, left_out = [], [], [], [], []
        for batch, decoded in self._ahead(self._samples(shard, left_out), threads):
            shown = []
            for sample, picture in zip(batch, decoded, strict=True):
                try:
                    shown.append((sample, picture.result()))
                except BadSample as fault:
                    self._leave_out(sample.key, shard, fault, left_out)
            if shown:
                said = [self._kept(sample) for sample, _ in shown]
                keys += [sample.key for sample, _ in shown]
                captions += said
                image.append(self.image.embed(np.stack([picture for _, picture in shown]), self.request.device))
                text.append(self._embed_captions([caption for each in said for caption in each]))
            on_batch(len(batch))
        rows = TeacherRows(
            keys, captions, _stack(image, self.header.image.width), _stack(text, self.header.text.width), left_out
        )
        self._judge(rows)
        return rows

    def _ahead(
        self, samples: Iterator[Sample], threads: ThreadPoolExecutor
    ) -> Iterator[tuple[list[Sample], list[Future]]]:
        """Batches with their pictures, which are decoded in threads while the teachers work on the batch before."""
        before = None
        while batch := list(islice(samples, self.request.batch_size)):
            now = batch, [threads.submit(self._decode, sample) for sample in batch]
            if before is not None:
                yield before
            before = now
        if before is not None:
            yield before

    def _samples(self, shard: int, left_out: list[str]) -> Iterator[Sample]:
        manifest, data = self.manifest, self.request.data
        with_json = data.caption_key.startswith("json:")
        reader = SampleReader(manifest, data)
        try:
            for row in range(int(manifest.counts[shard])):
                try:
                    yield reader.read(shard, row, with_json=with_json)
                except BadSample as fault:
                    self._leave_out(reader.key(shard, row), shard, fault, left_out)
        finally:
            reader.close()

    def _decode(self, sample: Sample) -> np.ndarray:
        return decode_eval(sample.image, self.image.spec, self.request.data.max_pixels)

    def _embed_captions(self, captions: list[str]) -> torch.Tensor:
        """(T, D), in batches of the size asked for: samples may have many captions."""
        size = self.request.batch_size
        runs = [captions[first : first + size] for first in range(0, len(captions), size)]
        return torch.cat([self.text.embed(run, self.request.device) for run in runs])

    def _kept(self, sample: Sample) -> list[str]:
        return sample.captions if self.request.captions == "all" else sample.captions[:1]

    def _leave_out(self, key: str, shard: int, fault: BadSample, left_out: list[str]) -> None:
        get_logger().warning("left out sample %s of %s: %s", key, self.manifest.urls[shard], fault)
        self.left_out[fault.kind] += 1
        left_out.append(key)

    def _judge(self, rows: TeacherRows) -> None:
        """Refuses a constant teacher and warns of one that is nearly so. Captions are taken once each: a shard may well
        hold one many times."""
        places = {caption: place for place, caption in enumerate(c for each in rows.captions for c in each)}
        judged = {
            f"image teacher {self.request.image}": torch.from_numpy(rows.image),
            f"text teacher {self.request.text}": torch.from_numpy(rows.text[list(places.values())]),
        }
        for what, embeddings in judged.items():
            found = check_not_constant(embeddings, what, ObjectiveConfig())  # a run judges them again, at its own
            if found is not None and found.weak and what not in self.weak:
                self.weak.add(what)
                get_logger().warning("%s hardly tells samples apart: %s", what, found)


def open_job(request: TeachRequest) -> TeachJob:
    """Everything that can be wrong is found here, before anything is embedded."""
    for name, choices in (("dtype", tuple(DTYPES)), ("compute", tuple(COMPUTE)), ("captions", CAPTIONS)):
        if getattr(request, name) not in choices:
            raise ValueError(f"--{name} {getattr(request, name)}: expected {' or '.join(choices)}")
    manifest = open_corpus(request.urls, request.data, "the shards")
    image, text = load_image_teacher(request.image), load_text_teacher(request.text)
    header = CacheHeader(
        image.facts, text.facts, request.dtype, request.compute, request.captions,
        request.data.caption_key, request.data.image_keys, manifest.hash,
    )  # fmt: skip
    _check_out(request.out, header)
    for teacher in (image.teacher, text.teacher):
        teacher.to(request.device, COMPUTE[request.compute])
    return TeachJob(request, image, text, manifest, header)


def _check_out(out: Path, header: CacheHeader) -> None:
    """The folder is new, or an earlier command's for the same; another corpus may join what is there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; expected a folder, new or of the same teachers")
    if out.is_dir() and any(out.iterdir()):
        found = read_header(out)
        if found.stamp != header.stamp:
            raise ValueError(
                f"{out} holds a cache of other teachers or settings (image {found.image.source}, text "
                f"{found.text.source}, {found.dtype}, captions {found.captions} of {found.caption_key}); "
                "choose another folder"
            )


def _stack(rows: list[torch.Tensor], width: int) -> np.ndarray:
    return torch.cat(rows).numpy() if rows else np.zeros((0, width), np.float32)
