"""What `vlscale bench kernels` compares: our kernels, dense torch and other libraries, family by family.

An entry computes one loss of a problem. Peers are imported when asked for; one that cannot run here says why. N pairs,
D width; u = 2 N^2 D is one product of all pairs. A family's `forward` and `both` are the fewest u that the loss, and
the loss with its gradients, can be computed with (recomputing; relations by their upper triangle).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from vlscale.kernels import (
    contrastive_loss,
    relation_kl_loss,
    relation_match_loss,
    retrieval_ranks,
    sigmoid_loss,
    topk_neighbors,
)

QUERIES = 4096  # of a retrieval problem, whatever the gallery
NEIGHBOURS = 10
BIAS = -10.0


class Missing(Exception):
    """Why an entry cannot run here."""


@dataclass(frozen=True)
class Problem:
    """Inputs of one point; relations are divided by temperature, which is 1 / scale."""

    x: Tensor  # (N, D)
    y: Tensor  # (N, D) the other modality, the teacher, or the gallery
    scale: Tensor  # 0-d float32 or float64
    bias: Tensor  # 0-d, like scale
    temperature: float

    def leaves(self) -> dict[str, Tensor]:
        named = {"d image": self.x, "d text": self.y, "d scale": self.scale, "d bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def double(self) -> "Problem":
        """The same numbers in float64, on the same device."""
        given = (self.x, self.y, self.scale, self.bias)
        return Problem(*(t.detach().double().requires_grad_(t.requires_grad) for t in given), self.temperature)


Loss = Callable[[Problem], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Family:
    trained: tuple[bool, bool, bool, bool]  # image, text, scale, bias
    forward: Callable[[int, int], float]  # the fewest operations, of (N, D)
    both: Callable[[int, int], float] | None
    truth: Loss | None
    together: bool = False  # gradients are made with the loss, so a backward pass alone has no count of its own


@dataclass(frozen=True)
class Entry:
    family: str
    name: str
    load: Callable[[torch.device], Loss]
    matrices: int = 0  # float32 N x N matrices alive at the worst moment
    truth: Loss | None = None  # where a peer's loss is not the family's


def units(count: float) -> Callable[[int, int], float]:
    return lambda n, d: count * 2 * n * n * d


def queries_times(n: int, d: int) -> float:
    return 2 * min(n, QUERIES) * n * d


def make_problem(
    family: str, n: int, d: int, scale: float, dtype: torch.dtype, device: torch.device, regime: str = "random"
) -> Problem:
    """Unit vectors: random; on a cone (mean cosine 0.8, as at initialisation); or converged pairs."""
    generator = torch.Generator(device).manual_seed(n + d)
    draw = partial(torch.randn, n, d, generator=generator, device=device)
    x, y = draw(), draw()
    if regime == "cone":
        axis = 2 * F.normalize(torch.randn(d, generator=generator, device=device), dim=0)
        x, y = F.normalize(x, dim=1) + axis, F.normalize(y, dim=1) + axis
    elif regime == "converged":
        y = F.normalize(x, dim=1) + 0.2 * F.normalize(y, dim=1)
    trained = FAMILIES[family].trained
    embeddings = [F.normalize(v, dim=1).to(dtype) for v in (x, y)]
    scalars = [torch.tensor(v, device=device) for v in (scale, BIAS)]
    tensors = (t.requires_grad_(wanted) for t, wanted in zip([*embeddings, *scalars], trained, strict=True))
    return Problem(*tensors, temperature=1 / scale)


def ours(name: str, impl: str) -> Loss:
    return {
        "contrastive": lambda p: contrastive_loss(p.x, p.y, p.scale, impl=impl),
        "contrastive_kept": lambda p: contrastive_loss(p.x, p.y, p.scale, keep_products=True, impl=impl),
        "contrastive_ids": lambda p: contrastive_loss(p.x, p.y, p.scale, pair_id=shared_ids(p), impl=impl),
        "contrastive_twice": penalty(lambda p: contrastive_loss(p.x, p.y, p.scale, impl=impl)),
        "sigmoid": lambda p: sigmoid_loss(p.x, p.y, p.scale, p.bias, impl=impl),
        "relation_kl": lambda p: ours_kl(p, impl, [p.y]),
        "relation_kl_matrix": lambda p: ours_kl(p, impl, [p.y], scope="matrix"),
        "relation_kl_euclidean": lambda p: ours_kl(p, impl, [p.y], relation="euclidean"),
        "relation_kl_mixture": lambda p: ours_kl(p, impl, two_teachers(p), teacher_weights=learned_weights(p)),
        "relation_mae": lambda p: relation_match_loss(p.x, [p.y], temperature=p.temperature, metric="mae", impl=impl),
        "relation_mse": lambda p: relation_match_loss(p.x, [p.y], temperature=p.temperature, metric="mse", impl=impl),
        "relation_wasserstein": lambda p: relation_match_loss(
            p.x, [p.y], temperature=p.temperature, metric="wasserstein", impl=impl
        ),
        "neighbours": lambda p: topk_neighbors(p.x[:QUERIES], p.y, NEIGHBOURS, impl=impl),
        "ranks": lambda p: retrieval_ranks(p.x[:QUERIES], p.y, own_index(p), impl=impl),
    }[name]


def ours_kl(p: Problem, impl: str, teachers: list[Tensor], **settings) -> Tensor:
    taus = {"student_temperature": p.temperature, "teacher_temperature": p.temperature}
    return relation_kl_loss(p.x, teachers, **taus, **settings, impl=impl)


def shared_ids(p: Problem) -> Tensor:
    """Two captions a picture: every id twice, side by side."""
    return torch.arange(len(p.x), device=p.x.device) // 2


def penalty(loss: Loss) -> Loss:
    """Sum of squares of a loss's gradients in the embeddings, so that its own gradient is a second derivative."""

    def squared(p: Problem) -> Tensor:
        with torch.enable_grad():
            grads = torch.autograd.grad(loss(p), (p.x, p.y), create_graph=True)
            return sum(g.to(p.scale.dtype).square().sum() for g in grads)

    return squared


