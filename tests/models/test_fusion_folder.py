"""A fusion encoder on disk: bit for bit as it was, invisible to plain transformers, refused where it does not fit; and
the shortcut of matching many captions with one picture."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, VisionTextDualEncoderModel

from tests.fused import build_fused, save_fused
from vlscale.models.fusion import SPLITTABLE
from vlscale.models.fusion_folder import load_fusion, save_fusion
from vlscale.models.hf_folder import load_encoder
from vlscale.models.match_picture import match_picture

IDS = torch.tensor([[2, 5, 6, 7, 8, 3], [2, 9, 3, 0, 0, 0], [2, 3, 0, 0, 0, 0]])
MASK = (IDS > 0).long()


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused") / "final"
    return folder, save_fused(folder, [f"{corpus}/val-*.tar"])


def scores(encoder, pixels: torch.Tensor) -> torch.Tensor:
    """(3, 2) logits of IDS with one picture (1, 3, H, W), by the plain forward."""
    with torch.no_grad():
        _, text = encoder.text_tokens(IDS, MASK)
        _, picture = encoder.image_tokens(pixels)
        return encoder.fusion.matching(encoder.fusion(text, MASK, picture.repeat(3, 1, 1))[:, 0])


def test_a_folder_gives_the_same_model_back_bit_for_bit(saved):
    folder, encoder = saved
    again, _, _ = load_encoder(str(folder))
    own, theirs = encoder.state_dict(), again.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)
    assert any(name.startswith("fusion.") for name in own)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(scores(encoder, pixels), scores(again, pixels)) and not again.fusion.training


def test_plain_transformers_loads_the_dual_encoder_and_misses_nothing(saved):
    folder, encoder = saved
    model, told = VisionTextDualEncoderModel.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        plain = model.get_text_features(input_ids=IDS, attention_mask=MASK)
        plain = plain if torch.is_tensor(plain) else plain.pooler_output
        ours, _ = encoder.text_tokens(IDS, MASK)
    torch.testing.assert_close(torch.nn.functional.normalize(plain), ours, rtol=0, atol=1e-6)
    assert not [name for name in load_file(folder / "model.safetensors") if "fusion" in name]


def test_a_folder_without_one_gives_none(tmp_path):
    assert load_fusion(tmp_path) is None


def test_a_fusion_encoder_of_other_towers_is_refused(saved):
    folder, encoder = saved
    vision, text = encoder.vision_model, encoder.text_model
    wide = build_fused().text_model
    wide.config.hidden_size = 48
    assert load_fusion(folder, (vision, text)) is not None
    with pytest.raises(ValueError, match="takes text tokens of 32 numbers, the text tower beside it gives 48") as error:
        load_fusion(folder, (vision, wide))
    assert "\n" not in str(error.value)


def test_files_that_do_not_belong_together_are_one_clear_line(saved, tmp_path):
    save_fusion(saved[1].fusion, tmp_path)
    weights = load_file(tmp_path / "fusion" / "model.safetensors")
    save_file(weights | {"matching.weight": torch.zeros(3, 32)}, tmp_path / "fusion" / "model.safetensors")
    with pytest.raises(ValueError, match=r"matching.weight has shape \(3, 32\), expected \(2, 32\)"):
        load_fusion(tmp_path)
    weights.pop("matching.bias")
    save_file(weights, tmp_path / "fusion" / "model.safetensors")
    with pytest.raises(ValueError, match=r"matching.bias has shape None, expected \(2,\)"):
        load_fusion(tmp_path)
    (tmp_path / "fusion" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="holds no fusion encoder that can be loaded"):
        load_fusion(tmp_path)
    (tmp_path / "fusion" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="holds no fusion encoder that can be loaded"):
        load_fusion(tmp_path)


@pytest.mark.parametrize("kind", SPLITTABLE)
def test_one_picture_with_many_captions_scores_as_the_forward_does(kind):
    encoder = build_fused(kind=kind)
    pixels = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for picture in pixels:
        with torch.no_grad():
            _, text = encoder.text_tokens(IDS, MASK)
            _, seen = encoder.image_tokens(picture)
            found.append(match_picture(encoder.fusion, text, MASK, seen[0]))
        torch.testing.assert_close(found[-1], scores(encoder, picture), rtol=1e-5, atol=1e-5)
    assert (found[0] - found[1]).abs().min() > 1e-4 and found[0][:, 1].std() > 1e-2  # both sides are looked at
