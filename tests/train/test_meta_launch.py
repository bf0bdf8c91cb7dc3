"""Every meta mode at every ZeRO stage, in fp32 and bf16, by the real launcher on two ranks.

Against plain PyTorch on one process: functional parameters, create_graph, AdamW, nothing of DeepSpeed or of the steps.
"""

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.meta_reference import reference_loss
from vlscale.config import load_plan
from vlscale.distributed import Ranks
from vlscale.models.dual_encoder import load_dual_encoder, weights_of
from vlscale.train.metrics_file import read_metrics
from vlscale.train.optimizer import build_optimizer
from vlscale.train.schedule import learning_rate
from vlscale.train.setup import build_parts, build_stream
from vlscale.train.step import StepParts

MODES = ("joint", "heads", "first_order", "finite_difference")
MATRIX = {
    f"{mode}-{stage}-{dtype}": (mode, stage, dtype)
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
ONCE = {f"{mode}-once": mode for mode in MODES}  # one step of plain descent in bf16: the way moved is the gradient


@pytest.fixture(scope="module")
def recipe(tiny_config, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "modes.yaml"
    variants = [
        f"{name}: {{meta: {{mode: {mode}}}, engine: {{zero_stage: {stage}, dtype: {dtype}}}}}"
        for name, (mode, stage, dtype) in MATRIX.items()
    ]
    variants += [f"{name}: {{{own}}}" for name, own in FURTHER.items()]
    descent = "name: sgd, lr: 0.001, schedule: constant, clip_norm: 0, warmup_steps: 0, weight_decay: 0"
    once = f"optim: {{{descent}}}, train: {{max_steps: 1}}"
    variants += [
        f"{name}: {{meta: {{mode: {mode}}}, engine: {{zero_stage: 2, dtype: bf16}}, {once}}}"
        for name, mode in ONCE.items()
    ]
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
def plain(recipe, tmp_path_factory):
    """Losses, and the final weights, of the run in plain PyTorch, by (mode, further overrides)."""
    known = {}
    folder = tmp_path_factory.mktemp("plain")

    def train(name: str) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        (config,) = [run.config for run in load_plan(recipe) if run.name == name]
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"dtype": "fp32"})})
        key = json.dumps([config.objective.model_dump(), config.meta.model_dump(), config.optim.model_dump()])
        if key not in known:
            known[key] = _train(config, folder)
        return known[key]

    return train


def _train(config, folder: Path) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
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
    return losses, before, model.state_dict()


@pytest.mark.parametrize("name", [*MATRIX, *FURTHER])
def test_two_ranks_follow_plain_pytorch(launched, plain, name):
    losses, _, _ = plain(name)
    found = [line["loss"] for line in read_metrics(launched / name / "metrics.jsonl")]
    mode, _, dtype = MATRIX.get(name, ("", 0, "fp32"))
    within = 2e-2 if dtype == "bf16" else 1e-3 if mode == "finite_difference" else 1e-5
    assert found == pytest.approx(losses, rel=within)


@pytest.mark.parametrize("name", ONCE)
def test_the_gradient_in_bf16_points_the_same_way(launched, plain, name):
    _, before, after = plain(name)
    final = weights_of(load_dual_encoder(str(launched / name)))
    keys = [key for key in final if final[key].is_floating_point() and "logit" not in key]
    rounded = {key: before[key].bfloat16().float() for key in keys}  # where the engine's master weights start
    moved = torch.cat([(final[key] - rounded[key]).ravel() for key in keys]).double()
    expected = torch.cat([(after[key] - before[key]).ravel() for key in keys]).double()
    assert torch.cosine_similarity(moved, expected, 0) >= 0.999


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
