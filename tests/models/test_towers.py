"""Towers from configs and folders: which model types work, dropout, and what is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from vlscale.models.towers import WORKING, build_tower, image_size, set_dropout

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
VISION = SMALL | {"image_size": 32, "patch_size": 8}
TEXT = SMALL | {"vocab_size": 50, "max_position_embeddings": 24, "pad_token_id": 0, "eos_token_id": 3}
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
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0], [2, 9, 8, 3]])
    return tower(input_ids=ids, attention_mask=(ids > 0).long()).pooler_output


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
    with pytest.raises(ValueError, match=r"holds no weights: expected model.safetensors, got config.json"):
        build_tower("vision", str(tmp_path / "vit"), None, None)


def test_a_picture_size_that_is_not_square_is_refused():
    tower = AutoModel.from_config(AutoConfig.for_model("vit", **(VISION | {"image_size": [32, 64]})))
    with pytest.raises(ValueError, match="square"):
        image_size(tower)
