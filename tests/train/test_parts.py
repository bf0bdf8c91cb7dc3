"""The small parts of training: schedule, parameter groups, DeepSpeed's configuration, metrics file, checkpoints."""

import json
import math

import pytest
import torch
from torch import nn

from vlscale.config import parse_overrides, validate
from vlscale.distributed import Ranks
from vlscale.sections import Config, OptimConfig, TrainConfig
from vlscale.train.bad_numbers import BadSteps
from vlscale.train.checkpoint import Checkpoints, Layout, load_checkpoint
from vlscale.train.checkpoint_folder import newest_complete
from vlscale.train.deepspeed_json import json_for_deepspeed
from vlscale.train.metrics_file import MetricsFile, read_metrics
from vlscale.train.optimizer import build_optimizer
from vlscale.train.schedule import learning_rate

LAYOUT = Layout(world_size=1, zero_stage=2, dtype="fp32")


def test_the_rate_warms_up_then_falls_to_its_floor():
    optim = OptimConfig(lr=2.0, warmup_steps=4, final_lr_ratio=0.1)
    rates = [learning_rate(optim, step, 104) for step in range(1, 105)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[53] == pytest.approx(1.1)  # half way down a cosine from 2.0 to 0.2
    assert rates[-1] == pytest.approx(0.2) and rates[3:] == sorted(rates[3:], reverse=True)
    constant = OptimConfig(lr=2.0, schedule="constant")
    assert {learning_rate(constant, step, 10) for step in range(1, 11)} == {2.0}


def test_norms_biases_and_scalars_do_not_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decayed, plain = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert [p.ndim for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.3
    assert [p.ndim for p in plain["params"]] == [1, 1, 1] and plain["weight_decay"] == 0.0
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to learn"):
        build_optimizer(model, OptimConfig())


def config_with(*overrides: str) -> Config:
    return validate(parse_overrides(list(overrides)), "test")


def test_deepspeed_configuration_is_derived_and_passes_extra_keys_through():
    config = config_with(
        "train.global_batch_size=64",
        "engine.zero_stage=3",
        "engine.dtype=bf16",
        "engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}, csv_monitor: {enabled: false}}",
    )
    made = json_for_deepspeed(config, world_size=4)
    assert made["train_batch_size"] == 64 and made["train_micro_batch_size_per_gpu"] == 16
    assert made["zero_optimization"] == {"stage": 3, "stage3_param_persistence_threshold": 0}
    assert made["bf16"] == {"enabled": True} and made["csv_monitor"] == {"enabled": False}


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("{train_batch_size: 3}", "train_batch_size is derived"),
        ("{zero_optimization: {stage: 1}}", "set only the latter"),
    ],
)
def test_deepspeed_keys_with_another_source_are_refused(extra, said):
    with pytest.raises(ValueError, match=said):
        json_for_deepspeed(config_with(f"engine.deepspeed={extra}"), 1)


def test_metrics_are_kept_up_to_a_step_and_a_cut_off_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, keep_until=0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": math.nan if step == 2 else 0.5})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    again = MetricsFile(path, keep_until=2)
    again.write({"step": 3, "loss": 0.25})
    again.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[2]["loss"] == 0.25 and lines[1]["loss"] == "nan"


class Weights:
    """An engine that writes one file."""

    def __init__(self, step):
        self.content = bytes([step]) * 1000

    def save(self, folder, files):
        files.add("engine/weights.bin", self.content)


def save(root, step, keep=5):
    train = TrainConfig(keep_checkpoints=keep, checkpoint_async=False)
    Checkpoints(root, LAYOUT, Weights(step), Ranks(), train).save(step, {"at": step}, BadSteps())
    return root / f"step-{step}"


def test_a_checkpoint_restores_state_and_random_numbers(tmp_path):
    torch.manual_seed(5)
    save(tmp_path, 2)
    expected, loaded = torch.rand(3), []
    restored = load_checkpoint(tmp_path, LAYOUT, loaded.append, Ranks())
    assert restored.step == 2 and restored.stream_state == {"at": 2} and loaded == [tmp_path / "step-2"]
    assert torch.equal(torch.rand(3), expected)


def test_only_the_newest_are_kept_and_nothing_partial_remains(tmp_path):
    for step in (2, 4, 10):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-4"]


@pytest.mark.parametrize("damage", ["cut", "flip", "manifest", "missing", "unfinished"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    save(tmp_path, 2)
    newest = save(tmp_path, 4)
    weights = newest / "engine" / "weights.bin"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "flip":
        weights.write_bytes(b"\xff" + weights.read_bytes()[1:])
    elif damage == "manifest":
        (newest / "manifest.json").write_text('{"format": 1, "fil')
    elif damage == "missing":
        weights.unlink()
    else:
        newest.rename(tmp_path / ".step-4.partial")
    assert newest_complete(tmp_path) == tmp_path / "step-2"


def test_no_checkpoint_is_no_restore(tmp_path):
    assert load_checkpoint(tmp_path / "nowhere", LAYOUT, print, Ranks()) is None


@pytest.mark.parametrize(("name", "other"), [("world_size", 4), ("zero_stage", 3), ("dtype", "bf16")])
def test_another_layout_is_refused_by_name(tmp_path, name, other):
    save(tmp_path, 2)
    changed = Layout(**(vars(LAYOUT) | {name: other}))
    with pytest.raises(ValueError, match=f"made with {name} .* got {other}"):
        load_checkpoint(tmp_path, changed, print, Ranks())
