"""Towers out of local CLIP, SigLIP, DINOv2, DINOv3, BERT, MiniLM and RoBERTa folders: their weights, and the way out
again."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    DINOv3ViTConfig,
    RobertaConfig,
    SiglipConfig,
    SiglipModel,
)

from tests.export.towers import TEXT, VISION
from vlscale.export.folder import export_model
from vlscale.export.loaded import load_model
from vlscale.models.dual_encoder import build_dual_encoder, load_dual_encoder
from vlscale.models.hf_folder import new_image_processor, save_folder
from vlscale.models.towers import build_tower, check_room
from vlscale.sections import ModelConfig

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
MASK = (IDS > 0).long()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sources")
    models = {
        "clip": CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)),
        "siglip": SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)),
        "dinov2": AutoModel.from_config(Dinov2Config(**VISION)),
        "dinov3": AutoModel.from_config(DINOv3ViTConfig(**VISION, num_register_tokens=2)),
        "bert": AutoModel.from_config(BertConfig(**TEXT)),
        "minilm": AutoModel.from_config(BertConfig(**TEXT | {"hidden_size": 16, "num_hidden_layers": 2})),
        "roberta": AutoModel.from_config(RobertaConfig(**TEXT)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ("clip", "clip"),
        ("siglip", "bert"),
        ("dinov2", "roberta"),
        ("dinov2", "bert"),
        ("dinov2", "minilm"),
        ("dinov3", "bert"),
        ("dinov3", "roberta"),
        ("dinov3", "minilm"),
    ],
)
def test_pairs_of_folders_start_train_and_export(sources, tokenizer, tmp_path, vision, text):
    towers = {"vision": {"source": str(sources[vision])}, "text": {"source": str(sources[text])}}
    encoder = build_dual_encoder(ModelConfig.model_validate({"embed_dim": 16, **towers})).eval()
    inputs = {"vision": {"pixel_values": PIXELS}, "text": {"input_ids": IDS, "attention_mask": MASK}}
    for modality, source in (("vision", vision), ("text", text)):
        own = AutoModel.from_pretrained(sources[source]).eval()
        own = getattr(own, f"{modality}_model", own)
        with torch.no_grad():
            given = encoder.tower(modality)(**inputs[modality]).pooler_output
            torch.testing.assert_close(given, own(**inputs[modality]).pooler_output, rtol=0, atol=1e-6)
    processor = new_image_processor(32, (0.5,) * 3, (0.5,) * 3)
    save_folder(tmp_path / "final", encoder, dict(encoder.state_dict()), tokenizer, processor)
    again = load_model(str(export_model(str(tmp_path / "final"), tmp_path / "out"))).encoder
    with torch.no_grad():
        assert torch.equal(again.encode_image(PIXELS), encoder.encode_image(PIXELS))
        assert torch.equal(again.encode_text(IDS, MASK), encoder.encode_text(IDS, MASK))


def test_a_whole_clip_is_a_starting_point_with_its_projections(sources):
    """`init_from` a CLIPModel folder: embeddings of the first step are CLIP's own."""
    clip = CLIPModel.from_pretrained(sources["clip"]).eval()
    towers = {"vision": {"source": str(sources["clip"])}, "text": {"source": str(sources["clip"])}}
    settings = {"embed_dim": 16, "init_from": str(sources["clip"]), **towers}
    encoder = build_dual_encoder(ModelConfig.model_validate(settings)).eval()
    with torch.no_grad():
        out = clip(input_ids=IDS, attention_mask=MASK, pixel_values=PIXELS)
        torch.testing.assert_close(encoder.encode_image(PIXELS), out.image_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(encoder.encode_text(IDS, MASK), out.text_embeds, rtol=0, atol=1e-5)


def test_a_clip_is_loaded_without_a_warning_of_its_type(sources, monkeypatch):
    said, root = [], logging.getLogger("transformers")
    handler = logging.Handler()
    handler.emit = said.append
    monkeypatch.setattr(root, "handlers", [handler])
    assert load_dual_encoder(str(sources["clip"])).config.projection_dim == 16
    assert not said, [record.getMessage() for record in said]


@pytest.mark.parametrize(
    ("modality", "name", "said"),
    [
        ("vision", "bert", "bert cannot be a vision tower: it has no image_size"),
        ("text", "dinov2", "dinov2 cannot be a text tower: it has no vocab_size"),
    ],
)
def test_towers_that_no_folder_could_hold_are_refused_at_the_start(sources, modality, name, said):
    with pytest.raises(ValueError, match=said):
        build_tower(modality, str(sources[name]), None, None)


def test_captions_longer_than_the_text_tower_are_refused_at_the_start():
    config = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for model_type, room in (("bert", 24), ("roberta", 22)):
        built = AutoConfig.for_model(model_type, max_position_embeddings=24, pad_token_id=1, **config)
        check_room(AutoModel.from_config(built), room)
        with pytest.raises(ValueError, match=f"has positions for {room} tokens"):
            check_room(AutoModel.from_config(built), room + 1)
