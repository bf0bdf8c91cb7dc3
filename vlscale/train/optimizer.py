"""The optimizer and its parameter groups: no weight decay on norms, biases and scalars."""

import torch
from torch import nn

from vlscale.sections import OptimConfig


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    learned = [p for p in model.parameters() if p.requires_grad]
    if not learned:
        raise ValueError("model.locked leaves nothing to learn; unlock a tower")
    groups = [
        {"params": [p for p in learned if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
