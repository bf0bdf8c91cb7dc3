"""The weighted sum of a run's objectives, read from the config: which terms there are, and what each is given."""

from dataclasses import dataclass

import torch

from vlscale.distributed import Ranks
from vlscale.objectives.contrastive import Metrics, contrastive
from vlscale.objectives.relation import relation
from vlscale.sections import ObjectiveConfig


@dataclass
class Embedded:
    """All embeddings of this rank's pairs that the objectives may ask for. (B, D) unit rows; None: not asked for."""

    image: torch.Tensor
    text: torch.Tensor
    logit_scale: torch.Tensor  # ()
    logit_bias: torch.Tensor | None  # ()
    pair_id: torch.Tensor  # (B,)
    second_image: torch.Tensor | None = None  # another view of the same pictures
    second_text: torch.Tensor | None = None  # another caption of the same samples
    teacher_image: torch.Tensor | None = None  # (B, D_teacher)
    teacher_text: torch.Tensor | None = None


def total_loss(rows: Embedded, objective: ObjectiveConfig, ranks: Ranks) -> tuple[torch.Tensor, Metrics]:
    """Consistency, relations and single-modal contrast, each times its weight. Terms of weight 0 are not computed."""
    scale_bias_ids = (rows.logit_scale, rows.logit_bias, rows.pair_id)
    impl = objective.impl
    terms = [
        (objective.contrastive_weight, lambda: contrastive(rows.image, rows.text, *scale_bias_ids, ranks, impl=impl)),
        (
            objective.view_weight,
            lambda: contrastive(rows.image, rows.second_image, *scale_bias_ids, ranks, impl=impl, name="view"),
        ),
        (
            objective.caption_weight,
            lambda: contrastive(rows.text, rows.second_text, *scale_bias_ids, ranks, impl=impl, name="caption"),
        ),
        (
            objective.image_relation_weight,
            lambda: relation(rows.image, rows.teacher_image, objective, ranks, name="relation_image"),
        ),
        (
            objective.text_relation_weight,
            lambda: relation(rows.text, rows.teacher_text, objective, ranks, name="relation_text"),
        ),
    ]
    loss = rows.logit_scale.new_zeros(())
    metrics: Metrics = {}
    for weight, term in terms:
        if weight > 0:
            value, parts = term()
            loss = loss + weight * value
            metrics |= parts
    return loss, metrics
