"""One step of a run after the other: its rates, its batches, and what becomes of a bad one."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from vlscale.data.batch import Batch
from vlscale.distributed import Ranks
from vlscale.sections import Config
from vlscale.train.bad_numbers import BadSteps, Guard
from vlscale.train.checkpoint import Checkpoints
from vlscale.train.drawn import Drawn, draw, mean_of
from vlscale.train.engine import Engine
from vlscale.train.schedule import learning_rate
from vlscale.train.setup import Parts
from vlscale.train.step import StepParts
from vlscale.train.steps import STEPS


class Trainer:
    """Every method is called by all ranks together."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        parts: Parts,
        engine: Engine,
        checkpoints: Checkpoints,
        ranks: Ranks,
        bad_steps: BadSteps,
    ):
        self.config, self.bad_steps = config, bad_steps
        self.step_parts = StepParts(
            engine,
            parts.inputs,
            config.objective,
            config.meta,
            ranks,
            config.train.chunk_size,
            parts.comm,
        )
        self._one = STEPS[config.meta_mode]
        self._guard = Guard(
            config.train,
            folder,
            ranks,
            forget=engine.drop_gradients,
            roll_back=lambda step: getattr(checkpoints.load(before=step), "step", None),
            seen=bad_steps,
        )

    def draws(self, batches: Iterator[Batch]) -> Iterator[Drawn]:
        """Update by update, each batch with the one that a meta step tests on: itself, or the one ahead, which trains
        next."""
        same = self.config.meta_mode == "joint" or self.config.meta.test_batch == "same"
        pairs = ((batch, batch) for batch in batches) if same else pairwise(batches)
        return draw(pairs, self.config.train.accumulate_losses)

    def rate(self, step: int) -> float:
        return learning_rate(self.config.optim, step, self.config.train.max_steps)

    def step(self, step: int, drawn: Drawn) -> dict[str, float]:
        """The step's numbers; of a bad one that the policy goes on after, the bad numbers."""
        return self._guard.take(step, drawn, lambda: self.unguarded(step, drawn))

    def unguarded(self, step: int, drawn: Drawn) -> dict[str, float]:
        """Raises BadNumbers in place of a bad update, at the first of its losses that is bad."""
        self.step_parts.engine.set_rates(self.rate(step), step)
        seed, first = self.config.train.seed, (step - 1) * len(drawn.pairs)
        return mean_of([self._one(self.step_parts.at(seed, first + k), *pair) for k, pair in enumerate(drawn.pairs)])
