"""Shared: a trained tiny run with its evaluation, and a dual encoder of CLIP's towers."""

from pathlib import Path

import pytest
import torch

from tests.export.towers import TEXT, VISION
from vlscale.config import load_plan
from vlscale.data.samples import open_corpus
from vlscale.data.tokens import train_tokenizer
from vlscale.models.dual_encoder import build_dual_encoder
from vlscale.models.hf_folder import new_image_processor, save_folder
from vlscale.sections import DataConfig, ModelConfig
from vlscale.train.plan import train_plan

CAPTIONS = ["a red disc", "two blue stars and a green disc", "stars"]


@pytest.fixture(scope="session")
def val(corpus) -> str:
    return f"{corpus}/val-*.tar"


@pytest.fixture(scope="session")
def held_out(val) -> int:
    """How many samples `val` has."""
    data = DataConfig(caption_key="json:captions")
    return open_corpus([val], data).num_samples


@pytest.fixture(scope="session")
def run(tiny_config, corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "tiny-run"
    validated = f"data.val={corpus}/val-*.tar"
    train_plan(load_plan(tiny_config, ["log.progress=false", "train.max_steps=2", validated]), out, resume=False)
    return out


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(CAPTIONS, vocab_size=60, max_length=16)


@pytest.fixture(scope="session")
def clip_towers(tokenizer, tmp_path_factory) -> Path:
    """A folder as `final/`, sigmoid loss, of CLIP's towers with fresh weights."""
    torch.manual_seed(0)
    towers = {
        "vision": {"config": {"model_type": "clip_vision_model", **VISION}},
        "text": {"config": {"model_type": "clip_text_model", **TEXT}},
    }
    encoder = build_dual_encoder(ModelConfig.model_validate({"embed_dim": 16, **towers}), sigmoid=True)
    folder = tmp_path_factory.mktemp("clip") / "final"
    processor = new_image_processor(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    save_folder(folder, encoder, dict(encoder.state_dict()), tokenizer, processor)
    return folder
