"""`train.epochs` in steps: known once the shards are indexed, and from then on as if `train.max_steps` had said it.

A run's config.yaml keeps what was asked for, its data.json (`setup.CORPUS`) the steps that it came to.
"""

import math
from fractions import Fraction

from vlscale.logging import get_logger
from vlscale.sections import Config, TrainConfig, check_schedule


def steps_of(train: TrainConfig, samples: int) -> int:
    """`train.epochs` passes over as many samples, rounded up to a whole step, so that the last pass is whole."""
    return math.ceil(Fraction(str(train.epochs)) * samples / train.pairs_a_step)


def with_steps(config: Config, samples: int) -> Config:
    """The config with its number of steps, where `train.epochs` stands for it; raises ValueError where its schedule
    needs more. `samples`: of data.train."""
    train = config.train
    if train.epochs is None:
        return config
    steps = steps_of(train, samples)
    check_schedule(config.optim, steps, f"the {steps} steps of train.epochs={train.epochs:g}")
    return config.model_copy(update={"train": train.model_copy(update={"max_steps": steps})})


def as_asked(config: Config) -> Config:
    """What `with_steps` was given."""
    if config.train.epochs is None:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"max_steps": None})})


def in_words(train: TrainConfig, samples: int) -> str:
    """Of a config that `with_steps` returned."""
    passes = "1 epoch" if train.epochs == 1 else f"{train.epochs:g} epochs"
    return f"{passes} of {samples:,} samples, {train.max_steps:,} steps of {train.pairs_a_step:,} pairs"


def tell_steps(name: str, config: Config, samples: int) -> None:
    if config.train.epochs is not None:
        get_logger().info("%s: %s", name, in_words(config.train, samples))


def check_same_steps(train: TrainConfig, before: int | None, samples: int) -> None:
    """For a run that goes on from a checkpoint: raises ValueError where `train.epochs` passes over the samples that
    were there `before` are other steps, since the steps so far were scheduled by those."""
    if train.epochs is None or before is None or steps_of(train, before) == steps_of(train, samples):
        return
    steps = steps_of(train, before)
    raise ValueError(
        f"cannot resume: train.epochs={train.epochs:g} were {steps} steps of {before} samples, and are "
        f"{steps_of(train, samples)} of the {samples} that there are now; to go on, say which with train.max_steps="
        f"{steps} (or another number) and train.epochs=null"
    )
