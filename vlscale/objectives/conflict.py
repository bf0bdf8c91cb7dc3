"""What becomes of relations that pull embeddings against consistency: `objective.conflict`.

For the embeddings x of one modality, over all ranks, with g and r the gradients of consistency and of relations to x,
and c = <g, r> / (|g| |r|), the relations' gradient becomes

    keep      r
    scale     (1 + min(c, 0)) r                   the less, the more the two conflict
    project   r - min(<g, r>, 0) / |g|^2 g        nothing of it against consistency (PCGrad, arXiv 2001.06782, one way)

The losses compute these gradients in any case, so all that is added is one sum of six numbers over the ranks. What
relations give to anything else, as to RVLR's mixture, is left as it is.

Legend: B pairs of this rank, D width.
"""

from typing import Literal

import torch

from vlscale.distributed import Ranks
from vlscale.objectives.contrastive import Metrics

Rule = Literal["keep", "scale", "project"]


def resolved(
    consistency: torch.Tensor, relations: torch.Tensor, embeddings: dict[str, torch.Tensor], rule: Rule, ranks: Ranks
) -> tuple[torch.Tensor, Metrics]:
    """The sum of both losses, with the gradient that `rule` says. `embeddings`: (B, D) each, by modality, which both
    losses were computed from. The metrics are the modalities' cosines c."""
    inputs = [rows for rows in embeddings.values() if rows.requires_grad]
    if rule == "keep" or not inputs or not (consistency.requires_grad and relations.requires_grad):
        return consistency + relations, {}
    how = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    first, second = (torch.autograd.grad(loss, inputs, **how) for loss in (consistency, relations))
    products = ranks.sum(torch.stack([_products(g, r) for g, r in zip(first, second, strict=True)]))
    correction, metrics = consistency.new_zeros(()), {}
    names = [name for name, rows in embeddings.items() if rows.requires_grad]
    for name, x, g, r, (both, of_g, of_r) in zip(names, inputs, first, second, products, strict=True):
        length = (of_g * of_r).sqrt()
        cosine = torch.where(length > 0, both / length.clamp(min=torch.finfo(length.dtype).tiny), 0.0)
        metrics[f"conflict_{name}"] = cosine
        if rule == "scale":
            change = cosine.clamp(max=0) * r
        else:
            change = torch.where(of_g > 0, -both.clamp(max=0) / of_g.clamp(min=torch.finfo(of_g.dtype).tiny), 0.0) * g
        correction = correction + (change.to(x.dtype) * x).sum()
    return consistency + relations + (correction - correction.detach()), metrics


def _products(g: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """<g, r>, <g, g>, <r, r>, in float32 at least."""
    wide = torch.promote_types(g.dtype, torch.float32)
    g, r = g.to(wide).flatten(), r.to(wide).flatten()
    return torch.stack([g @ r, g @ g, r @ r])
