"""Relation preservation: the relation matrix of a student modality follows its frozen teacher's.

CoVLR (arXiv 2304.07567), the intra-modal term: KL(teacher || student) between softmaxes of pairwise similarities.
"""

import torch

from vlscale.distributed import Ranks
from vlscale.objectives.contrastive import Metrics
from vlscale.objectives.sharded_relation_kl import sharded_relation_kl_loss
from vlscale.sections import ObjectiveConfig


def relation(
    student_emb: torch.Tensor,
    teacher_emb: torch.Tensor,
    objective: ObjectiveConfig,
    ranks: Ranks,
    *,
    comm: str,
    name: str,
) -> tuple[torch.Tensor, Metrics]:
    """Relation KL over the global batch, inside one modality. `student_emb` (B, D), `teacher_emb` (B, D_teacher): unit
    rows."""
    loss = sharded_relation_kl_loss(
        student_emb,
        teacher_emb,
        student_temperature=objective.student_temperature,
        teacher_temperature=objective.teacher_temperature,
        scope=objective.relation_scope,
        relation=objective.relation,
        ranks=ranks,
        comm=comm,
        impl=objective.impl,
    )
    return loss, {name: loss.detach()}
