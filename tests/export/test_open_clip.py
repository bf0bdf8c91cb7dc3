"""open_clip's ViT checkpoints as CLIPModel: the mapping against a plain forward under open_clip's names, and against
the package itself where it is installed."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPModel
from typer.testing import CliRunner

from vlscale.cli import app, main
from vlscale.data.images import ImageSpec, decode_eval
from vlscale.export.loaded import load_model
from vlscale.export.open_clip import clip_model, image_processor, import_open_clip
from vlscale.models.dual_encoder import build_dual_encoder
from vlscale.sections import ModelConfig

WIDTH, HEADS, LAYERS, DIM, ROOM = 32, 2, 2, 24, 12
MERGES = ["r e", "re d</w>", "a t"]
VOCABULARY = 512 + len(MERGES) + 2
CONFIG = {
    "embed_dim": DIM,
    "vision_cfg": {"image_size": 32, "layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": 8},
    "text_cfg": {"context_length": ROOM, "vocab_size": VOCABULARY, "width": WIDTH, "heads": HEADS, "layers": LAYERS},
}
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
END = VOCABULARY - 1
IDS = torch.tensor([[END - 1, 5, 6, 7, END, 0], [END - 1, 9, END, 0, 0, 0], [END - 1, 300, 4, END, 0, 0]])


def weights(prefix: str = "") -> dict[str, torch.Tensor]:
    """Random, under open_clip's names; `prefix` is `text.` in its CustomTextCLIP."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    def block(name: str) -> dict[str, torch.Tensor]:
        linear = {"attn.in_proj_": (3 * WIDTH, WIDTH), "attn.out_proj.": (WIDTH, WIDTH)}
        linear |= {"mlp.c_fc.": (4 * WIDTH, WIDTH), "mlp.c_proj.": (WIDTH, 4 * WIDTH)}
        made = {f"{name}{layer}{kind}": draw(WIDTH) for layer in ("ln_1.", "ln_2.") for kind in ("weight", "bias")}
        for layer, shape in linear.items():
            made |= {f"{name}{layer}weight": draw(*shape), f"{name}{layer}bias": draw(shape[0])}
        return made

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + draw(WIDTH), f"{name}.bias": draw(WIDTH)}

    made = {
        "visual.class_embedding": draw(WIDTH),
        "visual.positional_embedding": draw(17, WIDTH),
        "visual.proj": draw(WIDTH, DIM),
        "visual.conv1.weight": draw(WIDTH, 3, 8, 8),
        f"{prefix}positional_embedding": draw(ROOM, WIDTH),
        f"{prefix}text_projection": draw(WIDTH, DIM),
        f"{prefix}token_embedding.weight": draw(VOCABULARY, WIDTH),
        "logit_scale": torch.tensor(3.0),
    }
    for name in ("visual.ln_pre", "visual.ln_post", f"{prefix}ln_final"):
        made |= norm(name)
    for number in range(LAYERS):
        for tower in ("visual.", prefix):
            made |= block(f"{tower}transformer.resblocks.{number}.")
    return made


