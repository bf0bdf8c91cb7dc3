"""Losses and gradients that are not finite: nothing of them reaches a weight or a moment, whatever the policy.

The pictures of one global batch are made NaN on their way to the model. A checkpoint after every step, in the form that
names every parameter and moment, tells whether a step changed anything.
"""

import json
from pathlib import Path

import pytest
import torch

from vlscale.cli import main
from vlscale.config import load_plan
from vlscale.train import step as step_module
from vlscale.train.inputs import Inputs
from vlscale.train.metrics_file import read_metrics
from vlscale.train.plan import train_plan

PAIRS = 32
COMMON = [
    "log.progress=false",
    "teacher.source=frozen_copy",
    "objective={name: covlr, relation_weight: 0.5}",
    "train={max_steps: 3, checkpoint_every: 1, keep_checkpoints: 9, elastic: true, global_batch_size: 32}",
]
WAYS = {f"joint-{stage}": ["meta.mode=joint", f"engine.zero_stage={stage}"] for stage in range(4)} | {
    mode: [f"meta.mode={mode}", "meta.inner_lr=0.02", "engine.zero_stage=2"]
    for mode in ("heads", "first_order", "finite_difference")
}
WAYS["bf16"] = ["meta.mode=joint", "engine={zero_stage: 2, dtype: bf16}"]


def train(config: Path, out: Path, *overrides: str, resume: bool = False) -> list[dict]:
    train_plan(load_plan(config, [*COMMON, *overrides]), out, resume=resume)
    return read_metrics(out / "metrics.jsonl")


@pytest.fixture
def spoil(monkeypatch):
    """`spoil(2, 3)`: the pictures of these steps' batches are NaN."""

    def of(*steps: int) -> None:
        real = Inputs.student

        def student(self, batch):
            inputs = real(self, batch)
            if batch.state.samples // PAIRS in steps:
                inputs["pixels"] = inputs["pixels"] * float("nan")
            return inputs

        monkeypatch.setattr(Inputs, "student", student)

    return of


def state(run: Path, step: int) -> tuple[bytes, ...]:
    """Weights, moments and step counts."""
    folder = run / "checkpoints" / f"step-{step}" / "full"
    return tuple((folder / name).read_bytes() for name in ("part-0.safetensors", "steps.json"))


@pytest.mark.parametrize("way", WAYS)
def test_a_skipped_step_changes_no_bit(tiny_config, tmp_path, spoil, way):
    spoil(2)
    lines = train(tiny_config, tmp_path / "run", "train.bad_numbers=skip", *WAYS[way])
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1] and lines[1]["loss"] == "nan"
    assert state(tmp_path / "run", 2) == state(tmp_path / "run", 1) != state(tmp_path / "run", 3)
    assert isinstance(lines[2]["loss"], float)
    told = json.loads((tmp_path / "run" / "bad-2.json").read_text())
    assert told["step"] == 2 and len(set(told["keys"])) == PAIRS and told["values"]["loss"] == "nan"


class _NanBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_finite_loss_with_a_bad_gradient_is_seen_too(tiny_config, tmp_path, monkeypatch, stage):
    real, calls = step_module.total_loss, []

    def total_loss(*arguments):
        calls.append(1)
        loss, parts = real(*arguments)
        return (_NanBackward.apply(loss) if len(calls) == 2 else loss), parts

    monkeypatch.setattr(step_module, "total_loss", total_loss)
    lines = train(tiny_config, tmp_path / "run", "train.bad_numbers=skip", f"engine.zero_stage={stage}")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1] and isinstance(lines[1]["loss"], float)
    assert state(tmp_path / "run", 2) == state(tmp_path / "run", 1) != state(tmp_path / "run", 3)


def test_stop_ends_with_one_line_and_saves_nothing(caplog, tiny_config, tmp_path, spoil):
    spoil(2)
    with pytest.raises(SystemExit) as ended:
        train(tiny_config, tmp_path / "run")
    assert ended.value.code == 1 and (tmp_path / "run" / "bad-2.json").is_file()
    (said,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert said.startswith("step 2: loss nan") and "set train.bad_numbers=skip or rollback" in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]


def test_too_many_in_a_row_stop_the_run(caplog, tiny_config, tmp_path, spoil):
    spoil(2, 3)
    with pytest.raises(SystemExit) as ended:
        train(tiny_config, tmp_path / "run", "train.bad_numbers=skip", "train.max_bad_steps=2")
    assert ended.value.code == 1 and "2 such steps in a row (train.max_bad_steps)" in caplog.text


def test_rollback_goes_back_to_the_checkpoint_and_past_the_batch(caplog, tiny_config, tmp_path, spoil):
    keys = [line["keys"] for line in train(tiny_config, tmp_path / "whole", "train.max_steps=5")]
    spoil(4)
    often = ["train.max_steps=5", "train.checkpoint_every=2", "train.bad_numbers=rollback"]
    lines = train(tiny_config, tmp_path / "run", *often)
    assert "back to the weights of step 2, on with the next batch" in caplog.text
    assert [line["keys"] for line in lines] == keys and [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 1]
    assert state(tmp_path / "run", 4) == state(tmp_path / "run", 2) != state(tmp_path / "run", 5)


def test_rollback_without_a_checkpoint_says_so(caplog, tiny_config, tmp_path, spoil):
    spoil(1)
    with pytest.raises(SystemExit) as ended:
        train(tiny_config, tmp_path / "run", "train.bad_numbers=rollback")
    assert ended.value.code == 1 and "has no checkpoint to go back to yet" in caplog.text


def replayed(capsys, *arguments: str) -> dict[str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["replay", *arguments])
    assert ended.value.code == 0
    told = capsys.readouterr().out.split("samples\n")
    return dict(line.split(" ", 1) for line in told[0].splitlines()) | {"samples": told[1].split()}


def test_replay_makes_the_same_step_again(capsys, tiny_config, tmp_path, spoil):
    """Step 3 from the checkpoint of step 1, over a step that was skipped."""
    spoil(2)
    lines = train(tiny_config, tmp_path / "run", "train.bad_numbers=skip", "train.checkpoint_every=3")
    found = replayed(capsys, str(tmp_path / "run"), "--step", "3")
    assert {name: float(found[name]) for name in ("loss", "grad_norm", "contrastive")} == {
        name: lines[2][name] for name in ("loss", "grad_norm", "contrastive")
    }
    assert found["keys"] == lines[2]["keys"] and len(set(found["samples"])) == PAIRS
    bad = replayed(capsys, str(tmp_path / "run"), "--step", "2")
    assert bad["loss"] == "nan" and bad["samples"] == json.loads((tmp_path / "run" / "bad-2.json").read_text())["keys"]


@pytest.mark.parametrize(
    ("step", "folder", "said"), [("9", "run", "the run has steps 1 to 3"), ("1", "none", "is no run")]
)
def test_replay_refuses_what_it_cannot_find(capsys, tiny_config, tmp_path, step, folder, said):
    if folder == "run":
        train(tiny_config, tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(tmp_path / folder), "--step", step])
    assert ended.value.code == 2 and said in capsys.readouterr().err
