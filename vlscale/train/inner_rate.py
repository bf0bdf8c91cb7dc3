"""The rate of the inner update theta' = theta - a g, in the unit that `meta.inner_lr_unit` names."""

import torch

from vlscale.sections import MetaConfig


def inner_rate(meta: MetaConfig, parameter_norm: torch.Tensor, gradient_norm: torch.Tensor) -> torch.Tensor:
    """a (), from the norms () of what is shifted and of its gradient; 0 where the gradient is zero. It is a number to
    the steps that differentiate: no gradient goes through the norms."""
    if meta.inner_lr_unit == "absolute":
        return torch.full_like(gradient_norm, meta.rate)
    length = meta.rate * (parameter_norm if meta.inner_lr_unit == "parameter" else 1.0)
    return torch.where(gradient_norm > 0, length / gradient_norm.clamp(min=torch.finfo(gradient_norm.dtype).tiny), 0.0)