def two_teachers(p: Problem) -> list[Tensor]:
    """The teacher, and one that sees its pairs in another order."""
    return [p.y, p.y.flip(0)]


def learned_weights(p: Problem) -> Tensor:
    """(0.5, 0.5); the first one's gradient, halved and over the scale, is the scale's."""
    return torch.stack([p.scale / p.scale.detach(), torch.ones_like(p.scale)]) / 2


def own_index(p: Problem) -> Tensor:
    return torch.arange(min(len(p.x), QUERIES), device=p.x.device)[:, None]


def dense_contrastive(p: Problem) -> Tensor:
    logits = p.scale * (p.x @ p.y.T).to(p.scale.dtype)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def dense_contrastive_ids(p: Problem) -> Tensor:
    logits, ids = p.scale * (p.x @ p.y.T).to(p.scale.dtype), shared_ids(p)
    positive = (ids[:, None] == ids).to(logits.dtype)
    target = positive / positive.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def two_products(p: Problem) -> Tensor:
    """open_clip's loss of one rank: each direction has its own product and its own gradients."""
    labels = torch.arange(len(p.x), device=p.x.device)
    per_image, per_text = p.scale * p.x @ p.y.T, p.scale * p.y @ p.x.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def dense_sigmoid(p: Problem) -> Tensor:
    logits = p.scale * (p.x @ p.y.T).to(p.scale.dtype) + p.bias
    sign = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def dense_relations(p: Problem, own: float) -> tuple[Tensor, Tensor]:
    """Student's and teacher's relations over temperature; `own` stands on the diagonals."""
    s, t = ((v @ v.T).to(p.scale.dtype) / p.temperature for v in (p.x, p.y))
    mask = torch.eye(len(s), dtype=torch.bool, device=s.device)
    return s.masked_fill(mask, own), t.masked_fill(mask, own)


def divergence(s: Tensor, t: Tensor) -> Tensor:
    """Of rows of logits, the mean."""
    return F.kl_div(F.log_softmax(s, 1), F.log_softmax(t, 1), reduction="batchmean", log_target=True)


def dense_relation_kl(p: Problem) -> Tensor:
    return divergence(*dense_relations(p, -1e4))


def dense_matrix_kl(p: Problem) -> Tensor:
    return divergence(*(v.reshape(1, -1) for v in dense_relations(p, -1e4)))


