"""`vlscale embed`: a corpus, or plain pictures and texts, to an index file, part by part, resumable.

    FILE                     complete, or not there
    .FILE.parts/header.json  what the parts are of
    .FILE.parts/part-*.npz   a run of about PART samples each, complete or not there

Ranks share the parts among them and never talk: rank r of W makes parts r, r + W, ..., and the first rank, when all are
there, puts them together. The same command goes on where an earlier one was killed, also with another number of ranks.
"""

import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from vlscale.data.manifest import Manifest
from vlscale.data.plain_files import PlainFiles, plain_files
from vlscale.data.samples import Sample, open_corpus, read_manifest
from vlscale.evaluate.embed import embed_batch
from vlscale.export.index_file import Header, Rows, check_format, read_header, write_index
from vlscale.export.loaded import LoadedModel, load_model
from vlscale.logging import get_logger, without_secrets
from vlscale.sections import DataConfig

PART = 2048  # samples; about 25 MB at 1024 numbers and five captions an image
_WAIT = 0.5  # seconds between looks for the parts of other ranks


@dataclass(frozen=True)
class EmbedRequest:
    model: str
    data: list[str]
    out: Path
    dtype: str = "float16"
    caption_key: str | None = None  # None: the run's, else the default
    batch_size: int = 256
    rank: int = 0
    ranks: int = 1
    device: torch.device | None = None
    part: int = PART
    images: Path | None = None  # a folder of pictures, in place of `data`
    texts: Path | None = None  # a file of texts, one a line, likewise

    @property
    def named(self) -> list[str]:
        """What is embedded, as it was named."""
        return [*map(without_secrets, self.data), *(str(path) for path in (self.images, self.texts) if path)]


@dataclass(frozen=True)
class Shards:
    """Samples of shards, as `PlainFiles` offers those of files."""

    manifest: Manifest
    data: DataConfig

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @property
    def hash(self) -> str:
        return self.manifest.hash

    def read(self, part: int, parts: int) -> Iterator[Sample]:
        return read_manifest(self.manifest, self.data, shard=(part, parts))


