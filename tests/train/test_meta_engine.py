"""The meta steps over the real engine, on one rank: after an error anywhere in between, every parameter is what it was,
bit for bit; and in bf16 every shift starts from the master weights.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count, product

import pytest
import torch

from vlscale.config import load_plan
from vlscale.data.batch import Batch
from vlscale.train import meta_shift
from vlscale.train.engine import Engine, start_ranks
from vlscale.train.gradients import Gradients, Move, dithered
from vlscale.train.setup import build_parts, build_stream
from vlscale.train.step import StepParts
from vlscale.train.steps import STEPS

FAILURES = [  # a step, the loss that fails in it, and at which of its calls
    ("first_order", "relations_loss", 1),
    ("finite_difference", "relations_loss", 1),
    ("finite_difference", "consistency_loss", 2),
    ("finite_difference", "consistency_loss", 3),
]


class BrokenBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError


@pytest.fixture
def build(tiny_config, tmp_path) -> Iterator[Callable[..., tuple[StepParts, Batch]]]:
    """What a step takes, after two updates: then master weights are between the numbers of bf16."""
    engines = []

    def make(stage: int, dtype: str) -> tuple[StepParts, Batch]:
        overrides = [f"engine.zero_stage={stage}", f"engine.dtype={dtype}", "teacher.source=frozen_copy"]
        (run,) = load_plan(tiny_config, [*overrides, "objective.name=covlr", "meta.inner_lr=0.05"])
        config, ranks = run.config, start_ranks(run.config.engine)
        parts = build_parts(config, tmp_path / "run", ranks)
        engine = Engine(parts.model, config, ranks)
        engines.append(engine)
        with closing(iter(build_stream(config, parts, ranks, None))) as batches:
            batch = next(batches)
        step_parts = StepParts(engine, parts.inputs, config.objective, config.meta, ranks, None)
        for step in (1, 2):
            engine.set_rates(1e-3, step)
            STEPS["joint"](step_parts, batch, batch)
        return step_parts, batch

    yield make
    for engine in engines:
        engine.close()


def held(engine: Engine) -> list[torch.Tensor]:
    """What the rank holds of every learned parameter: here, all of it."""
    return [getattr(parameter, "ds_tensor", parameter).detach().reshape(-1) for parameter in engine.learned]


def masters(engine: Engine) -> list[torch.Tensor]:
    return [engine.full(index, None).detach().reshape(-1).clone() for index in range(len(engine.learned))]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def failing(loss: Callable, at: int, where: str, seen: Callable[[], None]) -> Callable:
    """`loss`, but its call number `at` fails, or the backward of what that gives; `seen` is called before."""
    calls = count(1)

    def of(*arguments):
        value, metrics = loss(*arguments)
        if next(calls) == at:
            seen()
            value = BrokenBackward.apply(value) if where == "backward" else 1 / 0
        return value, metrics

    return of


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_parameters_come_back_after_an_error(build, stage, dtype, monkeypatch):
    parts, batch = build(stage, dtype)
    engine, moved = parts.engine, []
    before, weights = [value.clone() for value in held(engine)], masters(engine)
    for (mode, name, at), where in product(FAILURES, ("forward", "backward")):
        loss = failing(getattr(meta_shift, name), at, where, lambda: moved.append(not same(held(engine), before)))
        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            patched.setattr(meta_shift, name, loss)
            STEPS[mode](parts, batch, batch)
        assert same(held(engine), before) and same(masters(engine), weights), (mode, name, at, where)
    assert moved == [True] * 8  # each time there was something to put back


@pytest.mark.parametrize("stage", range(4))
def test_in_bf16_every_shift_starts_from_the_master_weights(build, stage, monkeypatch):
    parts, batch = build(stage, "bf16")
    engine, moving = parts.engine, parts.engine.moving
    start: dict[str, list[torch.Tensor]] = {}
    agree: dict[str, list[bool]] = {"master": [], "rounded": []}

    @contextmanager
    def watched() -> Iterator[Move]:
        with moving() as move:

            def moved(along: Gradients, rate: torch.Tensor, dither: bool = False) -> torch.Tensor:
                cosine = move(along, rate, dither)
                for name, values in start.items():
                    shifted = [value.float() + along[i].float().reshape(-1) * rate for i, value in enumerate(values)]
                    rounded = [dithered(value, 0) if dither else value.bfloat16() for value in shifted]
                    agree[name].append(same(held(engine), rounded))
                return cosine

            yield moved

    monkeypatch.setattr(engine, "moving", watched)
    for mode in ("first_order", "finite_difference"):
        start |= {"master": masters(engine), "rounded": [value.clone() for value in held(engine)]}
        STEPS[mode](parts, batch, batch)
    assert agree == {"master": [True] * 4, "rounded": [False] * 4}