def dense_euclidean_kl(p: Problem) -> Tensor:
    s, t = (-torch.cdist(v, v) / p.temperature for v in (p.x.to(p.scale.dtype), p.y.to(p.scale.dtype)))
    mask = torch.eye(len(s), dtype=torch.bool, device=s.device)
    return divergence(s.masked_fill(mask, -1e4), t.masked_fill(mask, -1e4))


def dense_mixture_kl(p: Problem) -> Tensor:
    products = zip(learned_weights(p), two_teachers(p), strict=True)
    t = sum(weight * (v @ v.T).to(p.scale.dtype) for weight, v in products) / p.temperature
    s = (p.x @ p.x.T).to(p.scale.dtype) / p.temperature
    mask = torch.eye(len(s), dtype=torch.bool, device=s.device)
    return divergence(s.masked_fill(mask, -1e4), t.masked_fill(mask, -1e4))


def kl_with_diagonal(p: Problem) -> Tensor:
    s, t = ((v @ v.T) / p.temperature for v in (p.x, p.y))
    return F.kl_div(F.log_softmax(s, 1), F.log_softmax(t, 1), reduction="batchmean", log_target=True)


def dense_relation_match(p: Problem, metric: str) -> Tensor:
    s, t = dense_relations(p, 0.0)
    distance = F.l1_loss if metric == "mae" else F.mse_loss
    return distance(s, t, reduction="sum") / (len(s) * (len(s) - 1))


def dense_wasserstein(p: Problem) -> Tensor:
    s, t = (v.sort(1).values for v in dense_relations(p, 1e4))  # own relations last, and level
    return (s - t).abs().sum() / (len(s) * (len(s) - 1))


def dense_neighbours(p: Problem) -> tuple[Tensor, ...]:
    return (p.x[:QUERIES] @ p.y.T).topk(NEIGHBOURS, 1)


def dense_ranks(p: Problem) -> tuple[Tensor, ...]:
    scores = p.x[:QUERIES] @ p.y.T
    best = scores.gather(1, own_index(p))
    return (scores > best).sum(1), (scores == best).sum(1)


FAMILIES = {
    "contrastive": Family((True, True, True, False), units(1), units(4), ours("contrastive", "reference")),
    "sigmoid": Family((True,) * 4, units(1), units(3), ours("sigmoid", "reference"), together=True),
    "relation_kl": Family((True, False, False, False), units(1), units(3), ours("relation_kl", "reference")),
    "relation_mae": Family(
        (True, False, False, False), units(1), units(2), ours("relation_mae", "reference"), together=True
    ),
    "relation_mse": Family(
        (True, False, False, False),
        lambda n, d: 6 * n * d * d,
        lambda n, d: 10 * n * d * d,
        ours("relation_mse", "reference"),
    ),
    "neighbours": Family((False,) * 4, queries_times, None, None),
    "ranks": Family((False,) * 4, queries_times, None, None),
    "contrastive_ids": Family((True, True, True, False), units(1), units(4), ours("contrastive_ids", "reference")),
    "contrastive_kept": Family((True, True, True, False), units(1), units(3), ours("contrastive_kept", "reference")),
    # the loss and its gradients are 4 u; S and the direction, 2 D wide, twice and four gradient products are 10
    "contrastive_twice": Family(
        (True, True, True, False), units(4), units(14), ours("contrastive_twice", "reference"), together=True
    ),
    "relation_kl_matrix": Family(
        (True, False, False, False), units(1), units(3), ours("relation_kl_matrix", "reference")
    ),
    "relation_kl_euclidean": Family(
        (True, False, False, False), units(1), units(3), ours("relation_kl_euclidean", "reference")
    ),
    "relation_kl_mixture": Family(
        (True, False, True, False), units(1.5), units(4), ours("relation_kl_mixture", "reference")
    ),
    "relation_wasserstein": Family(
        (True, False, False, False), units(1), units(2), ours("relation_wasserstein", "reference"), together=True
    ),
}

