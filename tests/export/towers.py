"""Towers small enough to build in every test: their configs, and whole folders as they are downloaded."""

from pathlib import Path

import torch
from transformers import AutoModel, BertConfig, CLIPConfig, CLIPModel, Dinov2Config

from vlscale.models.hf_folder import new_image_processor

TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
VISION = TOWER | {"image_size": 32, "patch_size": 8}
TEXT = TOWER | {
    "vocab_size": 60,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def save_clip(folder: Path, tokenizer) -> None:
    """A CLIP, as wide as B/32 where a config has to say it, else small."""
    torch.manual_seed(0)
    own = {"vocab_size": len(tokenizer), "max_position_embeddings": 77, "eos_token_id": tokenizer.sep_token_id}
    config = CLIPConfig(text_config=TEXT | own, vision_config=VISION, projection_dim=512)
    _save(folder, CLIPModel(config), tokenizer)


def save_dinov2(folder: Path) -> None:
    torch.manual_seed(0)
    _save(folder, AutoModel.from_config(Dinov2Config(**VISION)))


def save_minilm(folder: Path, tokenizer, **changes) -> None:
    torch.manual_seed(0)
    text = BertConfig(**TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": 80} | changes)
    _save(folder, AutoModel.from_config(text), tokenizer, pictures=False)


def _save(folder: Path, model, tokenizer=None, *, pictures: bool = True) -> None:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if pictures:
        new_image_processor(32, (0.5,) * 3, (0.5,) * 3).save_pretrained(folder)
