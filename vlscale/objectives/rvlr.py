"""Structure-aware distillation and its instance-level companions (RVLR, arXiv 2412.10761, section 3).

    itc         contrast of images and texts (`objectives.contrastive`)
    iic, ttc    contrast of a student's embedding with the projected embedding of its frozen teacher, same sample
    kd          relations of the student against the mixture E = w T_text + (1 - w) T_image, w in (0, 1) learned
    kd_image    relations of the image teacher against E; kd_text likewise: what w learns from

With a fusion encoder kd's relations are those of the pairs' fused [CLS], as in the paper; without one they are those of
the image embeddings and of the text embeddings and, on request, the symmetrised image-text matrix, and kd is the mean
of their distances to E. The temperature is fixed: a learned one can shrink every kd term to zero. With `mae`, kd_image
+ kd_text does not depend on w, since |a - b| w + |a - b| (1 - w) = |a - b|: with equal weights w then learns from kd
alone.

Legend: B pairs of this rank, D width.
"""

from dataclasses import dataclass

import torch

from vlscale.distributed import Ranks
from vlscale.objectives.sharded_relation_kl import sharded_relation_kl_loss
from vlscale.objectives.sharded_relation_match import sharded_relation_match_loss
from vlscale.sections import ObjectiveConfig


@dataclass(frozen=True)
class Mixture:
    """The teachers' relations, mixed, and how distances to them are taken over ranks. All rows unit rows."""

    teacher_text: torch.Tensor  # (B, D_text)
    teacher_image: torch.Tensor  # (B, D_image)
    text_share: torch.Tensor  # (), w
    objective: ObjectiveConfig
    ranks: Ranks
    comm: str

    def distance(self, rows: torch.Tensor, *, of_teacher: bool = False) -> torch.Tensor:
        """Distance of the relations of `rows` (B, D), a student's or a teacher's own, from the mixture, over the global
        batch. By `kl` a teacher's are at the mixture's temperature, so that it is 0 where the mixture is that teacher;
        the other distances have one temperature for both sides, the student's."""
        o = self.objective
        if o.relation_distance != "kl":
            return self._match(rows, [self.teacher_text, self.teacher_image], self._weights())
        return sharded_relation_kl_loss(
            rows,
            [self.teacher_text, self.teacher_image],
            teacher_weights=self._weights(),
            student_temperature=o.teacher_temperature if of_teacher else o.student_temperature,
            teacher_temperature=o.teacher_temperature,
            scope=o.relation_scope,
            relation=o.relation,
            ranks=self.ranks,
            comm=self.comm,
            impl=o.impl,
        )

    def cross_modal_distance(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Distance of the symmetrised image-text matrix from the mixture, `mae` or `mse`; (B, D) each.

        With a = (image + text) / 2 and b = (image - text) / 2, (image_i . text_j + image_j . text_i) / 2 is
        a_i . a_j - b_i . b_j: two relation matrices, the second moved to the mixture's side of the difference.
        """
        weights = torch.cat([torch.ones_like(self.text_share)[None], self._weights()])
        return self._match((image + text) / 2, [(image - text) / 2, self.teacher_text, self.teacher_image], weights)

    def _weights(self) -> torch.Tensor:
        """(w, 1 - w), of the text and the image teacher's relations."""
        return torch.stack([self.text_share, 1 - self.text_share])

    def _match(self, rows: torch.Tensor, others: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        return sharded_relation_match_loss(
            rows,
            others,
            weights,
            temperature=self.objective.student_temperature,
            metric=self.objective.relation_distance,
            ranks=self.ranks,
            comm=self.comm,
            impl=self.objective.impl,
        )
