"""Models of other families as teachers: the encoder of an encoder-decoder, pictures without a pooling layer."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTMAEForPreTraining,
    ViTMSNModel,
)

from vlscale.config import load_plan
from vlscale.data.samples import read_samples
from vlscale.data.tokens import train_tokenizer
from vlscale.export.teach import TeachRequest, open_job
from vlscale.models.hf_folder import new_image_processor
from vlscale.models.teachers import load_teacher
from vlscale.sections import DataConfig
from vlscale.train.frozen_teachers import load_image_teacher
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan

IDS = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0], [2, 3, 0, 0]])
MASK = (IDS > 0).long()
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "initializer_factor": 1.0}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "init_std": 0.3}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 40}
VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT |= {"intermediate_size": 64, "initializer_range": 0.3}


def text_config(model_type: str, **more):
    own = BART if model_type == "bart" else T5
    return AutoConfig.for_model(model_type, **own, vocab_size=60, decoder_start_token_id=0, pad_token_id=0, **more)


def test_of_an_encoder_and_a_decoder_the_encoder_speaks(tmp_path):
    for model_type, kind in (("t5", None), ("mt5", None), ("bart", None), ("t5", T5EncoderModel)):
        config = text_config(model_type)
        saved = (AutoModel.from_config(config) if kind is None else kind(config)).eval()
        folder = tmp_path / f"{model_type} {kind}"
        saved.save_pretrained(folder)
        teacher = load_teacher("text", str(folder))
        tokens = saved.get_encoder()(input_ids=IDS, attention_mask=MASK).last_hidden_state
        said = torch.stack([row[ids > 0].mean(0) for row, ids in zip(tokens, IDS, strict=True)])
        torch.testing.assert_close(teacher(input_ids=IDS, attention_mask=MASK), F.normalize(said, dim=1))
        assert teacher.width == 16 and not any("decoder" in name for name in teacher.tower.state_dict())


def test_an_encoder_that_lacks_weights_is_refused_whatever_its_decoder_has(tmp_path):
    T5ForConditionalGeneration(text_config("t5")).save_pretrained(tmp_path)
    place = tmp_path / "model.safetensors"
    kept = {name: value for name, value in load_file(place).items() if "encoder.block.0.layer.0" not in name}
    save_file(kept, place, {"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack encoder\.block\.0\.layer\.0.* would be random"):
        load_teacher("text", str(tmp_path))


@pytest.mark.parametrize("kind", [ViTMAEForPreTraining, ViTMSNModel])
def test_pictures_without_a_pooling_layer_speak_by_their_class_token(kind, tmp_path):
    name = "vit_mae" if kind is ViTMAEForPreTraining else "vit_msn"
    own = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
    saved = kind(AutoConfig.for_model(name, **VIT, **(own if name == "vit_mae" else {}))).eval()
    saved.save_pretrained(tmp_path)
    teacher, pixels = load_teacher("vision", str(tmp_path)), torch.randn(3, 3, 32, 32)
    before = torch.get_rng_state()
    found = teacher(pixel_values=pixels)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(found, teacher(pixel_values=pixels))
    if name == "vit_mae":
        saved.vit.config.mask_ratio = 0.0
        saved = saved.vit
    said = saved(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(found, F.normalize(said, dim=1), rtol=1e-4, atol=1e-5)
    assert teacher.width == 32


def test_a_convolutional_tower_speaks_by_its_pooled_channels(tmp_path):
    config = AutoConfig.for_model("resnet", embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    saved = AutoModel.from_config(config).eval()
    saved.save_pretrained(tmp_path)
    teacher, pixels = load_teacher("vision", str(tmp_path)), torch.randn(3, 3, 32, 32)
    said = saved(pixel_values=pixels).pooler_output.reshape(3, 12)
    torch.testing.assert_close(teacher(pixel_values=pixels), F.normalize(said, dim=1))
    assert teacher.width == 12


def test_a_picture_model_that_says_nothing_is_refused_in_one_line(tmp_path):
    small = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_encoder_blocks": 2, "sr_ratios": [1, 1], "image_size": 32}
    small |= {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 1], "mlp_ratios": [1, 1]}
    AutoModel.from_config(AutoConfig.for_model("segformer", **small)).save_pretrained(tmp_path)
    new_image_processor(32, (0.5,) * 3, (0.5,) * 3).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="cannot embed a sample: it has neither a pooler_output nor a class token"
    ) as said:
        _ = load_image_teacher(str(tmp_path)).facts
    assert "\n" not in str(said.value)


@pytest.fixture(scope="module")
def teachers(corpus, tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a masked autoencoder with its processor, and of a T5 with its tokenizer."""
    place = tmp_path_factory.mktemp("teachers")
    scenes = read_samples([f"{corpus}/train-*.tar"], DataConfig(caption_key="json:captions"))
    tokenizer = train_tokenizer((c for sample in scenes for c in sample.captions), vocab_size=60, max_length=24)
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("vit_mae", **VIT)).save_pretrained(place / "mae")
    new_image_processor(32, (0.5,) * 3, (0.5,) * 3).save_pretrained(place / "mae")
    T5ForConditionalGeneration(text_config("t5")).save_pretrained(place / "t5")
    tokenizer.save_pretrained(place / "t5")
    return place / "mae", place / "t5"


def test_they_teach_at_every_step_and_by_a_cache_alike(tiny_config, corpus, teachers, tmp_path):
    image, text = map(str, teachers)
    shards = sorted(map(str, corpus.glob("train-*.tar")))
    open_job(TeachRequest(shards, DataConfig(caption_key="json:captions"), tmp_path / "cache", image, text)).run()
    found = []
    for source in (
        ["teacher.source=hf", f"teacher.image={image}", f"teacher.text={text}"],
        ["teacher.source=cache", f"teacher.cache={tmp_path / 'cache'}"],
    ):
        given = ["objective.name=covlr", "train.max_steps=1", "log.progress=false", "data.decode=pil", *source]
        train_plan(load_plan(tiny_config, given), tmp_path / "run", resume=False)
        (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
        found.append([line["relation_image"], line["relation_text"]])
        shutil.rmtree(tmp_path / "run")
    assert found[0] == pytest.approx(found[1], abs=2e-4) and min(found[0]) > 0.01
