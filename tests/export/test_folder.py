"""Exported folders: plain transformers, with vlscale out of reach, runs the card's own code to the same embeddings."""

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from vlscale.cli import main
from vlscale.config import dump, load_plan
from vlscale.evaluate.run import EvalRequest, evaluate_model
from vlscale.export.card import _public
from vlscale.export.embed import EmbedRequest, open_job
from vlscale.export.folder import export_model
from vlscale.export.index_file import read_index
from vlscale.export.loaded import load_model
from vlscale.models.dual_encoder import load_dual_encoder

CARD_CAPTIONS = ["a red disc", "two blue stars"]  # those of the card's code
PLAIN = """
import os, re, sys
sys.modules["vlscale"] = None
import numpy as np
for folder in sys.argv[1:]:
    os.chdir(folder)
    (code,) = re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.S)
    scope = {}
    exec(code, scope)
    np.savez("plain.npz", image=scope["out"].image_embeds.numpy(), text=scope["out"].text_embeds.numpy())
"""


def picture() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((140, 100)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def exported(run, clip_towers, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    made = {
        "run": export_model(str(run), folder / "run"),
        "clip-dual": export_model(str(clip_towers), folder / "clip-dual"),
        "clip": export_model(str(clip_towers), folder / "clip", "clip"),
    }
    for path in made.values():
        (path / "picture.jpg").write_bytes(picture())
    subprocess.run([sys.executable, "-c", PLAIN, *map(str, made.values())], check=True, capture_output=True)
    return made


@pytest.mark.parametrize("name", ["run", "clip-dual", "clip"])
def test_plain_transformers_gives_the_same_embeddings(exported, run, clip_towers, name):
    model = load_model(str(run if name == "run" else clip_towers))
    plain = np.load(exported[name] / "plain.npz")
    text = torch.cat([model.embed_text(caption) for caption in CARD_CAPTIONS])
    np.testing.assert_allclose(plain["text"], text, rtol=0, atol=1e-6)
    np.testing.assert_allclose(plain["image"], model.embed_picture(picture()), rtol=0, atol=1e-6)
    assert np.abs(plain["text"][0] - plain["text"][1]).max() > 1e-3


def test_weights_and_hash_are_those_of_the_run_and_nothing_is_pickled(exported, run):
    ours, theirs = (load_file(path / "model.safetensors") for path in (run / "final", exported["run"]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    hashes = {load_model(str(path)).hash for path in (run, run / "final", exported["run"])}
    assert len(hashes) == 1
    kinds = {path.suffix for path in exported["run"].iterdir()} - {".jpg", ".npz"}
    assert kinds <= {".json", ".safetensors", ".md", ".txt"}
    assert str(run) not in (exported["run"] / "config.json").read_text()


def test_an_export_embeds_a_corpus_as_its_run_does(exported, run, val, tmp_path):
    """Captions longer than the run's max_length are cut alike, though the export has no config that says so."""
    made = {}
    for name, model in (("run", run), ("export", exported["run"])):
        request = EmbedRequest(str(model), [val], tmp_path / f"{name}.npz", "float32", caption_key="json:captions")
        open_job(request).run()
        made[name] = read_index(request.out)
    assert made["run"].header.same_content(made["export"].header)
    assert all(np.array_equal(getattr(made["run"], n), getattr(made["export"], n)) for n in ("image_emb", "text_emb"))


def test_a_clip_export_is_read_back_as_a_dual_encoder(exported, clip_towers):
    assert load_model(str(exported["clip"])).hash == load_model(str(clip_towers)).hash
    assert yaml.safe_load((exported["clip"] / "config.json").read_text())["model_type"] == "clip"
    assert load_dual_encoder(str(exported["clip"])).config.logit_bias == -10.0


def test_the_card_tells_training_data_metrics_and_leaves_the_license(exported, corpus, held_out):
    text = (exported["run"] / "README.md").read_text()
    front = yaml.safe_load(re.match(r"---\n(.*?)---\n", text, re.S).group(1))
    assert front["license"] is None and front["library_name"] == "transformers"
    assert "image-text-retrieval" in front["tags"]
    assert "# tiny-run" in text and "| steps | 2 |" in text and f"Protocol `synthetic`: {held_out} pictures" in text
    assert re.search(r"\| i2t/r@1 \| \d+\.\d \| \d+\.\d to \d+\.\d \|", text)
    assert "- training: `train-*.tar`" in text and str(corpus) not in text
    bare = (exported["clip"] / "README.md").read_text()
    assert "No evaluation was recorded" in bare and "without a training config" in bare


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:pass@host.org/a/{00..07}.tar?X-Signature=secret#x", "https://host.org/a/{00..07}.tar"),
        ("/home/me/data/train-*.tar", "train-*.tar"),
        ("s3://bucket/train.tar", "s3://bucket/train.tar"),
    ],
)
def test_urls_on_the_card_hold_no_secrets(url, shown):
    assert _public(url) == shown


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (
            "clip",
            r"needs the towers clip_vision_model \+ clip_text_model, this model has vit \+ bert; --as dual-encoder",
        ),
        ("siglip", r"SiglipModel has no projections, .* vit \+ bert; what works: --as dual-encoder"),
        ("onnx", "--as onnx: expected dual-encoder, clip, siglip"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_and_leave_nothing(run, tmp_path, layout, said):
    with pytest.raises(ValueError, match=said) as error:
        export_model(str(run), tmp_path / "out", layout)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run), str(tmp_path)])
    assert ended.value.code == 2 and "holds something" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_run_without_a_model_is_refused(tiny_config, tmp_path):
    (tmp_path / "config.yaml").write_text(dump(load_plan(tiny_config)[0].config))
    with pytest.raises(ValueError, match="has no final/ folder"):
        export_model(str(tmp_path), tmp_path / "out")


def test_evaluation_of_an_export_equals_that_of_the_run(exported, run, val):
    _, of_run = evaluate_model(EvalRequest(str(run), [val]))
    _, of_export = evaluate_model(EvalRequest(str(exported["run"]), [val], caption_key="json:captions"))
    assert of_run.metrics == of_export.metrics
