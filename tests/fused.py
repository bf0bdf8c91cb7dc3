"""A small dual encoder with a fusion encoder, saved as a run's `final/` is."""

from pathlib import Path

import torch

from tests.conftest import TINY
from vlscale.data.samples import read_samples
from vlscale.data.tokens import train_tokenizer
from vlscale.models.dual_encoder import DualEncoder, build_dual_encoder
from vlscale.models.hf_folder import new_image_processor, save_folder
from vlscale.sections import DataConfig, ModelConfig

SCENES = DataConfig(caption_key="json:captions")
MAX_LENGTH = 24


def build_fused(vocab_size: int = 300, kind: str = "bert") -> DualEncoder:
    """Two text layers and two of fusion, strong enough at the start for pairs to differ."""
    torch.manual_seed(0)
    text = TINY["model"]["text"]["config"] | {"model_type": kind, "vocab_size": vocab_size, "num_hidden_layers": 4}
    text |= {"max_position_embeddings": MAX_LENGTH + 2, "pad_token_id": 0}
    model = TINY["model"] | {"text": {"config": text}, "fusion": {"source": "text"}}
    encoder = build_dual_encoder(ModelConfig.model_validate(model)).eval()
    torch.nn.init.normal_(encoder.fusion.matching.weight)
    for layer in encoder.fusion.layers:
        torch.nn.init.normal_(layer.crossattention.self.value.weight, std=0.5)
    return encoder


def save_fused(folder: Path, urls: list[str]) -> DualEncoder:
    captions = (caption for sample in read_samples(urls, SCENES) for caption in sample.captions)
    tokenizer = train_tokenizer(captions, 300, MAX_LENGTH)
    encoder = build_fused(len(tokenizer))
    save_folder(folder, encoder, dict(encoder.state_dict()), tokenizer, new_image_processor(32, (0.5,) * 3, (0.5,) * 3))
    return encoder
