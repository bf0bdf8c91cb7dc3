"""Every meta mode at every ZeRO stage, in fp32 and bf16, on two ranks.

Against plain PyTorch on one process: functional parameters, create_graph, AdamW, nothing of DeepSpeed or of the steps.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.train.meta_reference import reference_loss
from vlscale.config import load_plan
from vlscale.distributed import Ranks
from vlscale.models.dual_encoder import load_dual_encoder, weights_of
from vlscale.sections import Config
from vlscale.train.metrics_file import read_metrics
from vlscale.train.optimizer import build_optimizer
from vlscale.train.schedule import learning_rate
from vlscale.train.setup import build_parts, build_stream
from vlscale.train.step import StepParts

MODES = ("joint", "heads", "first_order", "finite_difference")
MATRIX = {
    f"{mode}-{stage}-{dtype}": f"meta: {{mode: {mode}}}, engine: {{zero_stage: {stage}, dtype: {dtype}}}"
    for mode in MODES
    for stage in range(4)
    for dtype in ("fp32", "bf16")
}
FURTHER = {
    "heads-next": "meta: {mode: heads, test_batch: next}, engine: {zero_stage: 2}",
    "first_order-next": "meta: {mode: first_order, test_batch: next}, engine: {zero_stage: 3}, train: {chunk_size: 4}",
    "rvlr": "objective: {name: rvlr}, meta: {mode: joint}, engine: {zero_stage: 3}",
    "rvlr-heads": "objective: {name: rvlr, relation_distance: kl}, meta: {mode: heads}, engine: {zero_stage: 2}",
}
FURTHER |= {  # the other ways over ranks
    "ring": "meta: {mode: joint}, engine: {zero_stage: 2, comm: ring}",
    "half-ring": "meta: {mode: first_order}, engine: {zero_stage: 1, comm: half_ring}",
}
DIFFERENCE = "mode: finite_difference"
FURTHER |= {  # second order with a part of the model, a part of the batch at once, and the next batch
    "heads-locked-vision": "meta: {mode: heads}, engine: {zero_stage: 2}, model: {locked: [vision]}",
    "heads-locked-text": "meta: {mode: heads}, engine: {zero_stage: 3}, model: {locked: [text]}",
    "heads-chunks": "meta: {mode: heads}, engine: {zero_stage: 3}, train: {chunk_size: 4}",
    "difference-locked-vision": f"meta: {{{DIFFERENCE}}}, engine: {{zero_stage: 3}}, model: {{locked: [vision]}}",
    "difference-locked-text": f"meta: {{{DIFFERENCE}}}, engine: {{zero_stage: 2}}, model: {{locked: [text]}}",
    "difference-chunks": f"meta: {{{DIFFERENCE}}}, engine: {{zero_stage: 2}}, train: {{chunk_size: 4}}",
    "difference-next": f"meta: {{{DIFFERENCE}, test_batch: next}}, engine: {{zero_stage: 1}}",
}
# One step of plain descent in bf16: the way moved is the gradient. Relations weigh so much that the modes differ.
DESCENT = "{name: sgd, lr: 0.001, schedule: constant, clip_norm: 0, warmup_steps: 0, weight_decay: 0}"
ONCE = {
    f"{mode}-once-{stage}": f"meta: {{mode: {mode}}}, engine: {{zero_stage: {stage}, dtype: bf16}}"
    for mode in MODES
    for stage in range(4)
}
ONCE["heads-next-once"] = "meta: {mode: heads, test_batch: next}, engine: {zero_stage: 2, dtype: bf16}"
ONCE = {
    name: f"{own}, objective: {{relation_weight: 5}}, optim: {DESCENT}, train: {{max_steps: 1}}"
    for name, own in ONCE.items()
}


@pytest.fixture(scope="module")
def recipe(tiny_config, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "modes.yaml"
    variants = [f"{name}: {{{own}}}" for name, own in (MATRIX | FURTHER | ONCE).items()]
    path.write_text(
        f"base: {tiny_config}\n"
        "teacher: {source: frozen_copy}\n"
        "objective: {name: covlr, relation_weight: 0.5}\n"
        "meta: {inner_lr: 0.02}\n"
        "optim: {warmup_steps: 1}\n"
        "train: {max_steps: 4, checkpoint_every: 4}\n"
        "variants:\n  " + "\n  ".join(variants) + "\n"
    )
    return path


@pytest.fixture(scope="module")
def configs(recipe) -> dict[str, Config]:
    return {run.name: run.config for run in load_plan(recipe)}


class Trained(NamedTuple):
    """A run in plain PyTorch."""

    losses: list[float]
    before: dict[str, torch.Tensor]  # its weights
    after: dict[str, torch.Tensor]

    @property
    def moved(self) -> torch.Tensor:
        return difference(self.after, self.before)


def difference(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of all weights but the scale, in one row."""
    keys = [key for key, value in before.items() if value.is_floating_point() and "logit" not in key]
    return torch.cat([(after[key] - before[key]).ravel() for key in keys]).double()


