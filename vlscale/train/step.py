"""One optimizer step on one global batch. `joint_step` minimises consistency and relations together."""

import torch

from vlscale.data.batch import Batch
from vlscale.distributed import Ranks
from vlscale.objectives.total import Embedded, total_loss
from vlscale.sections import ObjectiveConfig
from vlscale.train.engine import Engine
from vlscale.train.inputs import Inputs


def joint_step(
    engine: Engine,
    inputs: Inputs,
    batch: Batch,
    objective: ObjectiveConfig,
    ranks: Ranks,
    lr: float,
    chunk_size: int | None,
) -> dict[str, float]:
    """Towers, objectives, backward, update. Returns the loss, its parts, the logit scale and the gradient norm."""
    rows = embed(engine, inputs, batch, chunk_size)
    loss, parts = total_loss(rows, objective, ranks)
    engine.backward(loss)
    grad_norm = engine.step(lr)
    values = {"loss": loss.detach(), **parts, "logit_scale": rows.logit_scale.detach()}
    numbers = torch.stack([value.float() for value in values.values()]).tolist()  # one wait for the device
    return dict(zip(values, numbers, strict=True)) | {"grad_norm": grad_norm}


def embed(engine: Engine, inputs: Inputs, batch: Batch, chunk_size: int | None) -> Embedded:
    """One forward of each tower over all views of this rank's pairs, and of the teachers."""
    out = engine(**inputs.student(batch), chunk_size=chunk_size)
    count = len(batch.keys)
    image, second_image = _views(out.image, count)
    text, second_text = _views(out.text, count)
    teacher_image, teacher_text = inputs.teacher_rows(batch)
    return Embedded(
        image=image,
        text=text,
        logit_scale=out.logit_scale,
        logit_bias=out.logit_bias,
        pair_id=batch.pair_id.to(image.device),
        second_image=second_image,
        second_text=second_text,
        teacher_image=teacher_image,
        teacher_text=teacher_text,
    )


def _views(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """First views (count, D) and, where the batch carries them, second views."""
    return rows[:count], rows[count:] if len(rows) > count else None
