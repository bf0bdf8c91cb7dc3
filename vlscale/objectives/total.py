"""The weighted sum of a run's objectives, read from the config: which terms there are, and what each is given.

They fall in two parts, since a meta step looks at them at different parameters: consistency (what contrasts two
embeddings of the same sample) and relations (what holds relations to those of a frozen teacher).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlscale.distributed import Ranks
from vlscale.objectives.conflict import resolved
from vlscale.objectives.contrastive import Metrics, contrastive
from vlscale.objectives.masked_language import masked_language
from vlscale.objectives.matching import matching
from vlscale.objectives.relation import relation
from vlscale.objectives.rvlr import Mixture
from vlscale.sections import ObjectiveConfig

Term = tuple[float, Callable[[], tuple[torch.Tensor, Metrics]]]  # its weight, and what computes it


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
    projected_teacher_image: torch.Tensor | None = None  # (B, D), rvlr only
    projected_teacher_text: torch.Tensor | None = None
    text_share: torch.Tensor | None = None  # (), rvlr only: w of the mixture of the teachers' relations
    fused: torch.Tensor | None = None  # (B, W) the fused [CLS] of the pairs, where there is a fusion encoder
    matching: torch.Tensor | None = None  # (B, 3, 2) logits: of the pair, with another picture, with another caption
    masked: torch.Tensor | None = None  # (M,) -log p of each masked word


def total_loss(
    rows: Embedded, objective: ObjectiveConfig, ranks: Ranks, comm: str = "auto"
) -> tuple[torch.Tensor, Metrics]:
    """Consistency and relations of the same embeddings. `comm`: how those of other ranks come, see `engine.comm`."""
    consistency, parts = consistency_loss(rows, objective, ranks, comm)
    relations, more = relations_loss(rows, objective, ranks, comm)
    embeddings = {"image": rows.image, "text": rows.text}
    loss, conflict = resolved(consistency, relations, embeddings, objective.conflict, ranks)
    return loss, parts | more | conflict


def consistency_loss(
    rows: Embedded, objective: ObjectiveConfig, ranks: Ranks, comm: str = "auto"
) -> tuple[torch.Tensor, Metrics]:
    """Contrast across modalities, of two views, of two captions, and of students with their teachers; matching, and
    masked words."""

    def contrast(first: torch.Tensor, second: torch.Tensor, name: str) -> tuple[torch.Tensor, Metrics]:
        scale_bias_ids = (rows.logit_scale, rows.logit_bias, rows.pair_id)
        return contrastive(first, second, *scale_bias_ids, ranks, comm=comm, impl=objective.impl, name=name)

    rvlr = objective.name == "rvlr"
    terms = [
        (objective.contrastive_weight, lambda: contrast(rows.image, rows.text, "contrastive")),
        (objective.view_weight, lambda: contrast(rows.image, rows.second_image, "view")),
        (objective.caption_weight, lambda: contrast(rows.text, rows.second_text, "caption")),
        (objective.iic_weight * rvlr, lambda: contrast(rows.image, rows.projected_teacher_image, "iic")),
        (objective.ttc_weight * rvlr, lambda: contrast(rows.text, rows.projected_teacher_text, "ttc")),
        (objective.matching_weight * (rows.matching is not None), lambda: matching(rows.matching, ranks)),
        (objective.mlm_weight, lambda: masked_language(rows.masked, ranks)),
    ]
    return _weighted_sum(terms, rows)


def relations_loss(
    rows: Embedded, objective: ObjectiveConfig, ranks: Ranks, comm: str = "auto"
) -> tuple[torch.Tensor, Metrics]:
    """CoVLR: each modality's relations held to its own teacher's. RVLR: all of them held to a mixture of both."""
    if objective.name == "rvlr":
        return _rvlr_relations(rows, objective, ranks, comm)
    terms = [
        (
            objective.image_relation_weight,
            lambda: relation(rows.image, rows.teacher_image, objective, ranks, comm=comm, name="relation_image"),
        ),
        (
            objective.text_relation_weight,
            lambda: relation(rows.text, rows.teacher_text, objective, ranks, comm=comm, name="relation_text"),
        ),
    ]
    return _weighted_sum(terms, rows)


def _rvlr_relations(
    rows: Embedded, objective: ObjectiveConfig, ranks: Ranks, comm: str = "auto"
) -> tuple[torch.Tensor, Metrics]:
    mixture = Mixture(rows.teacher_text, rows.teacher_image, rows.text_share, objective, ranks, comm)

    def to_mixture(own: torch.Tensor, name: str) -> tuple[torch.Tensor, Metrics]:
        loss = mixture.distance(own, of_teacher=True)
        return loss, {name: loss.detach()}

    def kd() -> tuple[torch.Tensor, Metrics]:
        students = [rows.image, rows.text] if rows.fused is None else [rows.fused]
        distances = [mixture.distance(student) for student in students]
        if objective.cross_modal_relation:
            distances.append(mixture.cross_modal_distance(rows.image, rows.text))
        loss = sum(distances) / len(distances)
        return loss, {"kd": loss.detach()}

    terms = [
        (objective.kd_weight, kd),
        (objective.kd_image_weight, lambda: to_mixture(rows.teacher_image, "kd_image")),
        (objective.kd_text_weight, lambda: to_mixture(rows.teacher_text, "kd_text")),
    ]
    loss, metrics = _weighted_sum(terms, rows)
    return loss, metrics | ({"mixture_text": rows.text_share.detach()} if objective.distils else {})


def _weighted_sum(terms: list[Term], rows: Embedded) -> tuple[torch.Tensor, Metrics]:
    """Terms of weight 0 are not computed."""
    loss = rows.logit_scale.new_zeros(())
    metrics: Metrics = {}
    for weight, term in terms:
        if weight > 0:
            value, parts = term()
            loss = loss + weight * value
            metrics |= parts
    return loss, metrics
