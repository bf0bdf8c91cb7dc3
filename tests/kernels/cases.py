"""Embeddings of each regime, losses of named inputs, and the error budget that every implementation is held to."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlscale.kernels import contrastive_loss, relation_kl_loss, relation_match_loss, sigmoid_loss


@dataclass
class Case:
    """One problem: named float inputs, a loss of them, and the calls that share both."""

    inputs: dict[str, Tensor]
    loss: object

    def leaves(self, impl: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Fresh inputs cast to `dtype` (None: as they are), on the GPU for `triton` where there is one."""
        device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
        return {k: v.to(device, dtype or v.dtype, copy=True).requires_grad_() for k, v in self.inputs.items()}

    def run(self, impl: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The loss and every gradient, float64 on the CPU, of `leaves`."""
        leaves = self.leaves(impl, dtype)
        loss = self.loss(leaves, impl)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        found = dict(zip(leaves, grads, strict=True))
        return {"loss": loss.detach().cpu().double()} | {k: g.cpu().double() for k, g in found.items() if g is not None}


def embeddings(regime: str, n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two (n, d) sets of unit vectors, float64: random, cone (mean cosine 0.8), converged, near-equal."""
    generator = torch.Generator().manual_seed(seed)
    x, y, noise = torch.randn(3, n, d, generator=generator, dtype=torch.float64)
    if regime == "cone":
        axis = torch.randn(d, generator=generator, dtype=torch.float64)
        x, y = (F.normalize(v, dim=1) + 2 * F.normalize(axis, dim=0) for v in (x, y))
    elif regime == "converged":
        y = F.normalize(x, dim=1) + 0.2 * F.normalize(noise, dim=1)
    elif regime == "near_equal":
        y = F.normalize(x, dim=1) + 0.02 * F.normalize(noise, dim=1)
    return F.normalize(x, dim=1), F.normalize(y, dim=1)


def on(like: Tensor, pair_id: Tensor | None) -> Tensor | None:
    return None if pair_id is None else pair_id.to(like.device)


def contrastive_case(x: Tensor, y: Tensor, scale: float, pair_id: Tensor | None = None) -> Case:
    inputs = {"x": x, "y": y, "scale": torch.tensor(scale, dtype=torch.float64)}
    return Case(
        inputs, lambda v, impl: contrastive_loss(v["x"], v["y"], v["scale"], pair_id=on(v["x"], pair_id), impl=impl)
    )


def sigmoid_case(x: Tensor, y: Tensor, scale: float, pair_id: Tensor | None = None, bias: float = -10.0) -> Case:
    inputs = {"x": x, "y": y} | {k: torch.tensor(v, dtype=torch.float64) for k, v in (("scale", scale), ("bias", bias))}

    def loss(v, impl):
        return sigmoid_loss(v["x"], v["y"], v["scale"], v["bias"], pair_id=on(v["x"], pair_id), impl=impl)

    return Case(inputs, loss)


def kl_case(x: Tensor, teachers: list[Tensor], weights: list[float], tau: tuple[float, float], **settings) -> Case:
    inputs = {"x": x, **{f"z{k}": z for k, z in enumerate(teachers)}}
    inputs |= {"w": torch.tensor(weights, dtype=torch.float64)}
    inputs |= {k: torch.tensor(t, dtype=torch.float64) for k, t in zip(("tau_s", "tau_t"), tau, strict=True)}

    def loss(v, impl):
        return relation_kl_loss(
            v["x"],
            [v[f"z{k}"] for k in range(len(teachers))],
            teacher_weights=v["w"],
            student_temperature=v["tau_s"],
            teacher_temperature=v["tau_t"],
            impl=impl,
            **settings,
        )

    return Case(inputs, loss)


def match_case(x: Tensor, teachers: list[Tensor], weights: list[float], tau: float, metric: str) -> Case:
    inputs = {"x": x, **{f"z{k}": z for k, z in enumerate(teachers)}}
    inputs |= {"w": torch.tensor(weights, dtype=torch.float64), "tau": torch.tensor(tau, dtype=torch.float64)}

    def loss(v, impl):
        embs = [v[f"z{k}"] for k in range(len(teachers))]
        return relation_match_loss(v["x"], embs, v["w"], temperature=v["tau"], metric=metric, impl=impl)

    return Case(inputs, loss)


def relative(got: Tensor, truth: Tensor) -> float:
    """Frobenius error over the truth's norm: free of scale, so a zero gradient has error 1."""
    return ((got - truth).norm() / truth.norm()).item()


def gradients_of(case: Case, learned: list[str], impl: str, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Gradients of the inputs `learned` where nothing else learns, and where everything does."""
    found = []
    for wanted in (learned, list(case.inputs)):
        values = {name: value.requires_grad_(name in wanted) for name, value in case.leaves(impl, dtype).items()}
        found.append(torch.autograd.grad(case.loss(values, impl), [values[name] for name in learned]))
    return found


def check_budget(case: Case, impl: str, dtype: torch.dtype, *, cap: float | None = None, floor: float = 4e-7) -> None:
    """Every output within twice the error of dense torch, truth being float64 of the same rounded inputs.

    `floor`: errors of a few ulp are accepted although dense torch may have less by chance; a scalar is one number and
    its gradient a sum that cancels, so chance is larger there.
    """
    rounded = Case({k: v.to(dtype).double() for k, v in case.inputs.items()}, case.loss)
    truth, dense, got = rounded.run("reference"), rounded.run("reference", dtype), rounded.run(impl, dtype)
    assert got.keys() == truth.keys()
    for name, exact in truth.items():
        least = 10 * floor if exact.dim() == 0 and name != "loss" else floor
        error, budget = relative(got[name], exact), max(2 * relative(dense[name], exact), least)
        assert error <= budget, f"{name}: error {error:.2e} over the budget {budget:.2e}"
        assert cap is None or error <= cap, f"{name}: error {error:.2e} over the cap {cap:.0e}"
