"""What happens to relations while training: numbers of a fixed probe batch, in metrics.jsonl as `probe_...`.

The probe is the first global batch of the run's stream, the same after a resume and at any number of ranks; what
compares all rows with all looks at its first PROBE. Towers are in evaluation mode, and nothing is learned from it.

    probe_gradient_cosine           of consistency's and relations' gradients: below 0 they conflict. To the embeddings;
                                    where relations are those of fused pairs, which embeddings do not reach, to the
                                    learned parameters of towers and fusion encoder
    probe_modality_gap              distance of the mean image embedding from the mean text embedding
    probe_entropy_image             entropy of the student's relations, row by row, over its maximum; 1: all alike
    probe_teacher_entropy_image     the teacher's
    probe_rank_correlation_image    Spearman, of the student's with the teacher's relations
    probe_relation_change_image     mean |difference| of the student's and the teacher's cosines
    probe_image_strength            share of the text's change in both changes: above 1/2, text gives way to the image
and likewise `_text`. With RVLR and a fusion encoder also `_fused`, of the pairs' fused [CLS]; their teacher is then the
mixture E = w T_text + (1 - w) T_image that kd holds them to, while `_image` and `_text` remain those of the embeddings.

The gradients to parameters cost two forwards and backwards, and two copies of these parameters on each rank at every
ZeRO stage; all else is one forward.

Legend: W ranks, b pairs of this rank, n probe rows.
"""

from dataclasses import replace

import torch

from vlscale.data.batch import Batch
from vlscale.distributed import Ranks
from vlscale.evaluate.spearman import spearman
from vlscale.models.teachers import relation_entropy, relations_of
from vlscale.objectives.total import Embedded, consistency_loss, relations_loss
from vlscale.sections import ObjectiveConfig
from vlscale.train.gradients import Gradients
from vlscale.train.step import StepParts, embed

PROBE = 512
SHARED = ("vision_model.", "text_model.", "fusion.body.", "fusion.text_projection.", "fusion.vision_projection.")


class Diagnostics:
    """`every`: steps between two looks; None: never."""

    def __init__(self, parts: StepParts, probe: Batch | None, every: int | None):
        self.parts, self.probe, self.every = parts, probe, every

    def due(self, step: int) -> bool:
        return self.every is not None and (step == 1 or step % self.every == 0)

    def run(self) -> dict[str, float]:
        """On all ranks together; the model is left in training mode."""
        parts, module = self.parts, self.parts.engine.module
        at, objective = parts.at(0, 0), parts.objective
        module.eval()
        with torch.no_grad():
            rows = embed(parts.engine.plain, at, self.probe)
            teachers = parts.inputs.teacher_rows(self.probe)  # both, also one that training does not look at
        fused = objective.name == "rvlr" and rows.fused is not None
        values = {}
        if objective.distils:
            values["gradient_cosine"] = parameter_cosine(at, self.probe) if fused else gradient_cosine(rows, parts)
        module.train()
        students = [first_rows(own, PROBE, parts.ranks) for own in (rows.image, rows.text)]
        teachers = [own if own is None else first_rows(own, PROBE, parts.ranks) for own in teachers]
        values |= relation_facts(*students, *teachers, objective)
        if fused and None not in (rows.text_share, *teachers):
            values |= fused_facts(first_rows(rows.fused, PROBE, parts.ranks), *teachers, rows.text_share, objective)
        return {f"probe_{name}": value for name, value in values.items()}


def gradient_cosine(rows: Embedded, parts: StepParts) -> float:
    """Of the gradients to all ranks' embeddings; 0 where one of them vanishes."""
    image, text = (own.detach().requires_grad_() for own in (rows.image, rows.text))
    rows = replace(rows, image=image, text=text)
    gradients = []
    for part in (consistency_loss, relations_loss):
        loss, _ = part(rows, parts.objective, parts.ranks, parts.comm)
        loss = loss + 0 * (image.sum() + text.sum())  # a part may have no weight, or look at one modality alone
        gradients.append(torch.cat([own.float().ravel() for own in torch.autograd.grad(loss, (image, text))]))
    first, second = gradients
    products = parts.ranks.sum(torch.stack([first @ second, first @ first, second @ second]))
    length = products[1].sqrt() * products[2].sqrt()
    return float(products[0] / length) if length > 0 else 0.0


