"""A synthetic corpus, its tokenizer and a stream over it, made once."""

import os
import shutil
from pathlib import Path

import pytest

from vlscale.data.images import ImageSpec
from vlscale.data.samples import read_samples
from vlscale.data.stream import TrainStream, merge_states
from vlscale.data.synth import make_corpus, synth_config
from vlscale.data.tokens import train_tokenizer
from vlscale.sections import AugmentConfig, DataConfig

SPEC = ImageSpec(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="session")
def emoji_folder() -> Path:
    root = os.environ.get("VLSCALE_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(root) / "emoji"
    if not list(folder.glob("*.tar")):
        pytest.skip("no emoji shards; set VLSCALE_TEST_DATA to the folder that holds emoji/")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """2,000 pairs in 8 shards of which the last is short, and 60 held-out ones."""
    out = tmp_path_factory.mktemp("synth") / "corpus"
    make_corpus(out, synth_config(pairs=2_000, val_pairs=60, resolution=16, shard_size=270), progress=False)
    return out


@pytest.fixture
def own_corpus(corpus, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(corpus, tmp_path / "corpus"))


@pytest.fixture(scope="session")
def tokenizer(corpus):
    captions = [
        caption for sample in read_samples(str(corpus / "val-*.tar"), config(corpus)) for caption in sample.captions
    ]
    return train_tokenizer(captions, 1_000, 48)


def config(corpus: Path, **changes) -> DataConfig:
    given = {
        "train": [str(corpus / "train-*.tar")],
        "caption_key": "json:captions",
        "augment": AugmentConfig(shift=0.1),
    }
    return DataConfig(**{**given, **changes})


@pytest.fixture
def make_config():
    return config


@pytest.fixture
def spec() -> ImageSpec:
    return SPEC


@pytest.fixture
def run_stream(corpus, tokenizer):
    """`steps` batches of every rank of a simulated world, step by step, and the merged state after them."""

    def run(steps, world_size=1, state=None, folder=None, batch_size=64, seed=5, data=None, **options):
        data = data or config(folder or corpus)
        streams = [
            TrainStream(
                data,
                SPEC,
                tokenizer,
                global_batch_size=batch_size,
                seed=seed,
                rank=rank,
                world_size=world_size,
                state=state,
                **options,
            )
            for rank in range(world_size)
        ]
        iterators = [iter(stream) for stream in streams]
        try:
            rows = [[next(iterator) for iterator in iterators] for _ in range(steps)]
        finally:
            for iterator in iterators:
                iterator.close()
        return rows, merge_states([stream.state for stream in streams])

    return run


@pytest.fixture
def keys_of():
    """Keys of each global batch, ranks put together."""
    return lambda rows: [[key for batch in row for key in batch.keys] for row in rows]
