"""The gradient of L_c(theta) + L_r(theta - a grad L_c(theta)) by autograd's create_graph: what meta steps are to be.

Nothing of the steps is used: parameters are functional, the losses are the dense references.
"""

from dataclasses import replace

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlscale.data.batch import Batch
from vlscale.distributed import Ranks
from vlscale.objectives.total import consistency_loss, relations_loss
from vlscale.train.step import StepParts, embed

HEADS = ("visual_projection.weight", "text_projection.weight")


def reference_loss(
    module: torch.nn.Module, parts: StepParts, batch: Batch, test_batch: Batch, mode: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, differentiable to second order where `mode` is, and the parameters it was made of.

    first_order: theta' is a constant shift of theta.
    """
    learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
    moved = {name: p for name, p in learned.items() if mode != "heads" or name in HEADS}
    dense = replace(parts, objective=parts.objective.model_copy(update={"impl": "reference"}), chunk_size=None)

    def run(parameters, of):
        return embed(lambda **inputs: functional_call(module, parameters, (), inputs), dense, of)

    with sdpa_kernel(SDPBackend.MATH):  # the only attention that is differentiable twice
        consistency, _ = consistency_loss(run(learned, batch), dense.objective, Ranks())
        if mode == "joint":
            relations, _ = relations_loss(run(learned, batch), dense.objective, Ranks())
            return consistency + relations, learned
        second = mode != "first_order"
        found = torch.autograd.grad(
            consistency, list(moved.values()), create_graph=second, retain_graph=True, allow_unused=True
        )
        gradient = {name: grad for name, grad in zip(moved, found, strict=True) if grad is not None}
        norm = torch.stack([grad.detach().norm() for grad in gradient.values()]).norm()
        length = torch.stack([p.detach().norm() for p in moved.values()]).norm()
        unit = parts.meta.inner_lr_unit
        rate = parts.meta.rate * {"absolute": 1.0, "gradient": 1 / norm, "parameter": length / norm}[unit]
        fast = {name: learned[name] - rate * grad for name, grad in gradient.items()}
        relations, _ = relations_loss(run(learned | fast, test_batch), dense.objective, Ranks())
        return consistency + relations, learned
