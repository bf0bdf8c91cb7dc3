"""Dense truth: every function of vlscale.kernels written as its definition, N x N matrices and all.

Differentiable any number of times by autograd; computed in float64 for float64 inputs and in float32 otherwise. The
tests hold every other implementation to these. N pairs, D width, K teachers, Q queries, G gallery.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def positives_of(pair_id: Tensor | None, n: int, device: torch.device) -> Tensor:
    """(N, N) bool: which texts are positives of which images."""
    if pair_id is None:
        return torch.eye(n, dtype=torch.bool, device=device)
    return pair_id[:, None] == pair_id[None, :]


def off_diagonal(matrix: Tensor) -> Tensor:
    """(N, N) -> (N, N-1): each row without its own column."""
    n = matrix.shape[0]
    return matrix.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1) if n > 1 else matrix[:, :0]


def relation_matrix(emb: Tensor, relation: str) -> Tensor:
    """(N, D) -> (N, N): dot products, or negative euclidean distances with slope 0 at distance 0."""
    gram = emb @ emb.T
    if relation == "cosine":
        return gram
    norms = emb.square().sum(1)
    squared = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
    apart = ~(squared <= 0)  # a NaN stays one
    return -torch.where(apart, squared, 1).sqrt() * apart


def contrastive_loss(image_emb: Tensor, text_emb: Tensor, logit_scale: Tensor, pair_id: Tensor | None) -> Tensor:
    logits = logit_scale * image_emb @ text_emb.T
    positives = positives_of(pair_id, len(logits), logits.device).to(logits.dtype)
    target = positives / positives.sum(1, keepdim=True)
    rows = -(target * F.log_softmax(logits, 1)).sum(1).mean()
    columns = -(target * F.log_softmax(logits, 0)).sum(0).mean()
    return (rows + columns) / 2


def sigmoid_loss(
    image_emb: Tensor, text_emb: Tensor, logit_scale: Tensor, logit_bias: Tensor, pair_id: Tensor | None
) -> Tensor:
    logits = logit_scale * image_emb @ text_emb.T + logit_bias
    sign = torch.where(positives_of(pair_id, len(logits), logits.device), 1.0, -1.0).to(logits.dtype)
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def mixed_relations(embs: list[Tensor], weights: Tensor, relation: str) -> Tensor:
    return sum(weight * relation_matrix(emb, relation) for weight, emb in zip(weights, embs, strict=True))


def relation_kl_loss(
    student: Tensor, student_weight: Tensor, teachers: list[Tensor], weights: Tensor, scope: str, relation: str
) -> Tensor:
    """`student_weight` is 1 / student_temperature, `weights` are teacher_weights / teacher_temperature."""
    s = off_diagonal(student_weight * relation_matrix(student, relation))
    t = off_diagonal(mixed_relations(teachers, weights, relation))
    if scope == "matrix":
        s, t = s.reshape(1, -1), t.reshape(1, -1)
    log_s, log_t = F.log_softmax(s, 1), F.log_softmax(t, 1)
    return (log_t.exp() * (log_t - log_s)).sum(1).mean()


def relation_match_loss(
    student: Tensor, student_weight: Tensor, teachers: list[Tensor], weights: Tensor, metric: str
) -> Tensor:
    s = off_diagonal(student_weight * relation_matrix(student, "cosine"))
    t = off_diagonal(mixed_relations(teachers, weights, "cosine"))
    if metric == "wasserstein":
        s, t = s.sort(1).values, t.sort(1).values
    difference = (s - t).square() if metric == "mse" else (s - t).abs()
    return difference.sum() / max(difference.numel(), 1)


def mark(table: Tensor, width: int) -> Tensor:
    """(Q, P) indices padded by -1 -> (Q, width) bool."""
    marked = torch.zeros(len(table), width + 1, dtype=torch.bool, device=table.device)
    return marked.scatter_(1, torch.where(table < 0, width, table), True)[:, :width]


def retrieval_ranks(
    query: Tensor, gallery: Tensor, positives: Tensor, exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    scores = query @ gallery.T
    allowed = ~mark(exclude, len(gallery)) if exclude is not None else torch.ones_like(scores, dtype=torch.bool)
    positive = mark(positives, len(gallery)) & allowed
    best = scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    negative = allowed & ~positive
    above = (negative & ~(scores <= best)).sum(1)
    tied = (negative & (scores == best)).sum(1)
    return above, tied, (positive & (scores == best)).sum(1)


def topk_neighbors(query: Tensor, gallery: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = query @ gallery.T
    if exclude is not None:
        scores = scores.masked_fill(mark(exclude, len(gallery)), -torch.inf)
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    values, indices = values[:, :k], indices[:, :k]
    return values, torch.where(values == -torch.inf, -1, indices)
