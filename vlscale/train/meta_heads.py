"""CoVLR's meta step over the projections, exact to second order (arXiv 2304.07567, the coordinated objective).

    g = grad of L_c with respect to the projections P, averaged over ranks
    P' = P - a g
    minimise L_c(P) + L_r(P'), with the gradient of L_r through g

The towers run once: their features do not depend on P, nor does what a fusion encoder makes of their tokens. The
gradient of the gradient goes through the contrastive loss's own double backward (linear memory), and through
collectives that are differentiable twice.

In bf16 P is the rounded weight that the forward used, so that L_c, g and P' belong to the same parameters. P' is a
float32 tensor of the graph and never rounded to bf16: all of the shift is realised, so no cosine of it is logged.

Legend: B pairs of this rank.
"""

from dataclasses import dataclass

import torch

from vlscale.data.batch import Batch
from vlscale.distributed import mean_over_ranks
from vlscale.models.dual_encoder import Embeddings, Features, project
from vlscale.models.rows import wide
from vlscale.objectives.total import Embedded, consistency_loss, relations_loss
from vlscale.train.inner_rate import inner_rate
from vlscale.train.step import StepParts, embedded, finish, forward_inputs


@dataclass
class _Towers:
    """A batch after the towers: what is left is a function of the two projections alone."""

    features: Features
    teachers: tuple[torch.Tensor | None, torch.Tensor | None]
    batch: Batch

    def rows(self, weights: tuple[torch.Tensor, torch.Tensor]) -> Embedded:
        f = self.features
        image, text = project(f.image, weights[0]), project(f.text, weights[1])
        out = Embeddings(image, text, f.logit_scale, f.logit_bias, f.teacher, f.fused)
        return embedded(out, self.teachers, self.batch)


def heads_step(parts: StepParts, batch: Batch, test_batch: Batch) -> dict[str, float]:
    """`meta.mode=heads`: about the cost of a joint step with `test_batch` the same batch, twice that with the next."""
    trained = _towers(parts, batch)
    features = trained.features
    # Views: a gradient may be taken of these without touching the hooks that the engine has on its outputs. At least
    # float32, so that a shift is never lost in the rounding of a bf16 weight.
    weights = tuple(wide(weight).view(weight.shape) for weight in (features.visual_weight, features.text_weight))
    rows = trained.rows(weights)
    consistency, metrics = consistency_loss(rows, parts.objective, parts.ranks, comm="gather")  # differentiable twice
    gradient = torch.autograd.grad(consistency, weights, create_graph=True, allow_unused=True, materialize_grads=True)
    gradient = tuple(mean_over_ranks(part, parts.ranks) for part in gradient)
    norm = _norm(gradient)
    rate = inner_rate(parts.meta, _norm(weights), norm)
    fast = tuple(weight - rate * part for weight, part in zip(weights, gradient, strict=True))
    tested = trained if test_batch is batch else _towers(parts, test_batch)
    relations, more = relations_loss(tested.rows(fast), parts.objective, parts.ranks, parts.comm)
    loss = consistency + relations
    parts.engine.backward(loss)
    return finish(parts, loss, metrics | more | {"inner_lr": rate, "inner_grad_norm": norm}, rows)


def _towers(parts: StepParts, batch: Batch) -> _Towers:
    teachers = parts.inputs.teacher_rows(batch, parts.objective.teachers_seen)
    return _Towers(parts.engine(**forward_inputs(parts, batch, teachers), split_heads=True), teachers, batch)


def _norm(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.stack([tensor.detach().norm() for tensor in tensors]).norm()
