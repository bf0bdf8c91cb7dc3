"""An engine in plain PyTorch for one process: what the steps ask of DeepSpeed's, in any dtype, without an update."""

import torch
from torch import nn

from vlscale.distributed import Ranks
from vlscale.train.gradients import Gradients, Held, moving, parameter_norm


class PlainEngine:
    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self.module, self.dtype = module, dtype
        self.learned = [p for p in module.parameters() if p.requires_grad]
        self._held = [Held(p.detach().view(-1), 0, p.detach().view(-1).clone) for p in self.learned]

    def __call__(self, **inputs):
        return self.module(**inputs)

    plain = __call__

    def backward(self, loss: torch.Tensor, change=None) -> None:
        found = torch.autograd.grad(loss, self.learned, allow_unused=True)
        for index, (parameter, grad) in enumerate(zip(self.learned, found, strict=True)):
            parameter.grad = grad if grad is None or change is None else change(index, grad)

    def gradients(self, loss: torch.Tensor) -> Gradients:
        return Gradients.of(loss, self.learned, Ranks())

    def moving(self):
        return moving(self._held, None)

    def parameter_norm(self) -> torch.Tensor:
        return parameter_norm(self._held, None, torch.device("cpu"))

    def local_norm(self) -> torch.Tensor:
        return self.flat_gradient().float().norm()

    def step(self) -> float:
        return 0.0

    def flat_gradient(self) -> torch.Tensor:
        return torch.cat([torch.zeros_like(p).ravel() if p.grad is None else p.grad.ravel() for p in self.learned])
