"""Learning rate by step: linear warm-up, then cosine decay or constant."""

import math

from vlscale.sections import OptimConfig


def learning_rate(optim: OptimConfig, step: int, max_steps: int) -> float:
    """Rate of optimizer step `step`, counted from 1 to `max_steps`."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(1, max_steps - optim.warmup_steps)
    floor = optim.final_lr_ratio
    return optim.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
