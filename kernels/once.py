"""Backward of ops that make their gradients in the forward pass: multiply what was saved, and refuse more.

The saved gradients know nothing of their own dependence on the inputs, so a second derivative through them would be
silently wrong. `scale_saved` goes through an op that has no gradient of its own and that takes the inputs along:
autograd then raises instead.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("vlscale::scale_saved", mutates_args=())
def scale_op(grad: Tensor, saved: Tensor, inputs: list[Tensor]) -> Tensor:
    """grad * saved, in the dtype of inputs[0]."""
    return (saved * grad).to(inputs[0].dtype)


@scale_op.register_fake
def _(grad, saved, inputs):
    return torch.empty_like(saved, dtype=inputs[0].dtype)


def scale_saved(
    grad: Tensor, saved: Sequence[Tensor], inputs: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Each saved gradient times `grad` (0-d), None where not needed; differentiable no further."""
    inputs = list(inputs)
    return tuple(
        scale_op(grad, gradient, [inputs[k], *inputs]) if needed[k] else None for k, gradient in enumerate(saved)
    )
