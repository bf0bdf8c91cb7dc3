"""The dual encoder and its folders: plain transformers gives the same embeddings; starting points, locks, scales."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, VisionTextDualEncoderModel, ViTConfig, ViTModel

from vlscale.data.tokens import train_tokenizer
from vlscale.models import hf_folder
from vlscale.models.dual_encoder import build_dual_encoder, load_dual_encoder
from vlscale.models.hf_folder import load_encoder, new_image_processor, save_folder
from vlscale.models.teachers import build_teachers
from vlscale.sections import ModelConfig, TeacherConfig

TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
MODEL = {
    "embed_dim": 16,
    "dropout": 0.0,
    "vision": {"config": {"model_type": "vit", "image_size": 32, "patch_size": 8, **TOWER}},
    "text": {"config": {"model_type": "bert", "vocab_size": 40, "max_position_embeddings": 32, **TOWER}},
}
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0], [2, 9, 8, 3]])
MASK = (IDS > 0).long()


def model_config(**changes) -> ModelConfig:
    return ModelConfig.model_validate(MODEL | changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    encoder = build_dual_encoder(model_config(), sigmoid=True)
    with torch.no_grad():
        encoder.logit_bias.fill_(-3.5)
        encoder.logit_scale.fill_(9.0)  # above the bound
    tokenizer = train_tokenizer(["a red disc", "two blue stars"], vocab_size=40, max_length=16)
    folder = tmp_path_factory.mktemp("saved") / "final"
    save_folder(folder, encoder, dict(encoder.state_dict()), tokenizer, new_image_processor(32, (0.5,) * 3, (0.5,) * 3))
    return encoder.eval(), folder


def test_plain_transformers_gives_the_same_embeddings(saved):
    encoder, folder = saved
    model = VisionTextDualEncoderModel.from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=MASK, pixel_values=PIXELS)
        torch.testing.assert_close(out.image_embeds, encoder.encode_image(PIXELS), rtol=0, atol=1e-6)
        torch.testing.assert_close(out.text_embeds, encoder.encode_text(IDS, MASK), rtol=0, atol=1e-6)
        torch.testing.assert_close(model.logit_scale.exp(), torch.tensor(100.0))
    assert model.config.logit_bias == -3.5
    assert AutoTokenizer.from_pretrained(folder)("a red disc")["input_ids"]


def test_a_saved_folder_loads_back(saved):
    encoder, folder = saved
    again, _, processor = load_encoder(str(folder))
    with torch.no_grad():
        assert torch.equal(again.encode_image(PIXELS), encoder.encode_image(PIXELS))
    assert again.logit_bias.item() == -3.5 and processor.size["height"] == 32
    assert [p.name for p in folder.parent.iterdir()] == ["final"], "something half-written is left"


def test_init_from_copies_weights_and_refuses_other_shapes(saved):
    encoder, folder = saved
    started = build_dual_encoder(model_config(init_from=str(folder))).eval()
    with torch.no_grad():
        assert torch.equal(started.encode_text(IDS, MASK), encoder.encode_text(IDS, MASK))
    with pytest.raises(
        ValueError, match=r"weight visual_projection.weight has shape \(16, 32\), expected shape \(8, 32\)"
    ):
        build_dual_encoder(model_config(init_from=str(folder), embed_dim=8))


def test_weights_that_would_be_random_are_refused(saved, tmp_path):
    """transformers draws what a folder lacks, and only warns."""
    ViTModel(ViTConfig(image_size=32, patch_size=8, **TOWER)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"vit is not a dual encoder .*it is a vit, expected a model of pictures and"):
        load_dual_encoder(str(tmp_path / "vit"))
    shutil.copytree(saved[1], tmp_path / "lacking")
    weights = load_file(tmp_path / "lacking/model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "lacking/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack text_projection\.weight"):
        load_dual_encoder(str(tmp_path / "lacking"))


def test_a_name_that_is_neither_folder_nor_model_is_not_said_to_lack_a_tokenizer(monkeypatch, tmp_path):
    def offline(source: str):
        raise OSError("we could not connect")

    monkeypatch.setattr(hf_folder.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(ValueError, match="my-clp is no folder, and no model of that name was found: we could not"):
        hf_folder.load_tokenizer("my-clp")
    with pytest.raises(ValueError, match=r"holds no tokenizer: OSError; give model\.text\.tokenizer"):
        hf_folder.load_tokenizer(str(tmp_path))


def test_init_from_an_unfinished_run_says_so(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ValueError, match="has no final/ folder: it has not finished"):
        build_dual_encoder(model_config(init_from=str(tmp_path)))


def test_a_locked_tower_neither_learns_nor_drops():
    encoder = build_dual_encoder(model_config(locked=["vision"], dropout=0.5)).train()
    assert not any(p.requires_grad for p in encoder.vision_model.parameters())
    assert encoder.visual_projection.weight.requires_grad and not encoder.vision_model.training
    assert torch.equal(encoder.encode_image(PIXELS), encoder.encode_image(PIXELS))
    assert not torch.equal(encoder.encode_text(IDS, MASK), encoder.encode_text(IDS, MASK))


@pytest.mark.parametrize(
    ("start", "grad", "expected"),
    [(math.log(50), 1.0, 50.0), (5.0, 1.0, 100.0), (5.0, -1.0, 0.0), (math.log(50), -1.0, -50.0)],
)
def test_the_scale_is_bounded_and_descent_can_bring_it_back(start, grad, expected):
    """Above the bound the multiplier is 100; a gradient that lowers it passes, one that raises it is dropped."""
    encoder = build_dual_encoder(model_config())
    with torch.no_grad():
        encoder.logit_scale.fill_(start)
    scale = encoder(PIXELS, IDS, MASK).logit_scale
    assert scale.shape == () and scale.item() == pytest.approx(min(math.exp(start), 100), rel=1e-5)
    scale.backward(torch.tensor(grad))
    assert encoder.logit_scale.grad.item() == pytest.approx(expected, rel=1e-5)


def test_embeddings_have_length_one_and_bf16_towers_give_bf16():
    encoder = build_dual_encoder(model_config()).bfloat16()
    rows = encoder(PIXELS, IDS, MASK)
    assert rows.image.dtype == rows.text.dtype == torch.bfloat16 and rows.logit_scale.dtype == torch.float32
    torch.testing.assert_close(rows.image.float().norm(dim=1), torch.ones(3), atol=5e-3, rtol=0)


def test_a_frozen_copy_stays_while_the_student_learns():
    student = build_dual_encoder(model_config())
    teachers = build_teachers(TeacherConfig(source="frozen_copy"), student, projected=True)
    before = teachers.image(pixel_values=PIXELS)
    assert torch.equal(before, student.encode_image(PIXELS).detach()) and not before.requires_grad
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1)
    assert torch.equal(teachers.image(pixel_values=PIXELS), before)


def test_a_frozen_copy_leaves_out_projections_that_are_still_random():
    student = build_dual_encoder(model_config())
    teachers = build_teachers(TeacherConfig(source="frozen_copy"), student, projected=False)
    assert teachers.image(pixel_values=PIXELS).shape == (3, 32) and student.encode_image(PIXELS).shape == (3, 16)


def test_teachers_come_from_dual_encoders_and_from_single_models(saved, tmp_path):
    encoder, folder = saved
    build_dual_encoder(model_config()).vision_model.save_pretrained(tmp_path / "vit")
    teachers = build_teachers(
        TeacherConfig(source="hf", image=str(tmp_path / "vit"), text=str(folder)), encoder, projected=True
    )
    assert teachers.image(pixel_values=PIXELS).shape == (3, 32)
    with torch.no_grad():
        assert torch.equal(teachers.text(input_ids=IDS, attention_mask=MASK), encoder.encode_text(IDS, MASK))
    with pytest.raises(ValueError, match="does not exist"):
        build_teachers(TeacherConfig(source="hf", image="./nowhere", text=str(folder)), encoder, projected=True)


def test_a_model_that_is_loaded_and_saved_again_is_the_same_folder(saved, tmp_path):
    """Byte for byte: nothing of how it was loaded goes into it."""
    _, folder = saved
    encoder, tokenizer, processor = load_encoder(str(folder))
    save_folder(tmp_path / "again", encoder, dict(encoder.state_dict()), tokenizer, processor)
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
