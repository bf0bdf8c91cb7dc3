"""The pipelines that `vlscale bench data` compares: each yields the pairs of one batch after another.

A peer that is not installed is `None` with the package to install. Legend: `workers` are processes that decode.
"""

import importlib.util
import pickle
import re
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from vlscale.data.images import ImageSpec, normalise
from vlscale.data.stream import TrainStream
from vlscale.sections import AugmentConfig, DataConfig

SPEC = ImageSpec(224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), resample=3)
BATCH = 32
SHARDS = 4


@dataclass(frozen=True)
class Job:
    folder: Path
    pictures: int
    workers: int
    tokenizer: object


@dataclass(frozen=True)
class Pipeline:
    name: str
    package: str  # that has to be installed
    state: str  # how the place in the stream is kept: "kept", "not kept", or "none" where there is no such thing
    batches: Callable[[Job], Iterator[int]] | None  # None: the package is missing


def pipelines() -> list[Pipeline]:
    """Ours first."""
    has_open_clip = all(map(importlib.util.find_spec, ("open_clip", "open_clip_train", "pandas", "torchvision")))
    has_mosaic = importlib.util.find_spec("streaming") is not None
    return [
        Pipeline("vlscale", "vlscale", "not kept", lambda job: vlscale_pictures(job, keep_state=False)),
        Pipeline("vlscale", "vlscale", "kept", lambda job: vlscale_pictures(job, keep_state=True)),
        Pipeline("vlscale, decode=device", "vlscale", "not kept", decoded_pictures),
        Pipeline("webdataset", "webdataset", "none", webdataset_pictures),
        Pipeline("open_clip", "open_clip_torch", "none", open_clip_pictures if has_open_clip else None),
        Pipeline("mosaicml-streaming", "mosaicml-streaming", "not kept", mosaic_pictures if has_mosaic else None),
    ]


def vlscale_pictures(job: Job, keep_state: bool) -> Iterator[int]:
    for batch in vlscale_stream(job):
        if keep_state:
            pickle.dumps(batch.state)
        yield len(normalise(batch.images, SPEC))


def decoded_pictures(job: Job) -> Iterator[int]:
    """All that is left for the CPU where a GPU crops, resizes and scales; that is not in it."""
    for batch in vlscale_stream(job, decode="device"):
        yield len(batch.images.sizes)


def vlscale_stream(job: Job, **options) -> TrainStream:
    augment = AugmentConfig(crop_scale=0.9)
    data = DataConfig(train=[str(job.folder / "p-*.tar")], augment=augment, workers=job.workers, **options)
    return TrainStream(data, SPEC, job.tokenizer, global_batch_size=BATCH, seed=0)


def webdataset_pictures(job: Job) -> Iterator[int]:
    """As its documentation has it: Pillow, a resize, float; no tokens."""
    shards = sorted(str(path) for path in job.folder.glob("p-*.tar"))
    stream = webdataset.WebDataset(shards, shardshuffle=False).shuffle(100).decode("pil").to_tuple("jpg", "txt")
    stream = stream.map_tuple(_to_float, len).batched(BATCH).repeat()
    for pictures, _ in webdataset.WebLoader(stream, batch_size=None, num_workers=job.workers):
        yield len(pictures)


def open_clip_pictures(job: Job) -> Iterator[int]:
    stub_torchvision()
    from open_clip import get_tokenizer
    from open_clip.transform import image_transform
    from open_clip_train import data as theirs

    expand = theirs.tar_file_expander
    if expand.__module__.startswith("webdataset"):  # newer ones mark a shard's end, which open_clip cannot read
        theirs.tar_file_expander = lambda *args, **kw: (entry for entry in expand(*args, **kw) if "fname" in entry)
    options = Namespace(
        train_data=str(job.folder / f"p-{{000000..{SHARDS - 1:06d}}}.tar"), dataset_resampled=False,
        train_num_samples=job.pictures, seed=0, train_data_upsampling_factors=None, batch_size=BATCH,
        workers=job.workers, world_size=1,
    )  # fmt: skip
    transform = image_transform(224, is_train=True)
    data = theirs.get_wds_dataset(options, transform, True, tokenizer=get_tokenizer("ViT-B-32"))
    while True:
        for batch, _ in data.dataloader:
            yield len(batch)


def mosaic_pictures(job: Job) -> Iterator[int]:
    """The same JPEG files in its own format, unpacked, resized and cast as webdataset's."""
    stub_torchvision()
    import streaming

    class Pictures(streaming.StreamingDataset):
        def __getitem__(self, at):
            return _to_float(super().__getitem__(at)["jpg"])

    with tempfile.TemporaryDirectory() as place:
        with streaming.MDSWriter(out=place, columns={"jpg": "jpeg", "txt": "str"}) as writer:
            for sample in webdataset.WebDataset(
                sorted(map(str, job.folder.glob("p-*.tar"))), shardshuffle=False
            ).decode("pil"):
                writer.write({"jpg": sample["jpg"], "txt": sample["txt"]})
        stream = Pictures(local=place, shuffle=True, batch_size=BATCH)
        while True:
            for pictures in torch.utils.data.DataLoader(stream, batch_size=BATCH, num_workers=job.workers):
                yield len(pictures)


@cache
def stub_torchvision() -> torch.library.Library | None:
    """Lets torchvision import on a CPU-only torch: it names operators that only its own build has. The library's
    operators live as long as it is kept."""
    if torch.cuda.is_available():
        return None
    spec = importlib.util.find_spec("torchvision")
    source = (Path(spec.submodule_search_locations[0]) / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "DEF")
    for name in set(re.findall(r"(?:register_meta\(\"|torchvision::)([a-z_0-9]+)", source)):
        library.define(f"{name}(Tensor x) -> Tensor")
    return library


def _to_float(picture: Image.Image) -> torch.Tensor:
    resized = picture.convert("RGB").resize((SPEC.size, SPEC.size), SPEC.resample)
    return torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)
