"""Towers from configs and folders: which model types work, dropout, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, BertForMaskedLM, DistilBertModel, ViTForImageClassification

from vlscale.models.teachers import load_teacher
from vlscale.models.towers import WORKING, build_tower, image_size, set_dropout

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
VISION = SMALL | {"image_size": 32, "patch_size": 8}
TEXT = SMALL | {"vocab_size": 50, "max_position_embeddings": 24, "pad_token_id": 0, "eos_token_id": 3}
IDS = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0], [2, 9, 8, 3]])
OWN = {
    "swinv2": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
    }
}


def config_of(modality: str, model_type: str) -> dict:
    options = OWN.get(model_type) or (VISION if modality == "vision" else TEXT)
    return {"model_type": model_type, **options}


def forward(modality: str, tower) -> torch.Tensor:
    torch.manual_seed(0)
    if modality == "vision":
        return tower(pixel_values=torch.randn(3, 3, 32, 32)).pooler_output
    return tower(input_ids=IDS, attention_mask=(IDS > 0).long()).pooler_output


@pytest.mark.parametrize(("modality", "model_type"), [(m, t) for m, types in WORKING.items() for t in types])
def test_every_listed_type_pools_and_loses_its_dropout(modality, model_type):
    torch.manual_seed(0)
    tower = build_tower(modality, None, config_of(modality, model_type), dropout=0.0).train()
    first, second = forward(modality, tower), forward(modality, tower)
    assert first.shape == (3, tower.config.hidden_size)
    assert torch.equal(first, second), "some dropout is left"
    assert not torch.allclose(first[0], first[1])


def test_dropout_reaches_attention_hidden_and_path_rates():
    config = AutoConfig.for_model("dinov2", **VISION)
    set_dropout(config, 0.25)
    assert config.attention_probs_dropout_prob == config.hidden_dropout_prob == config.drop_path_rate == 0.25


@pytest.mark.parametrize(("modality", "model_type"), [("vision", "vit_mae"), ("text", "distilbert")])
def test_towers_without_pooler_output_are_refused_with_the_list_of_those_that_work(modality, model_type):
    options = VISION if modality == "vision" else {"dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 50}
    with pytest.raises(ValueError, match=f"no usable pooler_output.*{WORKING[modality][0]}"):
        build_tower(modality, None, {"model_type": model_type, **options}, dropout=None)


@pytest.mark.parametrize(
    ("source", "config", "said"),
    [
        (None, None, "exactly one of .* got neither"),
        ("a", {}, "exactly one of .* got both"),
        (None, {"hidden_size": 3}, "needs model_type; known to work"),
        (None, {"model_type": "no-such-model"}, "could not be built"),
        ("./no-such-folder", None, "does not exist"),
    ],
)
def test_bad_tower_settings_are_one_line(source, config, said):
    with pytest.raises(ValueError, match=said) as error:
        build_tower("vision", source, config, None)
    assert "\n" not in str(error.value)


def test_a_folder_gives_its_weights_and_one_without_is_refused(tmp_path):
    saved = AutoModel.from_config(AutoConfig.for_model("vit", **VISION))
    saved.save_pretrained(tmp_path / "vit")
    tower = build_tower("vision", str(tmp_path / "vit"), None, None)
    assert image_size(tower) == 32
    for name, value in saved.state_dict().items():
        assert torch.equal(tower.state_dict()[name], value)
    (tmp_path / "vit" / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"expected model.safetensors, got config.json \(check the path\)"):
        build_tower("vision", str(tmp_path / "vit"), None, None)
    (tmp_path / "elsewhere").rename(tmp_path / "vit" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"got config.json, pytorch_model.bin \(convert pickled weights"):
        build_tower("vision", str(tmp_path / "vit"), None, None)


def test_a_picture_size_that_is_not_square_is_refused():
    tower = AutoModel.from_config(AutoConfig.for_model("vit", **(VISION | {"image_size": [32, 64]})))
    with pytest.raises(ValueError, match="square"):
        image_size(tower)


@pytest.mark.parametrize(
    ("modality", "model_type", "kept"),
    [
        ("text", "bert", BertForMaskedLM),
        ("text", "distilbert", DistilBertModel),
        ("vision", "vit", ViTForImageClassification),
    ],
)
def test_a_teacher_without_a_pooling_layer_speaks_by_its_tokens(modality, model_type, kept, tmp_path, caplog):
    """Classifiers and language models are kept without one: a random one would say something else in each process."""
    options = {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2, "vocab_size": 50}
    options = {"model_type": model_type, **options} if kept is DistilBertModel else config_of(modality, model_type)
    kept(AutoConfig.for_model(**options)).save_pretrained(tmp_path)
    teacher, plain = load_teacher(modality, str(tmp_path)), AutoModel.from_pretrained(tmp_path).eval()
    if modality == "vision":
        inputs = {"pixel_values": torch.randn(3, 3, 32, 32)}
        said = plain(**inputs).last_hidden_state[:, 0]
    else:
        inputs = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
        tokens = plain(**inputs).last_hidden_state
        said = torch.stack([row[ids > 0].mean(0) for row, ids in zip(tokens, IDS, strict=True)])
    torch.testing.assert_close(teacher(**inputs), F.normalize(said, dim=1))
    assert teacher.width == 32
    if kept is not DistilBertModel:  # a student's pooling layer learns, so it may begin random
        build_tower(modality, str(tmp_path), None, dropout=None)
        assert f"model {tmp_path}: its weights lack pooler.dense.bias, pooler.dense.weight, which begin" in caplog.text


def test_a_teacher_that_lacks_other_weights_is_refused(tmp_path):
    tower = AutoModel.from_config(AutoConfig.for_model(**config_of("text", "bert")))
    weights = {name: value for name, value in tower.state_dict().items() if "attention.self.query" not in name}
    tower.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=f"teacher {tmp_path}: its weights lack .*query.bias, .*query.weight, so what"):
        load_teacher("text", str(tmp_path))
