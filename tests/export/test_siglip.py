"""SigLIP folders as starting points: the features are SiglipModel's own, a run trains them, and they go out again."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn.functional import normalize, pad
from transformers import AutoModel, AutoProcessor, SiglipConfig, SiglipModel, SiglipTextModel

from tests.conftest import TINY
from tests.export.towers import TEXT, VISION
from vlscale.config import load_plan
from vlscale.evaluate.run import EvalRequest, evaluate_model
from vlscale.export.folder import export_model
from vlscale.export.loaded import load_model
from vlscale.models.dual_encoder import build_dual_encoder
from vlscale.models.hf_folder import new_image_processor, save_folder
from vlscale.models.teachers import build_teachers
from vlscale.models.towers import build_tower, check_room
from vlscale.sections import ModelConfig, TeacherConfig
from vlscale.train.plan import train_plan

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
MASK = (IDS > 0).long()
ROOM = TEXT["max_position_embeddings"]
CAPTIONS = ["a red disc", "stars"]


@pytest.fixture(scope="module")
def source(tokenizer, tmp_path_factory) -> Path:
    """A SigLIP folder with its processor. As in SigLIP2's, the config names another padding than the tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("siglip") / "source"
    text = TEXT | {"pad_token_id": 1, "hidden_size": 16, "projection_size": 32}
    SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    new_image_processor(32, (0.5,) * 3, (0.5,) * 3).save_pretrained(folder)
    return folder


def settings(source: Path, **changes) -> ModelConfig:
    towers = {"vision": {"source": str(source)}, "text": {"source": str(source)}}
    return ModelConfig.model_validate({"embed_dim": 32, **towers} | changes)


@torch.no_grad()
def own_features(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """SiglipModel's normalised features of PIXELS, and of IDS padded as SigLIP wants them."""
    model = SiglipModel.from_pretrained(folder).eval()
    full = pad(IDS, (0, ROOM - IDS.shape[1]), value=0)
    image, text = model.get_image_features(pixel_values=PIXELS), model.get_text_features(input_ids=full)
    return normalize(image.pooler_output), normalize(text.pooler_output)


@pytest.mark.parametrize("started", ["towers", "init_from"])
def test_the_first_embeddings_are_siglips_own_features(source, started):
    scratch = {
        "vision": {"config": {"model_type": "siglip_vision_model", **VISION}},
        "text": {"config": {"model_type": "siglip_text_model", **TEXT, "hidden_size": 16, "projection_size": 32}},
        "init_from": str(source),
    }
    encoder = build_dual_encoder(settings(source, **(scratch if started == "init_from" else {})), sigmoid=True).eval()
    image, text = own_features(source)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_image(PIXELS), image, rtol=0, atol=1e-6)
        torch.testing.assert_close(encoder.encode_text(IDS, MASK), text, rtol=0, atol=1e-6)
        alone = encoder.encode_text(IDS[1:, :3], MASK[1:, :3])
        torch.testing.assert_close(alone, text[1:], rtol=0, atol=1e-6)  # whatever else stands in the batch
    if started == "init_from":
        whole = SiglipModel.from_pretrained(source)
        assert encoder.logit_scale.item() == whole.logit_scale.item()
        assert encoder.logit_bias.item() == whole.logit_bias.item()


def test_a_softmax_run_may_start_from_siglip_without_its_bias(source):
    assert build_dual_encoder(settings(source, init_from=str(source))).logit_bias is None


@pytest.fixture(scope="module")
def trained(source, corpus, tmp_path_factory) -> Path:
    """Two steps of the tiny recipe from the SigLIP folder."""
    out = tmp_path_factory.mktemp("siglip") / "run"
    towers = {"vision": {"source": str(source)}, "text": {"source": str(source), "max_length": ROOM}}
    recipe = TINY | {"model": {"embed_dim": 32, **towers}, "objective": {"loss": "sigmoid"}}
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(recipe))
    data = [f"data.train={corpus}/train-*.tar", f"data.val={corpus}/val-*.tar"]
    train_plan(load_plan(config, [*data, "train.max_steps=2", "log.progress=false"]), out, resume=False)
    return out


def test_a_run_from_siglip_trains_its_towers_and_ends_as_siglip(trained, source, val):
    final = SiglipModel.from_pretrained(trained / "final")
    before = SiglipModel.from_pretrained(source).state_dict()
    changed = {name for name, value in final.state_dict().items() if not torch.equal(value, before[name])}
    towers = {name.split(".")[0] for name in changed}
    assert towers == {"vision_model", "text_model", "logit_scale", "logit_bias"}
    encoder = load_model(str(trained), torch.device("cpu")).encoder
    image, text = own_features(trained / "final")
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_image(PIXELS), image, rtol=0, atol=1e-6)
        torch.testing.assert_close(encoder.encode_text(IDS, MASK), text, rtol=0, atol=1e-6)
    _, result = evaluate_model(EvalRequest(str(trained), [val]))
    assert result.value("rsum") > 0


