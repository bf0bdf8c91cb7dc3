"""Shared: a small synthetic corpus, a tiny config for it, and the folder of real data where there is one."""

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which DeepSpeed does too

from vlscale.data.synth import make_corpus, synth_config
from vlscale.logging import get_logger

ROOT = Path(__file__).resolve().parents[1]

# Files that take a worker longest, in that order: what begins last ends last, and the other worker would wait for it.
LONGEST = ["test_recipes", "train/test_launch", "train/test_plan_over_ranks", "train/test_meta_launch"]
LONGEST += ["train/test_ten_steps", "failures/test_two_ranks", "kernels/test_triton_relation", "train/test_plan"]
LONGEST += ["kernels/test_compiled"]
LONGEST += ["test_method_resume", "kernels/test_triton", "objectives/test_over_ranks", "test_method_study"]
LONGEST += ["train/test_fusion_launch", "train/test_diagnostics", "train/test_start", "train/test_accumulate"]
LONGEST += ["test_bench_kernels", "test_docs", "train/test_fused_over_ranks", "kernels/test_triton_memory"]
LONGEST = [f"tests/{name}.py" for name in LONGEST]

TINY = {
    "data": {"caption_key": "json:captions"},
    "model": {
        "embed_dim": 16,
        "dropout": 0.0,
        "vision": {
            "config": {
                "model_type": "vit",
                "image_size": 32,
                "patch_size": 8,
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 64,
            }
        },
        "text": {
            "max_length": 24,
            "vocab_size": 300,
            "config": {
                "model_type": "bert",
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "initializer_range": 0.3,  # untrained captions differ: a frozen copy is then a teacher
            },
        },
    },
    "train": {"global_batch_size": 32, "max_steps": 6, "checkpoint_every": 2},
    "engine": {"threads": 1},
}


def pytest_collection_modifyitems(items) -> None:
    assert [name for name in LONGEST if not (ROOT / name).is_file()] == []
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(places)))


def pytest_collection_finish(session) -> None:
    """Each run that ends collects garbage: among its own objects then, not among all that were imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def log_reaches_pytest(monkeypatch) -> Iterator[None]:
    """`caplog` sees the lines of vlscale, also after a command or another test in this process set up its own log."""
    logger = get_logger()
    monkeypatch.setattr(logger, "propagate", True)
    before = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """256 training and 63 held-out scenes as shards."""
    folder = tmp_path_factory.mktemp("corpus") / "scenes"
    make_corpus(folder, synth_config(pairs=256, val_pairs=63, shard_size=64), processes=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, corpus) -> Path:
    """A recipe over the small corpus that trains in a second."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"data": TINY["data"] | {"train": [f"{corpus}/train-*.tar"]}}))
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real pictures and captions beside the checkout, or named by VLSCALE_TEST_DATA; tests of it skip without."""
    folder = Path(os.environ.get("VLSCALE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data here")
    return folder
