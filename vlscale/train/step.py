"""One optimizer step on one global batch: the joint step, and what the meta steps share with it.

`joint_step` minimises consistency and relations of the same parameters. Its siblings move the parameters between the
two; all take the same arguments, and `steps.STEPS` names them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from vlscale.data.batch import Batch
from vlscale.distributed import Ranks
from vlscale.logging import get_logger
from vlscale.models.dual_encoder import Embeddings, Features
from vlscale.models.fused_pairs import Fusing
from vlscale.objectives.total import Embedded, total_loss
from vlscale.sections import MetaConfig, ObjectiveConfig
from vlscale.train.bad_numbers import BadNumbers
from vlscale.train.engine import Engine
from vlscale.train.fusing import Draws
from vlscale.train.inputs import Inputs

Forward = Callable[..., Embeddings | Features]


@dataclass(frozen=True)
class StepParts:
    """What a step works with, the same at every step of a run."""

    engine: Engine
    inputs: Inputs
    objective: ObjectiveConfig
    meta: MetaConfig
    ranks: Ranks
    chunk_size: int | None
    comm: str = "auto"
    draws: Draws = field(default_factory=Draws)  # of this step alone, see `at`
    said: set[str] = field(default_factory=set)

    def at(self, seed: int, number: int) -> "StepParts":
        """For the run's global batch of this number: what is random about a step is a function of it and the seed."""
        return replace(self, draws=Draws(seed, number))

    def warn_once(self, message: str, *values: float) -> None:
        if self.ranks.first and message not in self.said:
            self.said.add(message)
            get_logger().warning(message, *values)


def joint_step(parts: StepParts, batch: Batch, test_batch: Batch) -> dict[str, float]:
    """Towers, objectives, backward, update. `test_batch` is for meta steps."""
    rows = embed(parts.engine, parts, batch)
    loss, metrics = total_loss(rows, parts.objective, parts.ranks, parts.comm)
    parts.engine.backward(loss)
    return finish(parts, loss, metrics, rows)


def finish(parts: StepParts, loss: torch.Tensor, metrics: dict[str, torch.Tensor], rows: Embedded) -> dict[str, float]:
    """The update, and the step's numbers: the loss, its parts, the logit scale and the gradient norm.

    They are read before the update, with whether any rank's loss or gradient is not finite: BadNumbers is then raised
    on all ranks, and no weight or moment has changed.
    """
    sound = torch.isfinite(loss.detach().float() + parts.engine.local_norm())
    values = {"bad_ranks": parts.ranks.sum((~sound).float()), "loss": loss, **metrics, "logit_scale": rows.logit_scale}
    numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()  # one wait for the device
    found = dict(zip(values, numbers, strict=True))
    if found.pop("bad_ranks"):
        raise BadNumbers(found | {"grad_norm": float("nan")})
    return found | {"grad_norm": parts.engine.step()}


def embed(forward: Forward, parts: StepParts, batch: Batch) -> Embedded:
    """One forward of each tower over all views of this rank's pairs, and of the teachers that the loss looks at."""
    teachers = parts.inputs.teacher_rows(batch, parts.objective.teachers_seen)
    return embedded(forward(**forward_inputs(parts, batch, teachers)), teachers, batch)


def forward_inputs(
    parts: StepParts, batch: Batch, teachers: tuple[torch.Tensor | None, torch.Tensor | None]
) -> dict[str, torch.Tensor | Fusing | int | None]:
    """What the model's forward takes for a batch and its teachers' rows."""
    inputs = parts.inputs.student(batch) | {"chunk_size": parts.chunk_size}
    if parts.inputs.fuses and parts.objective.fuses:
        inputs = parts.draws.fusing(batch, inputs, parts.inputs.words, parts.objective, parts.ranks)
    if parts.objective.name == "rvlr":
        inputs |= {"teacher_image": teachers[0], "teacher_text": teachers[1]}
    return inputs


def embedded(out: Embeddings, teachers: tuple[torch.Tensor | None, torch.Tensor | None], batch: Batch) -> Embedded:
    """What a forward gave, by view."""
    count = len(batch.keys)
    image, second_image = _views(out.image, count)
    text, second_text = _views(out.text, count)
    return Embedded(
        image=image,
        text=text,
        logit_scale=out.logit_scale,
        logit_bias=out.logit_bias,
        pair_id=batch.pair_id.to(image.device),
        second_image=second_image,
        second_text=second_text,
        teacher_image=teachers[0],
        teacher_text=teachers[1],
        projected_teacher_image=out.teacher and out.teacher.image,
        projected_teacher_text=out.teacher and out.teacher.text,
        text_share=out.teacher and out.teacher.text_share,
        fused=out.fused and out.fused.cls,
        matching=out.fused and out.fused.matching,
        masked=out.fused and out.fused.masked,
    )


def _views(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """First views (count, D) and, where the batch carries them, second views."""
    return rows[:count], rows[count:] if len(rows) > count else None