def parameter_cosine(parts: StepParts, batch: Batch) -> float:
    """Of the global batch's gradients to the learned parameters of SHARED, averaged over ranks; 0 where one of them
    vanishes, or where none of these parameters learns."""
    named = parts.engine.module.named_parameters()
    learned = [parameter for name, parameter in named if parameter.requires_grad and name.startswith(SHARED)]
    if not learned:
        return 0.0
    gradients = []
    for part in (consistency_loss, relations_loss):
        rows = embed(parts.engine.plain, parts, batch)
        loss, _ = part(rows, parts.objective, parts.ranks, parts.comm)
        outputs = (rows.image, rows.text, rows.fused, rows.matching, rows.masked)
        loss = loss + sum(0 * own.sum() for own in outputs if own is not None)  # a part may look at one of them alone
        gradients.append(Gradients.of(loss, learned, parts.ranks))
    first, second = gradients
    length, other = float(first.norm()), float(second.norm())
    if not length * other > 0:
        return 0.0
    both = float(first.add_(second, length / other).norm())  # |u + v|^2 = 2 + 2 cos for unit vectors
    return (both / length) ** 2 / 2 - 1


def relation_facts(
    image: torch.Tensor,
    text: torch.Tensor,
    teacher_image: torch.Tensor | None,
    teacher_text: torch.Tensor | None,
    objective: ObjectiveConfig,
) -> dict[str, float]:
    """All (n, D) unit rows of the same samples; the relation numbers of the table above."""
    values = {"modality_gap": float((image.mean(0) - text.mean(0)).norm())}
    changes = {}
    for name, student, teacher in (("image", image, teacher_image), ("text", text, teacher_text)):
        values |= _held(name, relations_of(student), None if teacher is None else relations_of(teacher), objective)
        if teacher is not None:
            changes[name] = values[f"relation_change_{name}"]
    if changes and sum(changes.values()) > 0:
        values["image_strength"] = changes["text"] / sum(changes.values())
    return values


def fused_facts(
    fused: torch.Tensor,
    teacher_image: torch.Tensor,
    teacher_text: torch.Tensor,
    text_share: torch.Tensor,
    objective: ObjectiveConfig,
) -> dict[str, float]:
    """All (n, D) unit rows of the same samples, and w (): the relation numbers of fused pairs and of the mixture."""
    w = float(text_share)
    mixture = w * relations_of(teacher_text) + (1 - w) * relations_of(teacher_image)
    return _held("fused", relations_of(fused), mixture, objective)


def _held(
    name: str, relations: torch.Tensor, target: torch.Tensor | None, objective: ObjectiveConfig
) -> dict[str, float]:
    """A student's relations (n, n - 1), and where they are held to a target, how near they are to it."""
    values = {f"entropy_{name}": relation_entropy(relations / objective.student_temperature)}
    if target is not None:
        values[f"teacher_entropy_{name}"] = relation_entropy(target / objective.temperature_of_teachers)
        values[f"rank_correlation_{name}"] = _rank_correlation(relations, target)
        values[f"relation_change_{name}"] = float((relations - target).abs().mean())
    return values


def _rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return spearman(*(values.ravel().double().numpy() for values in (first, second)))


def first_rows(rows: torch.Tensor, count: int, ranks: Ranks) -> torch.Tensor:
    """The first (n, D) rows of the global batch, at most `count`, on every rank's CPU in float32. `rows` (b, D) are
    this rank's, which hold the places from b times its number on; only those asked for are added up over ranks."""
    start, n = ranks.rank * len(rows), min(count, ranks.size * len(rows))
    everyone = torch.zeros(n, rows.shape[1], device=rows.device)
    own = rows[: max(0, n - start)].detach().float()
    everyone[start : start + len(own)] = own
    return ranks.sum(everyone).cpu()
