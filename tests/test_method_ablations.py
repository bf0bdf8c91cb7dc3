"""Studies without tuning: what they run, a run measured at theta' too, results kept by the study's name; and the trial
of patches."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlscale.config import load_plan, validate
from vlscale.models.dual_encoder import build_dual_encoder, load_dual_encoder
from vlscale.resources import benchmarks_folder
from vlscale.train.plan import train_plan

METHOD = benchmarks_folder() / "method"


@pytest.fixture(scope="module")
def found():
    """Looks up a module of the study, as its script finds them."""
    sys.path[:0] = [str(METHOD), str(METHOD.parent)]
    yield __import__
    del sys.path[:2]


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(METHOD / "__main__.py"))


@pytest.mark.parametrize("name", ["ablations", "fused", "trained-ablations", "pretrained-weights", "pretrained-parts"])
def test_every_run_of_a_study_without_tuning_is_a_valid_config_of_one_trial(script, name):
    study = script["read_study"](METHOD / f"{name}.yaml")
    of_scenes = {"pretrained-weights": ["image-weak", "text-noisy"], "pretrained-parts": ["image-weak"]}
    levels = of_scenes.get(name, ["emoji"])
    assert study["name"] == name and list(study["levels"]) == levels and len(study["seeds"]) == 5
    moved = {f"{name}'" for name, own in study["methods"].items() if own.get("theta_prime")}
    assert {name for pair in study["comparisons"] for name in pair} <= {"teachers", *study["methods"]} | moved
    chosen = script["untuned"](study)[levels[0]]
    assert chosen.keys() == study["methods"].keys()
    model = {"fusion": {"source": "text"}} if name == "fused" else {}
    for method, own in chosen.items():
        config = validate(own | {"model": model, "teacher": {"source": "frozen_copy"}}, method)
        assert f"{method}'" not in moved or config.meta_mode == "heads"
    assert len({json.dumps(own, sort_keys=True) for own in chosen.values()}) == len(chosen)
    assert script["untuned"](script["read_study"](METHOD / "study.yaml")) is None


def test_a_run_at_theta_prime_has_its_projections_moved_and_nothing_else(found, tiny_config, tmp_path):
    given = ["objective.name=covlr", "teacher.source=frozen_copy", "meta.mode=heads", "meta.inner_lr=0.05",
             "train.max_steps=2", "log.progress=false"]  # fmt: skip
    train_plan(load_plan(tiny_config, given), tmp_path / "run", resume=False)
    found("theta_prime").save_at_theta_prime(tmp_path / "run", tmp_path / "moved")
    folders = (tmp_path / "run" / "final", tmp_path / "moved")
    at, moved = (load_dual_encoder(str(folder)).state_dict() for folder in folders)
    names = ["visual_projection.weight", "text_projection.weight"]
    assert all(torch.equal(value, moved[name]) for name, value in at.items() if name not in names)
    before = torch.cat([at[name].flatten() for name in names])
    shift = torch.cat([(moved[name] - at[name]).flatten() for name in names])
    assert float(shift.norm() / before.norm()) == pytest.approx(0.05, rel=1e-4)


def test_results_are_kept_by_the_studys_name(found, tmp_path, monkeypatch):
    analyse = found("analyse")
    monkeypatch.setattr(analyse, "RESULTS", tmp_path / "results")
    for folder in ("results", "cells"):
        (tmp_path / folder).mkdir()
    for seed in range(3):
        plain = dict.fromkeys(analyse.NAMES, 10.0 * (seed + 1))
        measured = {"measured": dict.fromkeys(("teachers", "contrastive", "joint", "joint'"), plain)}
        (tmp_path / "cells" / f"clean-seed-{seed}.json").write_text(json.dumps(measured))
    study = {
        "levels": {"clean": {}}, "seeds": [0, 1, 2], "methods": {"contrastive": {"is": {}}, "joint": {"is": {}}},
        "comparisons": [["joint'", "joint"]], "name": "ablations", "command": "vlscale bench method --study x",
    }  # fmt: skip
    analyse.write_study(study, tmp_path / "cells", {"clean": {"joint": {"a": 1}}}, tmp_path, keep=True)
    kept = sorted(path.name.split("-method-")[1] for path in Path(tmp_path / "results").iterdir())
    assert kept == [f"ablations{end}" for end in ("-cells.json", "-differences.csv", ".csv", ".md", ".png")]
    page = (tmp_path / "study.md").read_text()
    assert "# Method ablations" in page and "`vlscale bench method --study x`" in page and "| joint' | 20.0 |" in page
    assert "## Settings, not tuned" in page and '| clean | joint | `{"a": 1}` |' in page


def test_patches_are_hidden_and_asked_for_in_the_tower_s_order(found, tiny_config):
    """A tower that hands its patches through, but for the mask: what is wrong is what was hidden."""
    patches, config = found("patches"), load_plan(tiny_config)[0].config
    encoder = build_dual_encoder(config.model)
    vision, side = encoder.vision_model, encoder.vision_model.config.patch_size
    embeddings, own = vision.embeddings, 3 * side**2
    embeddings.patch_embeddings.projection = torch.nn.Conv2d(3, own, side, stride=side, bias=False)
    with torch.no_grad():
        embeddings.patch_embeddings.projection.weight.copy_(torch.eye(own).view(own, 3, side, side))
    embeddings.mask_token = torch.nn.Parameter(torch.full((1, 1, own), 7.0))
    seen = {}

    def tower(pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor) -> SimpleNamespace:
        rows = embeddings.patch_embeddings(pixel_values)
        hidden = bool_masked_pos[..., None]
        seen["share"] = hidden.float().mean()
        rows = torch.where(hidden, embeddings.mask_token, rows)
        return SimpleNamespace(last_hidden_state=torch.cat([rows[:, :1], rows], 1))

    tower.config = vision.config
    size = vision.config.image_size
    pixels = torch.rand(64, 3, size, size)
    loss = float(patches.reconstruction(tower, lambda tokens, words, mask: tokens, pixels, None, None).detach())
    assert 0.4 < seen["share"] < 0.6
    assert loss == pytest.approx(float(((7 - pixels) ** 2).mean()), rel=0.01)
    passing = lambda tokens, words, mask: embeddings.patch_embeddings(pixels)  # noqa: E731
    assert patches.reconstruction(tower, passing, pixels, None, None) == 0