@pytest.fixture(scope="module")
def plain(configs, tmp_path_factory):
    """By the run's name, in another mode if asked; one training for all whose parameters are to go the same way."""
    known = {}
    folder = tmp_path_factory.mktemp("plain")

    def train(name: str, mode: str | None = None) -> Trained:
        config = configs[name]
        config = config.model_copy(update={"meta": config.meta.model_copy(update={"mode": mode or config.meta.mode})})
        key = str([part.model_dump() for part in (config.objective, config.meta, config.optim, config.model)])
        if key not in known:
            engine = config.engine.model_copy(update={"dtype": "fp32"})
            known[key] = _train(config.model_copy(update={"engine": engine}), folder)
        return known[key]

    return train


def _train(config: Config, folder: Path) -> Trained:
    ranks = Ranks()
    parts = build_parts(config, folder / "none", ranks)
    model, optim = parts.model, config.optim
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step_parts = StepParts(None, parts.inputs, config.objective, config.meta, ranks, None)
    optimizer, losses = build_optimizer(model, optim), []
    with closing(iter(build_stream(config, parts, ranks, None))) as batches:
        read = [next(batches) for _ in range(config.train.max_steps + 1)]
    for step, batch in enumerate(read[:-1], 1):
        test_batch = read[step] if config.meta.test_batch == "next" else batch
        loss, _ = reference_loss(model, step_parts, batch, test_batch, config.meta_mode)
        optimizer.zero_grad()
        loss.backward()
        if optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, config.train.max_steps)
        optimizer.step()
        losses.append(float(loss.detach()))
    return Trained(losses, before, model.state_dict())


def within(config: Config) -> float:
    """How far a loss may be from plain PyTorch's, relatively. In bf16 other modes are as near: their gradients are
    told apart below."""
    if config.engine.dtype == "bf16":
        return 2e-2
    return 1e-4 if config.meta_mode == "finite_difference" else 1e-5


LEAST_COSINE = 0.999  # of a gradient in bf16 with plain PyTorch's in fp32


@pytest.mark.parametrize("name", [*MATRIX, *FURTHER])
def test_two_ranks_follow_plain_pytorch(launched, configs, plain, name):
    found = [line["loss"] for line in read_metrics(launched / name / "metrics.jsonl")]
    assert found == pytest.approx(plain(name).losses, rel=within(configs[name]))


@pytest.mark.parametrize("name", ONCE)
def test_one_step_in_bf16_has_the_gradient_of_plain_pytorch(launched, configs, plain, name):
    expected, length = plain(name), 0.03 if configs[name].meta_mode == "finite_difference" else 0.01
    final = weights_of(load_dual_encoder(str(launched / name)))
    start = {key: value.bfloat16().float() for key, value in expected.before.items()}  # of the engine's master weights
    moved = difference(final, start)
    assert torch.cosine_similarity(moved, expected.moved, 0) >= LEAST_COSINE
    assert float(moved.norm()) == pytest.approx(float(expected.moved.norm()), rel=length)
    (line,) = read_metrics(launched / name / "metrics.jsonl")
    assert [line["loss"]] == pytest.approx(expected.losses, rel=5e-3)


def test_runs_differ_by_more_than_is_allowed(configs, plain):
    """Otherwise one of another mode would pass for the one that was asked for, or one without its second order."""
    exact = [name for name in (*MATRIX, *FURTHER) if configs[name].engine.dtype == "fp32"]
    for name in exact:
        simpler = {"heads": "joint", "finite_difference": "first_order"}.get(configs[name].meta_mode)
        if simpler is not None:
            assert plain(name, simpler).losses != pytest.approx(plain(name).losses, rel=2 * within(configs[name])), name
    for first, second in pairs_that_differ(exact, plain):
        allowed = max(within(configs[name]) for name in (first, second))
        assert plain(first).losses != pytest.approx(plain(second).losses, rel=2 * allowed), (first, second)
    for first, second in pairs_that_differ(ONCE, plain):
        cosine = torch.cosine_similarity(plain(first).moved, plain(second).moved, 0)
        assert 1 - cosine > 2 * (1 - LEAST_COSINE), (first, second)


def pairs_that_differ(names: Iterable[str], plain: Callable[[str], Trained]) -> Iterator[tuple[str, str]]:
    return combinations({id(plain(name)): name for name in names}.values(), 2)


@pytest.mark.parametrize("mode", ["heads", "first_order", "finite_difference"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_stages_agree_and_say_how_the_shift_went(launched, mode, dtype):
    runs = [read_metrics(launched / f"{mode}-{stage}-{dtype}" / "metrics.jsonl") for stage in range(1, 4)]
    for other in runs[1:]:
        assert [line["keys"] for line in other] == [line["keys"] for line in runs[0]]
    assert all(line["inner_lr"] > 0 for run in runs for line in run)
    if mode != "heads":
        assert all(line["shift_cosine"] > 0.9 for run in runs for line in run)


def test_teacher_heads_stay_out_of_the_exported_folder(launched):
    assert not [key for key in load_file(launched / "rvlr" / "final" / "model.safetensors") if "teacher" in key]
    assert all(0 < line["mixture_text"] < 1 for line in read_metrics(launched / "rvlr" / "metrics.jsonl"))
