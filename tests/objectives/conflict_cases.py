"""What the ranks of a test run: gradients under `objective.conflict`, and dense ones by its own equations. No tests."""

import torch
import torch.nn.functional as F
from torch import nn

from vlscale.distributed import Ranks
from vlscale.objectives.total import Embedded, consistency_loss, relations_loss, total_loss
from vlscale.sections import ObjectiveConfig

N, FEATURES, D = 24, 10, 6
OBJECTIVES = [
    {"name": "covlr", "relation_weight_image": 2.0, "relation_weight_text": 0.7},
    {"name": "covlr", "relation_weight_image": 0.0, "relation_weight_text": 1.5},
    {"name": "rvlr", "iic_weight": 0, "ttc_weight": 0, "relation_distance": "kl"},
    {"name": "contrastive"},
]
RULES = ("keep", "scale", "project")


class Small(nn.Module):
    """Two projections, with teachers that want each modality away from the other: gradients that conflict."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.image, self.text = (nn.Parameter(torch.randn(FEATURES, D, generator=draw).double()) for _ in range(2))
        self.scale, self.share = nn.Parameter(torch.tensor(3.0).double()), nn.Parameter(torch.tensor(0.4).double())

    def rows(self, part: slice) -> Embedded:
        draw, device = torch.Generator().manual_seed(5), self.image.device
        features = torch.randn(2, N, FEATURES, generator=draw).double()[:, part].to(device)
        unit = [F.normalize(each, dim=1) for each in (features[0] @ self.image, features[1] @ self.text)]
        teachers = [F.normalize(own - 0.3 * other, dim=1).detach() for own, other in (unit, unit[::-1])]
        ids = torch.arange(N, device=device)[part]
        projected = {"projected_teacher_image": unit[0].detach(), "projected_teacher_text": unit[1].detach()}
        return Embedded(
            *unit, self.scale, None, ids, teacher_image=teachers[0], teacher_text=teachers[1], text_share=self.share,
            **projected,
        )  # fmt: skip


def objective_of(case: int, rule: str) -> ObjectiveConfig:
    return ObjectiveConfig(**OBJECTIVES[case], conflict=rule)


def gradients(case: int, rule: str, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Of every parameter, averaged as an engine does; with the loss and the metrics."""
    model, b = Small().to(ranks.device), N // ranks.size
    loss, metrics = total_loss(model.rows(slice(ranks.rank * b, (ranks.rank + 1) * b)), objective_of(case, rule), ranks)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {name: ranks.sum(grad) / ranks.size for name, grad in found.items()}
    return found | {"loss": loss.detach()} | {name: own for name, own in metrics.items() if "conflict" in name}


def expected(case: int, rule: str) -> dict[str, torch.Tensor]:
    """One process, by the table: the changed gradients are put into the embeddings by hand."""
    model, objective = Small(), objective_of(case, rule)
    rows = model.rows(slice(0, N))
    consistency, relations = (part(rows, objective, Ranks())[0] for part in (consistency_loss, relations_loss))
    (consistency + relations).backward(retain_graph=True)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found["loss"] = (consistency + relations).detach()
    if not relations.requires_grad or rule == "keep":
        return found
    for name, x in (("image", rows.image), ("text", rows.text)):
        how = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        g, r = (torch.autograd.grad(loss, x, **how)[0] for loss in (consistency, relations))
        cosine = F.cosine_similarity(g.flatten(), r.flatten(), 0, eps=1e-30)
        new = (1 + min(cosine, 0)) * r if rule == "scale" else r - (g * r).sum().clamp(max=0) / (g * g).sum() * g
        (weight,) = torch.autograd.grad(x, getattr(model, name), new - r, retain_graph=True)
        found[name] += weight
        found[f"conflict_{name}"] = cosine
    return found


def on_rank(ranks: Ranks) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
    return {(case, rule): gradients(case, rule, ranks) for case in range(len(OBJECTIVES)) for rule in RULES}