DENSE = {  # the loss, and its N x N float32 matrices with the backward pass
    "contrastive": (dense_contrastive, 5),
    "sigmoid": (dense_sigmoid, 6),
    "relation_kl": (dense_relation_kl, 9),
    "relation_mae": (partial(dense_relation_match, metric="mae"), 7),
    "relation_mse": (partial(dense_relation_match, metric="mse"), 7),
    "neighbours": (dense_neighbours, 0),
    "ranks": (dense_ranks, 0),
    "contrastive_ids": (dense_contrastive_ids, 7),
    "contrastive_kept": (dense_contrastive, 5),
    "contrastive_twice": (penalty(dense_contrastive), 16),
    "relation_kl_matrix": (dense_matrix_kl, 9),
    "relation_kl_euclidean": (dense_euclidean_kl, 11),
    "relation_kl_mixture": (dense_mixture_kl, 11),
    "relation_wasserstein": (dense_wasserstein, 11),
}


def available(impl: str, name: str) -> Callable[[torch.device], Loss]:
    def load(device: torch.device) -> Loss:
        if impl == "triton" and device.type != "cuda":
            raise Missing("Triton kernels need a CUDA device")
        return ours(name, impl)

    return load


def compiled(loss: Loss) -> Callable[[torch.device], Loss]:
    """As users have it: the first shape for itself, then once for all sizes."""
    return lambda device: torch.compile(loss)


def package(name: str) -> object:
    try:
        return import_module(name)
    except Exception as error:  # a peer may fail on import in its own ways
        raise Missing(f"cannot import {name}: {error}") from None


def importable(name: str) -> bool:
    try:
        return bool(package(name))
    except Missing:
        return False


def on_cuda(device: torch.device, what: str) -> None:
    if device.type != "cuda":
        raise Missing(f"{what} needs a CUDA device")


def load_open_clip(device: torch.device) -> Loss:
    loss = package("open_clip").ClipLoss()
    return lambda p: loss(p.x, p.y, p.scale)


def load_inf_cl(device: torch.device) -> Loss:
    """What cal_inf_loss is on one rank; itself it wants a process group for the gradient of the scale."""
    on_cuda(device, "Inf-CL")
    loss = package("inf_cl").cal_flash_loss

    def both_directions(p: Problem) -> Tensor:
        head = math.gcd(p.x.shape[1], 256)
        return sum(loss(a, b, scale=p.scale, head_dim=head).mean() for a, b in ((p.x, p.y), (p.y, p.x))) / 2

    return both_directions


def load_cce(device: torch.device, **settings) -> Loss:
    on_cuda(device, "cut-cross-entropy")
    loss = package("cut_cross_entropy").linear_cross_entropy

    def twice(p: Problem) -> Tensor:
        labels = torch.arange(len(p.x), device=p.x.device)
        scale = p.scale.to(p.x.dtype)
        return (loss(scale * p.x, p.y, labels, **settings) + loss(scale * p.y, p.x, labels, **settings)) / 2

    return twice


def load_liger(device: torch.device) -> Loss:
    """The student's rows are both its inputs and its vocabulary. Keeps each row's relation to itself."""
    make = package("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDLoss

    def loss(p: Problem) -> Tensor:
        settings = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 0.0, "compiled": device.type == "cuda"}
        module = make(temperature=p.temperature, **settings)
        return module(p.x, p.x, p.y, p.y, torch.zeros(len(p.x), dtype=torch.int64, device=device))

    return loss


def entries(families: list[str], without: list[str]) -> list[Entry]:
    """All entries of the families but those with a word of `without` in their names."""
    found = []
    for name in families:
        dense, matrices = DENSE[name]
        kept = int(name == "contrastive_kept")
        found += [Entry(name, f"vlscale {impl}", available(impl, name), kept) for impl in ("triton", "chunked")]
        found += [Entry(name, "dense eager", lambda device, loss=dense: loss, matrices)]
        found += [Entry(name, "dense compiled", compiled(dense), matrices)]
        if name == "contrastive":
            found += [Entry(name, "open_clip ClipLoss", load_open_clip, 6)]
            if not importable("open_clip"):
                found += [Entry(name, "two products (open_clip's form, re-stated)", lambda device: two_products, 6)]
            found += [Entry(name, "Inf-CL", load_inf_cl)]
            found += [Entry(name, "CCE twice", load_cce)]
            found += [Entry(name, "CCE twice, nothing skipped", partial(load_cce, filter_eps=None))]
        if name == "relation_kl":
            found += [Entry(name, "Liger chunked distillation", load_liger, truth=kl_with_diagonal)]
    return [entry for entry in found if not any(word in entry.name for word in without)]
