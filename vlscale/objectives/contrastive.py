"""Contrast of two sets of matching embeddings over the global batch: image with text, view with view.

Legend: B pairs of this rank, N = W B pairs of all W ranks, D width.
"""

import torch

from vlscale.distributed import Ranks, gather_rows
from vlscale.kernels import contrastive_loss, sigmoid_loss

Metrics = dict[str, torch.Tensor]


def contrastive(
    first: torch.Tensor,
    second: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor | None,
    pair_id: torch.Tensor,
    ranks: Ranks,
    *,
    impl: str,
    name: str = "contrastive",
) -> tuple[torch.Tensor, Metrics]:
    """The softmax loss, or the sigmoid loss where there is a `logit_bias`.

    `first`, `second`: (B, D) unit rows; `pair_id`: (B,), equal ids are positives. Every rank computes the loss of the
    whole global batch from gathered rows; `gather_rows` states why the engine's average is then its exact gradient.
    """
    first, second, pair_id = (gather_rows(rows, ranks) for rows in (first, second, pair_id))
    if logit_bias is None:
        loss = contrastive_loss(first, second, logit_scale, pair_id=pair_id, impl=impl)
    else:
        loss = sigmoid_loss(first, second, logit_scale, logit_bias, pair_id=pair_id, impl=impl)
    return loss, {name: loss.detach()}