@dataclass
class EmbedJob:
    """This rank's share: `total` samples, of which an earlier command embedded `done`; `parts` of all ranks."""

    request: EmbedRequest
    model: LoadedModel
    data: DataConfig
    source: Shards | PlainFiles
    header: Header
    folder: Path
    complete: bool = False
    parts: int = field(init=False)

    def __post_init__(self) -> None:
        self.parts = -(-self.source.num_samples // self.request.part)

    @property
    def total(self) -> int:
        return self._samples(self._own())

    @property
    def done(self) -> int:
        return self.total if self.complete else self._samples(n for n in self._own() if self._is_there(n))

    def run(self, on_batch: Callable[[int], None] = lambda samples: None) -> None:
        """Embed what is missing; the first rank then writes the file."""
        if self.complete:
            get_logger().info("%s is complete, nothing to do", self.request.out)
            return
        self._claim()
        started, count = time.perf_counter(), 0
        missing = [number for number in self._own() if not self._is_there(number)]
        todo = self._samples(missing)
        for number in missing:
            self._make(number, on_batch)
            count += self._samples([number])
            if not sys.stderr.isatty():  # where there is a terminal, the caller's bar says so
                rate = count / (time.perf_counter() - started)
                left = (todo - count) / rate
                get_logger().info("embedded %d of %d samples, %.0f/s, %.0f s left", count, todo, rate, left)
        if self.request.rank == 0:
            self._put_together()

    def _claim(self) -> None:
        """Make the folder of parts, or go on in the one of an earlier command for the same."""
        path = self.folder / "header.json"
        if path.is_file():
            found = Header.from_json(path.read_text())
            if not found.same_content(self.header):
                raise ValueError(
                    f"{self.folder} holds parts of another request (model {found.model}, data {' '.join(found.data)}, "
                    f"{found.dtype}); delete it or choose another --out"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(path, lambda partial: partial.write_text(self.header.to_json()))

    def _make(self, number: int, on_batch: Callable[[int], None]) -> None:
        samples = self.source.read(number, self.parts)
        rows = _embed_rows(
            self.model, samples, self.request.batch_size, self.data.max_pixels, self.header.dtype, on_batch
        )
        _write(self._part(number), rows.save)

    def _put_together(self) -> None:
        while not all(map(self._is_there, range(self.parts))):
            time.sleep(_WAIT)
        made = sum(rows.samples for rows in self._rows())
        if not made:
            raise ValueError(f"no sample of {' '.join(self.request.named)} could be read: nothing to embed")
        if made < self.source.num_samples:
            lost, asked = self.source.num_samples - made, self.source.num_samples
            get_logger().warning("left out %s of %s samples, which could not be read", f"{lost:,}", f"{asked:,}")
        whole = self.folder / f"whole{self.request.out.suffix}"  # among the parts: they are deleted together
        write_index(whole, self.header, self._rows)
        os.replace(whole, self.request.out)
        shutil.rmtree(self.folder)

    def _rows(self) -> Iterator[Rows]:
        return (Rows.load(self._part(number)) for number in range(self.parts))

    def _own(self) -> range:
        return range(self.request.rank, self.parts, self.request.ranks)

    def _samples(self, numbers: Iterable[int]) -> int:
        count, parts = self.source.num_samples, self.parts
        return sum(count * (number + 1) // parts - count * number // parts for number in numbers)

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}-of-{self.parts:06d}.npz"

    def _is_there(self, number: int) -> bool:
        return self._part(number).is_file() and zipfile.is_zipfile(self._part(number))


def open_job(request: EmbedRequest) -> EmbedJob:
    """Everything that can be wrong is found here, before anything is embedded."""
    check_format(request.out)
    if request.dtype not in ("float16", "float32"):
        raise ValueError(f"--dtype {request.dtype}: expected float16 or float32")
    if bool(request.data) == bool(request.images or request.texts):
        both = "both" if request.data else "neither"
        raise ValueError(f"expected shards (--data), or plain files (--images, --texts), got {both}")
    plain = None if request.data else plain_files(request.images, request.texts)
    if plain is not None:
        _check_plain(request)
    model = load_model(request.model, request.device)
    data = model.config.data if model.config else DataConfig()
    if request.caption_key is not None:
        data = data.model_copy(update={"caption_key": request.caption_key})
    source = plain or Shards(open_corpus(request.data, data, "--data"), data)
    header = Header(
        model=request.model,
        model_hash=model.hash,
        data=request.named,
        data_hash=source.hash,
        caption_key="" if plain else data.caption_key,
        image_keys=[] if plain else data.image_keys,
        dtype=request.dtype,
        embed_dim=model.embed_dim,
        pictures=None if request.images is None else str(request.images.resolve()),
    )
    folder = request.out.with_name(f".{request.out.name}.parts")
    job = EmbedJob(request, model, data, source, header, folder)
    if request.out.exists():
        if not read_header(request.out).same_content(header):
            raise ValueError(f"--out {request.out} exists and is of another model or data; choose another name")
        job.complete = True
    return job


def _check_plain(request: EmbedRequest) -> None:
    if request.caption_key is not None:
        raise ValueError(f"--caption-key {request.caption_key} goes with --data; plain pictures have no captions")
    if request.texts is not None and request.out.suffix == ".parquet":
        raise ValueError(f"--texts: a row of {request.out} is a picture, and texts have none; name a .npz file")


@torch.no_grad()
def _embed_rows(
    model: LoadedModel,
    samples: Iterator[Sample],
    batch_size: int,
    max_pixels: int,
    dtype: str,
    on_batch: Callable[[int], None],
) -> Rows:
    keys, captions, counts, image_emb, text_emb = [], [], [], [], []
    while batch := list(islice(samples, batch_size)):
        if pictured := [sample for sample in batch if sample.key]:
            found = embed_batch(model.encoder, pictured, model.preprocess, model.device, max_pixels)
            for rows, more in zip((keys, captions, counts, image_emb, text_emb), (*found[:2], *found[3:]), strict=True):
                rows += more
        if texts := [caption for sample in batch if not sample.key for caption in sample.captions]:
            captions += texts
            text_emb += model.embed_texts(texts)
        on_batch(len(batch))
    return Rows(
        np.array(keys, dtype=str),
        np.array(captions, dtype=str),
        np.array(counts, dtype=np.int64),
        _matrix(image_emb, model.embed_dim, dtype),
        _matrix(text_emb, model.embed_dim, dtype),
    )


def _matrix(rows: list[torch.Tensor], width: int, dtype: str) -> np.ndarray:
    return torch.stack(rows).numpy().astype(dtype) if rows else np.zeros((0, width), dtype)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Complete or not there; the partial file keeps the suffix, which numpy would add."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    write(partial)
    os.replace(partial, path)
