"""Terms that the package does not have, tried in the study beside those that it has: a method's `outside`.

`confident` is CoVLR's relation KL with each row weighted by how sure its teacher is of it. `gap` adds the squared
distance between the means of both modalities. One process and dense, for batches of a few hundred pairs.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from vlscale.distributed import Ranks
from vlscale.objectives import total
from vlscale.objectives.contrastive import Metrics
from vlscale.sections import ObjectiveConfig
from vlscale.train import plan
from vlscale.train.loop import Job


def confident_relation(
    student_emb: torch.Tensor,
    teacher_emb: torch.Tensor,
    objective: ObjectiveConfig,
    ranks: Ranks,
    *,
    comm: str,
    name: str,
) -> tuple[torch.Tensor, Metrics]:
    """Row KL of `teacher_emb` (B, D_teacher) from `student_emb` (B, D), a weighted mean. A row's weight is
    1 - entropy / log(B - 1) of the teacher's: 0 where all others are alike to it, 1 where there is one neighbour."""
    teacher = _log_rows(teacher_emb.detach(), objective.teacher_temperature)
    student = _log_rows(student_emb, objective.student_temperature)
    sure = 1 + (teacher.exp() * teacher).sum(1) / math.log(len(teacher) - 1)
    loss = (sure * (teacher.exp() * (teacher - student)).sum(1)).sum() / sure.sum()
    return loss, {name: loss.detach()}


def _log_rows(rows: torch.Tensor, temperature: float) -> torch.Tensor:
    """(B, B - 1) log softmax of each row's cosines with the others."""
    apart = ~torch.eye(len(rows), dtype=torch.bool)
    return ((rows @ rows.T)[apart].view(len(rows), -1) / temperature).log_softmax(1)


def consistency_without_gap(
    rows: total.Embedded, objective: ObjectiveConfig, ranks: Ranks, comm: str = "auto"
) -> tuple[torch.Tensor, Metrics]:
    loss, metrics = _CONSISTENCY(rows, objective, ranks, comm)
    gap = (rows.image.mean(0) - rows.text.mean(0)).square().sum()
    return loss + gap, metrics | {"gap": gap.detach()}


_CONSISTENCY = total.consistency_loss
TERMS = {
    "confident": {"relation": confident_relation},
    "gap": {"consistency_loss": consistency_without_gap},
}


@contextmanager
def outside(terms: dict[str, str]) -> Iterator[None]:
    """Runs whose name is in `terms` (name of the run to name of the term) are trained with that term meanwhile."""
    train_run = plan.train_run

    def with_terms(job: Job, *, resume: bool) -> None:
        with ExitStack() as stack:
            for place, own in TERMS.get(terms.get(job.folder.name), {}).items():
                stack.enter_context(patch.object(total, place, own))
            train_run(job, resume=resume)

    with patch.object(plan, "train_run", with_terms):
        yield
