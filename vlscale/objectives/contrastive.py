"""Contrast of two sets of matching embeddings over the global batch: image with text, view with view.

Legend: B pairs of this rank, D width.
"""

import torch

from vlscale.distributed import Ranks
from vlscale.objectives.sharded_contrastive import sharded_contrastive_loss
from vlscale.objectives.sharded_sigmoid import sharded_sigmoid_loss

Metrics = dict[str, torch.Tensor]


def contrastive(
    first: torch.Tensor,
    second: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor | None,
    pair_id: torch.Tensor,
    ranks: Ranks,
    *,
    comm: str,
    impl: str,
    name: str = "contrastive",
) -> tuple[torch.Tensor, Metrics]:
    """The softmax loss, or the sigmoid loss where there is a `logit_bias`, of the whole global batch: the same number
    on every rank, of which each has computed its own rows.

    `first`, `second`: (B, D) unit rows; `pair_id`: (B,), equal ids are positives. `vlscale.distributed.gather` states
    why the engine's average over ranks is then its exact gradient.
    """
    how = {"pair_id": pair_id, "ranks": ranks, "comm": comm, "impl": impl}
    if logit_bias is None:
        loss = sharded_contrastive_loss(first, second, logit_scale, **how)
    else:
        loss = sharded_sigmoid_loss(first, second, logit_scale, logit_bias, **how)
    return loss, {name: loss.detach()}
