"""Towers and a fusion encoder that wait, with rates by depth, over two ranks: broken off twice and resumed, the run is
the unbroken one bit for bit, and one process's to rounding. All processes of the file are forked from one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.forked_ranks import Group, run_groups, said
from vlscale.train.metrics_file import read_metrics

WAITS = {"vision": 2, "fusion": 3, "text": 4}  # steps; the run has six, and the last one's rate is 0
PREFIXES = {"vision": "vision_model.", "fusion": "fusion.", "text": "text_model."}
STAGES = (2, 3)
STOP = """
import pathlib
run = pathlib.Path({out!r})
run.mkdir(exist_ok=True)
(run / "stop").touch()
"""


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unlocking")
    bert = "model_type: bert, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64"
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"base: {tiny_config}\n"
        f"model: {{fusion: {{source: text}}, text: {{config: {{{bert}, initializer_range: 0.3}}}}}}\n"
        f"optim: {{layer_decay: 0.7, unlock_after: {WAITS}}}\n"
        "train: {max_steps: 6, checkpoint_every: 1, keep_checkpoints: 9}\n"
        "log: {progress: false}\n"
    )
    groups, names = [], []

    def add(name: str, ranks: int, *words: str, stop: bool = False) -> None:
        out = str(folder / name)
        before = STOP.format(out=out) if stop else ""
        groups.append(Group([str(recipe), "--out", out, *words], ranks, before))
        names.append((name, [75 if stop else 0] * ranks))

    add("alone", 1)
    for stage in STAGES:
        key = f"engine.zero_stage={stage}"
        add(f"unbroken-{stage}", 2, key)
        add(f"broken-{stage}", 2, key, stop=True)
        add(f"broken-{stage}", 2, key, "--resume", stop=True)
        add(f"broken-{stage}", 2, key, "--resume")
    codes = run_groups(folder, groups)
    for number, (name, expected) in enumerate(names):
        assert codes[number] == expected, (name, said(folder, number)[-3000:])
    return folder


def test_what_waits_stays_as_it_is_and_then_learns(runs):
    """By the weights in the checkpoints of each step."""
    for name, until in WAITS.items():
        first, last, after = (_inside(runs / "unbroken-2", step, PREFIXES[name]) for step in (1, until, until + 1))
        assert first and all(torch.equal(first[key], last[key]) for key in first)
        assert sum(not torch.equal(last[key], after[key]) for key in first) > len(first) / 2


def _inside(run: Path, step: int, prefix: str) -> dict[str, torch.Tensor]:
    (file,) = (run / "checkpoints" / f"step-{step}").rglob("*model_states.pt")
    whole = torch.load(file, weights_only=False)["module"]
    return {name: value for name, value in whole.items() if name.startswith(prefix)}


def weights(run: Path) -> dict[str, torch.Tensor]:
    fused = load_file(run / "final" / "fusion" / "model.safetensors")
    return load_file(run / "final" / "model.safetensors") | {f"fusion.{name}": value for name, value in fused.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_twice_is_unbroken(runs, stage):
    broken, whole = (runs / f"{name}-{stage}" for name in ("broken", "unbroken"))
    kept = [[(line["step"], line["loss"], line["keys"]) for line in _lines(run)] for run in (broken, whole)]
    assert kept[0] == kept[1] and [step for step, *_ in kept[0]] == [1, 2, 3, 4, 5, 6]
    for name, value in weights(whole).items():
        assert torch.equal(weights(broken)[name], value), name


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_wait_as_one_process_does(runs, stage):
    two, one = (_lines(runs / name) for name in (f"unbroken-{stage}", "alone"))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert [line["grad_norm"] for line in two] == pytest.approx([line["grad_norm"] for line in one], rel=1e-4)


def _lines(run: Path) -> list[dict]:
    return read_metrics(run / "metrics.jsonl")