def plain_logits(w: dict[str, torch.Tensor], quick: bool, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """logits_per_image (B, B) of open_clip's own model, written out; `w` without a prefix."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"])

    def tower(x: torch.Tensor, name: str, causal: bool) -> torch.Tensor:
        length = x.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1) if causal else torch.zeros(length, length)
        for number in range(LAYERS):
            block = f"{name}transformer.resblocks.{number}."
            h = norm(x, f"{block}ln_1").transpose(0, 1)
            inside = [w[f"{block}attn.in_proj_{kind}"] for kind in ("weight", "bias")]
            outside = [w[f"{block}attn.out_proj.{kind}"] for kind in ("weight", "bias")]
            attended, _ = F.multi_head_attention_forward(
                h, h, h, WIDTH, HEADS, *inside, None, None, False, 0.0, *outside, training=False, attn_mask=mask
            )
            x = x + attended.transpose(0, 1)
            h = F.linear(norm(x, f"{block}ln_2"), w[f"{block}mlp.c_fc.weight"], w[f"{block}mlp.c_fc.bias"])
            h = h * torch.sigmoid(1.702 * h) if quick else F.gelu(h)
            x = x + F.linear(h, w[f"{block}mlp.c_proj.weight"], w[f"{block}mlp.c_proj.bias"])
        return x

    patches = F.conv2d(pixels, w["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    first = w["visual.class_embedding"].expand(len(pixels), 1, WIDTH)
    x = torch.cat([first, patches], 1) + w["visual.positional_embedding"]
    image = norm(tower(norm(x, "visual.ln_pre"), "visual.", False)[:, 0], "visual.ln_post") @ w["visual.proj"]
    x = w["token_embedding.weight"][ids] + w["positional_embedding"][: ids.shape[1]]
    text = norm(tower(x, "", True), "ln_final")[torch.arange(len(ids)), ids.argmax(1)] @ w["text_projection"]
    return w["logit_scale"].exp() * F.normalize(image) @ F.normalize(text).T


@pytest.fixture
def source(tmp_path) -> Path:
    """A checkpoint, its config and a merges file of three merges."""
    save_file({name: value.contiguous() for name, value in weights().items()}, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with gzip.open(tmp_path / "merges.txt.gz", "wt") as file:
        file.write("\n".join(["#version: 0.2", *MERGES]))
    return tmp_path


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("prefix", ["", "text."])
def test_logits_are_those_of_open_clips_own_forward(quick, prefix):
    model = clip_model(weights(prefix), CONFIG | {"quick_gelu": quick}, "hand-made")
    with torch.no_grad():
        got = model(input_ids=IDS, attention_mask=(IDS > 0).long(), pixel_values=PIXELS).logits_per_image
        torch.testing.assert_close(got, plain_logits(weights(), quick, PIXELS, IDS), rtol=0, atol=1e-5)


def test_the_command_makes_a_folder_that_searches_and_starts_a_run(source):
    paths = [str(source / name) for name in ("weights.safetensors", "config.json", "out")]
    done = CliRunner().invoke(app, ["import", "open-clip", *paths, "--tokenizer", str(source / "merges.txt.gz")])
    assert done.exit_code == 0 and f"imported: {source / 'out'}" in done.output
    clip, tokenizer = CLIPModel.from_pretrained(source / "out").eval(), AutoTokenizer.from_pretrained(source / "out")
    assert tokenizer("Red").input_ids == [END - 1, tokenizer.get_vocab()["red</w>"], END]
    assert tokenizer.model_max_length == ROOM
    model = load_model(str(source / "out"), torch.device("cpu"))
    with torch.no_grad():
        own = clip.get_text_features(**tokenizer("a red rat", return_tensors="pt")).pooler_output
    torch.testing.assert_close(model.embed_text("a red rat"), F.normalize(own), rtol=0, atol=1e-6)
    towers = {name: {"source": str(source / "out")} for name in ("vision", "text")}
    started = build_dual_encoder(ModelConfig(embed_dim=DIM, init_from=str(source / "out"), **towers)).eval()
    with torch.no_grad():
        assert torch.equal(started.encode_image(PIXELS), model.encoder.encode_image(PIXELS))
    assert started.logit_scale.item() == 3.0


def test_a_bias_is_kept_and_half_precision_becomes_float32(source):
    halves = {name: value.half().contiguous() for name, value in (weights() | {"logit_bias": torch.ones(1)}).items()}
    save_file(halves, source / "half.safetensors")
    out = import_open_clip(
        source / "half.safetensors", source / "config.json", source / "o", str(source / "merges.txt.gz")
    )
    model = CLIPModel.from_pretrained(out)
    assert model.config.logit_bias == 1.0 and {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_pictures_are_prepared_as_open_clips_transform_does():
    """Shorter side and centre by default, a squeeze where the config says `squash`."""
    spec = ImageSpec.from_processor(image_processor({"mean": [0.1] * 3, "interpolation": "bilinear"}, 32))
    assert (spec.size, spec.crop, spec.resize_to, spec.resample, spec.mean) == (32, True, 32, 2, (0.1,) * 3)
    spec = ImageSpec.from_processor(image_processor({"resize_mode": "squash"}, 32))
    assert (spec.size, spec.crop, spec.resample) == (32, False, 3) and spec.std[0] == pytest.approx(0.26862954)
    with pytest.raises(ValueError, match="got longest and bicubic"):
        image_processor({"resize_mode": "longest"}, 32)


def wrapped(part: str, **changes) -> dict:
    return {"model_cfg": CONFIG | {part: CONFIG[part] | changes}, "preprocess_cfg": {}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (wrapped("vision_cfg", timm_model_name="vit"), "cannot hold vision_cfg.timm_model_name='vit'; only"),
        (wrapped("vision_cfg", layers=[3, 4, 6, 3]), r"cannot hold vision_cfg.layers=\[3, 4, 6, 3\]"),
        (wrapped("text_cfg", hf_model_name="roberta"), "cannot hold text_cfg.hf_model_name='roberta'"),
        (wrapped("text_cfg", no_causal_mask=True), "cannot hold text_cfg.no_causal_mask=True"),
        (CONFIG | {"multimodal_cfg": {}}, "cannot hold multimodal_cfg={}"),
        ({"vision_cfg": {}}, "is no open_clip model config: .* got KeyError"),
        (wrapped("vision_cfg", layers=1), r"does not fit its config: 16 weights differ, first vision_model.encoder"),
        (wrapped("vision_cfg", patch_size=4), r"expected shape \(32, 3, 4, 4\), got shape \(32, 3, 8, 8\)"),
        (wrapped("text_cfg", vocab_size=40), r"1 weights differ, first text_model.embeddings.token_embedding.weight"),
    ],
)
def test_what_clip_cannot_hold_is_named_and_nothing_is_left(source, config, said):
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said) as error:
        import_open_clip(
            source / "weights.safetensors", source / "config.json", source / "out", str(source / "merges.txt.gz")
        )
    assert "\n" not in str(error.value) and not (source / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "weights.safetensors",
            b"\x80\x02}q\x00.",
            "expected a safetensors file, got .*pickled checkpoints are not read",
        ),
        ("weights.safetensors", None, "expected a safetensors file, got .*pickled checkpoints are not read"),
        ("config.json", None, "cannot be read: No such file"),
        ("merges.txt.gz", b"text", "expected a Hugging Face folder or open_clip's bpe_simple_vocab"),
    ],
)
def test_files_that_cannot_be_read(source, capsys, name, content, said):
    (source / name).unlink() if content is None else (source / name).write_bytes(content)
    paths = [str(source / each) for each in ("weights.safetensors", "config.json", "out")]
    with pytest.raises(SystemExit) as ended:
        main(["import", "open-clip", *paths, "--tokenizer", str(source / "merges.txt.gz")])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    with pytest.raises(ValueError, match=said):
        raise ValueError(line)


def test_without_open_clip_its_tokenizer_has_to_be_given(source, monkeypatch):
    monkeypatch.setattr("vlscale.export.open_clip_tokens.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="open_clip is not installed, so its tokenizer has to be given: --tokenizer"):
        import_open_clip(source / "weights.safetensors", source / "config.json", source / "out")


def test_a_tokenizer_of_another_size_is_refused(source, tokenizer):
    tokenizer.save_pretrained(source / "other")
    with pytest.raises(ValueError, match=rf"vocab_size is {VOCABULARY}, the tokenizer has {len(tokenizer)} entries"):
        import_open_clip(source / "weights.safetensors", source / "config.json", source / "out", str(source / "other"))


@pytest.fixture(scope="module")
def package():
    """open_clip, where it is installed with a torchvision that this torch can load."""
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"open_clip_torch cannot be imported: {error}")
    return open_clip


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("custom", [False, True])
def test_the_package_gives_the_same_logits_tokens_and_pixels(package, tmp_path, quick, custom):
    torch.manual_seed(0)
    text_cfg = CONFIG["text_cfg"] | {"vocab_size": 49408, "context_length": 77}
    config = CONFIG | {"text_cfg": text_cfg, "quick_gelu": quick}
    made = package.model.CustomTextCLIP if custom else package.model.CLIP
    theirs = made(**config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # larger than at their start, so that every part of it tells
            parameter.add_(0.1 * torch.randn_like(parameter))
        theirs.logit_scale.fill_(2.0)
    state = {name: value.contiguous() for name, value in theirs.state_dict().items() if "attn_mask" not in name}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    out = import_open_clip(tmp_path / "open_clip_model.safetensors", tmp_path / "config.json", tmp_path / "out")
    captions = ["a red disc", "Two Blue stars, isn't it? 1234", "a café photo"]
    ids = package.tokenizer.SimpleTokenizer()(captions)
    own = AutoTokenizer.from_pretrained(out)
    assert [own(c).input_ids for c in captions] == [[i for i in row.tolist() if i] for row in ids]
    with torch.no_grad():
        image, text, scale = theirs(PIXELS, ids)[:3]
        encoded = own(captions, padding=True, return_tensors="pt")
        got = CLIPModel.from_pretrained(out).eval()(**encoded, pixel_values=PIXELS).logits_per_image
    torch.testing.assert_close(got, scale * image @ text.T, rtol=0, atol=1e-5)
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    theirs_pixels = package.image_transform(32, is_train=False)(Image.open(tmp_path / "a.png"))
    spec = ImageSpec.from_processor(image_processor({}, 32))
    ours = torch.from_numpy(decode_eval((tmp_path / "a.png").read_bytes(), spec)).permute(2, 0, 1) / 255
    restored = theirs_pixels * torch.tensor(spec.std)[:, None, None] + torch.tensor(spec.mean)[:, None, None]
    torch.testing.assert_close(ours, restored, rtol=0, atol=1e-5)
