"""A finished run at theta' = theta - a grad(consistency): the model that `meta.mode=heads` looked at relations with.

The inner update is that of the run's next batch, over the two projections, as the step makes it.
"""

from pathlib import Path

import torch

from vlscale.distributed import Ranks
from vlscale.evaluate.run import run_config
from vlscale.models.hf_folder import save_folder
from vlscale.objectives.total import consistency_loss
from vlscale.train.inner_rate import inner_rate
from vlscale.train.loop import Job, open_run
from vlscale.train.step import embed


def save_at_theta_prime(run: Path, out: Path) -> None:
    """Writes the run's model with its projections moved, as a `final/` is, to `out`."""
    with open_run(Job(run_config(str(run)), run, Ranks(), out.name)) as opened:
        step, parts = opened.trainer().step_parts, opened.parts
        names = ["visual_projection.weight", "text_projection.weight"]
        learned = [opened.engine.module.get_parameter(name) for name in names]
        rows = embed(step.engine.plain, step, next(opened.batches))
        consistency, _ = consistency_loss(rows, step.objective, step.ranks, step.comm)
        gradient = torch.autograd.grad(consistency, learned)
        lengths = (torch.cat([part.detach().flatten() for part in tensors]).norm() for tensors in (learned, gradient))
        rate = inner_rate(step.meta, *lengths)
        weights = opened.engine.weights()
        weights |= {name: weights[name] - (rate * part).cpu() for name, part in zip(names, gradient, strict=True)}
        save_folder(out, parts.model, weights, parts.tokenizer, parts.image_processor)