def test_the_cards_own_code_gives_the_embeddings_of_the_run(trained, tmp_path, monkeypatch):
    out = export_model(str(trained), tmp_path / "out")
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out / "picture.jpg", "JPEG")
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    monkeypatch.chdir(out)
    scope: dict = {}
    exec(code, scope)
    ours = load_model(str(trained), torch.device("cpu"))
    picture = ours.embed_picture((out / "picture.jpg").read_bytes())
    torch.testing.assert_close(scope["out"].image_embeds, picture, rtol=0, atol=1e-6)
    text = torch.cat([ours.embed_text(caption) for caption in scope["captions"]])
    torch.testing.assert_close(scope["out"].text_embeds, text, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", [None, "siglip"])
def test_an_export_as_siglip_embeds_as_its_run_does(trained, tmp_path, layout):
    out = export_model(str(trained), tmp_path / "out", layout)
    assert load_model(str(out)).hash == load_model(str(trained)).hash
    model, processor = AutoModel.from_pretrained(out).eval(), AutoProcessor.from_pretrained(out)
    assert type(model) is SiglipModel
    card = (out / "README.md").read_text()
    assert 'padding="max_length"' in card and "SiglipModel.from_pretrained" in card and "attention_mask" not in card
    ids = processor.tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (2, ROOM)
    ours = load_model(str(trained), torch.device("cpu"))
    with torch.no_grad():
        text = model(input_ids=ids, pixel_values=PIXELS).text_embeds
    torch.testing.assert_close(text, torch.cat([ours.embed_text(c) for c in CAPTIONS]), rtol=0, atol=1e-5)


def test_a_run_with_siglips_text_tower_has_no_other_layout(trained, tmp_path):
    with pytest.raises(ValueError, match=r"cannot hold siglip_text_model.*what works: --as siglip"):
        export_model(str(trained), tmp_path / "out", "dual-encoder")
    assert list(tmp_path.iterdir()) == []


def test_a_learned_projection_over_siglips_vision_tower_is_not_folded(source, tokenizer, tmp_path):
    bert = {"config": {"model_type": "bert", **TEXT}}
    encoder = build_dual_encoder(settings(source, text=bert, embed_dim=16))
    processor = new_image_processor(32, (0.5,) * 3, (0.5,) * 3)
    save_folder(tmp_path / "final", encoder, dict(encoder.state_dict()), tokenizer, processor)
    with pytest.raises(ValueError, match=r"no projections.*siglip_vision_model \+ bert; what works: --as dual-encoder"):
        export_model(str(tmp_path / "final"), tmp_path / "out", "siglip")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"embed_dim": 16}, r"embed_dim=16: .*towers give 32 and 32 numbers; set model.embed_dim=32"),
        ({"vision": {"config": {"model_type": "vit", **VISION}}}, "vit cannot stand beside siglip_text_model"),
    ],
)
def test_siglips_text_tower_stands_beside_its_vision_tower_only(source, changes, said):
    with pytest.raises(ValueError, match=said):
        build_dual_encoder(settings(source, **changes))


def test_captions_are_padded_to_the_full_length_so_no_other_is_taken(source):
    text = build_tower("text", str(source), None, None)
    check_room(text, ROOM)
    with pytest.raises(ValueError, match=f"set model.text.max_length={ROOM}"):
        check_room(text, ROOM - 1)


def test_siglip_towers_are_teachers(source, tmp_path):
    """Of a whole folder, and of a text tower alone."""
    student = build_dual_encoder(settings(source))
    whole = SiglipModel.from_pretrained(source)
    alone = SiglipTextModel(whole.text_model.config)
    alone.load_state_dict(whole.text_model.state_dict())
    alone.config.pad_token_id = 0
    alone.save_pretrained(tmp_path / "text")
    image, text = own_features(source)
    for folder in (source, tmp_path / "text"):
        teachers = build_teachers(
            TeacherConfig(source="hf", image=str(source), text=str(folder)), student, projected=True
        )
        given = teachers.text(input_ids=IDS, attention_mask=MASK)
        torch.testing.assert_close(given, text, rtol=0, atol=1e-6)
        torch.testing.assert_close(teachers.image(pixel_values=PIXELS), image, rtol=0, atol=1e-6)
