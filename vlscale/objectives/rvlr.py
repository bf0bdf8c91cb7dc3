"""Structure-aware distillation and its instance-level companions (RVLR, arXiv 2412.10761, section 3).

    itc         contrast of images and texts (`objectives.contrastive`)
    iic, ttc    contrast of a student's embedding with the projected embedding of its frozen teacher, same sample
    kd          relations of the student against the mixture E = w T_text + (1 - w) T_image, w in (0, 1) learned
    kd_image    relations of the image teacher against E; kd_text likewise: what w learns from

The paper's relations are those of a fusion encoder's [CLS]; without one they are those of the image embeddings and of
the text embeddings and, on request, the symmetrised image-text matrix, and kd is the mean of their distances to E. The
temperature is fixed: a learned one can shrink every kd term to zero. With `mae`, kd_image + kd_text does not depend on
w, since |a - b| w + |a - b| (1 - w) = |a - b|: with equal weights w then learns from kd alone.

Legend: B pairs of this rank, D width.
"""

import torch

from vlscale.distributed import Ranks
from vlscale.objectives.sharded_relation_kl import sharded_relation_kl_loss
from vlscale.objectives.sharded_relation_match import sharded_relation_match_loss
from vlscale.sections import ObjectiveConfig


def mixture(text_share: torch.Tensor) -> torch.Tensor:
    """(w, 1 - w): the weights of the text and the image teacher's relations, in this order."""
    return torch.stack([text_share, 1 - text_share])


def distance_to_mixture(
    rows: torch.Tensor,
    teacher_text: torch.Tensor,
    teacher_image: torch.Tensor,
    text_share: torch.Tensor,
    objective: ObjectiveConfig,
    ranks: Ranks,
    comm: str,
) -> torch.Tensor:
    """Distance of the relations of `rows` (B, D) from the mixture, over the global batch. All rows unit rows."""
    teachers, weights = [teacher_text, teacher_image], mixture(text_share)
    if objective.relation_distance == "kl":
        return sharded_relation_kl_loss(
            rows,
            teachers,
            teacher_weights=weights,
            student_temperature=objective.student_temperature,
            teacher_temperature=objective.teacher_temperature,
            scope=objective.relation_scope,
            relation=objective.relation,
            ranks=ranks,
            comm=comm,
            impl=objective.impl,
        )
    return sharded_relation_match_loss(
        rows,
        teachers,
        weights,
        temperature=objective.student_temperature,
        metric=objective.relation_distance,
        ranks=ranks,
        comm=comm,
        impl=objective.impl,
    )


def cross_modal_distance(
    image: torch.Tensor,
    text: torch.Tensor,
    teacher_text: torch.Tensor,
    teacher_image: torch.Tensor,
    text_share: torch.Tensor,
    objective: ObjectiveConfig,
    ranks: Ranks,
    comm: str,
) -> torch.Tensor:
    """Distance of the symmetrised image-text matrix from the mixture, `mae` or `mse`.

    With a = (image + text) / 2 and b = (image - text) / 2, (image_i . text_j + image_j . text_i) / 2 is
    a_i . a_j - b_i . b_j: two relation matrices, the second moved to the mixture's side of the difference.
    """
    weights = torch.cat([torch.ones_like(text_share)[None], mixture(text_share)])
    return sharded_relation_match_loss(
        (image + text) / 2,
        [(image - text) / 2, teacher_text, teacher_image],
        weights,
        temperature=objective.student_temperature,
        metric=objective.relation_distance,
        ranks=ranks,
        comm=comm,
        impl=objective.impl,
    )
