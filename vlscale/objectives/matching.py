"""Matching (itm): does this caption belong to this picture? Two-way classification by the fusion encoder of every pair
and of two hard negatives of it (ALBEF, arXiv 2107.07651; RVLR, 2412.10761).

The negative caption of picture i is drawn in proportion to exp(s image_i . text_j) over the pairs j of the global batch
that do not share its id, the negative picture of caption i likewise. One uniform number a draw, a function of seed,
step and the pair's place in the global batch, meets the cumulative shares in the order of these places; so negatives
are the same at any number of ranks. No N x N matrix: one sweep by blocks of columns keeps a sum for each block, one
block for each row is made again. Tokens of the chosen negatives travel, and nothing else of them.

Legend: W ranks, b pairs of this rank, N = W b, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vlscale.data.keyed import hash64, uniforms_at
from vlscale.distributed import Agreement, Exchange, Ranks, all_gather, plan_exchange, sum_over_ranks
from vlscale.kernels.chunked import full_precision
from vlscale.models.rows import wide
from vlscale.objectives.contrastive import Metrics

ROWS, COLUMNS = 4096, 1024  # logits that are there at once


@dataclass(frozen=True)
class Rows:
    """One side of a draw: (n, D) embeddings, and (n,) ids of their pairs."""

    emb: torch.Tensor
    pair_id: torch.Tensor


class HardNegatives:
    """Those of one batch, as `vlscale.models.fused_pairs.Others` says; drawn once, however many passes look at them."""

    def __init__(self, pair_id: torch.Tensor, positions: torch.Tensor, key: int, ranks: Ranks):
        """Of this rank's pairs `pair_id` (b,) and `positions` (b,), on the host; `key`: of the draws of this step."""
        self.pair_id, self.positions, self.key, self.ranks = pair_id, positions, key, ranks
        self._of_picture: Exchange | None = None
        self._of_caption: Exchange | None = None

    @property
    def chosen(self) -> bool:
        return self._of_picture is not None

    def choose(self, image_emb: torch.Tensor, text_emb: torch.Tensor, logit_scale: torch.Tensor) -> None:
        if self.chosen:
            return
        sides = Rows(image_emb, self.pair_id), Rows(text_emb, self.pair_id)
        picture, caption = hard_negatives(*sides, self.positions, logit_scale, self.key, self.ranks)
        self._of_caption = plan_exchange(picture, len(picture), self.ranks)
        self._of_picture = plan_exchange(caption, len(caption), self.ranks)

    def pictures(self, rows: torch.Tensor) -> torch.Tensor:
        return self._of_caption(rows)

    def captions(self, rows: torch.Tensor) -> torch.Tensor:
        return self._of_picture(rows)


def matching(logits: torch.Tensor, ranks: Ranks) -> tuple[torch.Tensor, Metrics]:
    """Cross-entropy over the 3 N pairs of the global batch, the same number on every rank. `logits` (b, 3, 2): of each
    pair, with another picture, with another caption; index 1: they match."""
    logits = wide(logits)
    target = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
    target[:, 0] = 1
    own = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
    count = ranks.size * target.numel()
    loss = sum_over_ranks(own, ranks) / count
    right = ranks.sum((logits.detach().argmax(2) == target).sum().to(loss.dtype))
    return loss, {"itm": loss.detach(), "itm_accuracy": right / count}


@torch.no_grad()
@full_precision
def hard_negatives(
    images: Rows, texts: Rows, positions: torch.Tensor, logit_scale: torch.Tensor, key: int, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each pair of this rank a picture and a caption of another pair: places (b,) in the gathered batch, rank by
    rank. Raises the same ValueError on every rank where all pairs share one id."""
    if ranks.group is not None:
        with Agreement("matching", ranks) as agreement:
            agreement.offer(len(positions), (f"width {images.emb.shape[1]} {images.emb.dtype}",))
    device = images.emb.device
    own = images.emb, texts.emb, images.pair_id, positions.to(device)
    everyone = [_gather(part, ranks) for part in own]
    order = everyone[3].argsort()
    pictures, captions, ids = (part[order] for part in everyone[:3])
    if bool((ids == ids[0]).all()):
        raise ValueError(
            f"objective.itm_weight: all {len(ids)} pairs of the batch share the id {int(ids[0])}, so none has a "
            "negative to match it with; set objective.itm_weight=0, shuffle the data, or raise train.global_batch_size"
        )
    picture = draw(texts, Rows(pictures, ids), logit_scale, _shares(key, "picture", positions, device))
    caption = draw(images, Rows(captions, ids), logit_scale, _shares(key, "caption", positions, device))
    return order[picture], order[caption]


def draw(rows: Rows, columns: Rows, logit_scale: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """For each row the first column (n,) at which the cumulative share of softmax(logit_scale rows . columns) passes
    `shares` (n,) in [0, 1), float64; columns of a row's own id have no share."""
    parts = [
        _draw(Rows(emb, ids), columns, logit_scale, own)
        for emb, ids, own in zip(*(part.split(ROWS) for part in (rows.emb, rows.pair_id, shares)), strict=True)
    ]
    return torch.cat(parts)


def _draw(rows: Rows, columns: Rows, logit_scale: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    blocks = [Rows(*block) for block in zip(columns.emb.split(COLUMNS), columns.pair_id.split(COLUMNS), strict=True)]
    sums = torch.stack([_logits(rows, block, logit_scale).logsumexp(1).double() for block in blocks], 1)
    block, rest = _pass(sums.softmax(1), shares)
    by_block = block.argsort(stable=True)
    counts = torch.bincount(block, minlength=len(blocks)).tolist()
    found = torch.empty_like(block)
    for number, own in enumerate(by_block.split(counts)):
        logits = _logits(Rows(rows.emb[own], rows.pair_id[own]), blocks[number], logit_scale)
        found[own] = number * COLUMNS + _pass(logits.double().softmax(1), rest[own])[0]
    return found


def _pass(weights: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, m) weights and (n,) shares of their sum: where the cumulative weight passes the share, (n,), and how far into
    that weight it does, in [0, 1). What is no number lands somewhere inside."""
    total = weights.cumsum(1)
    level = shares.clamp(max=1 - 1e-12) * total[:, -1]
    place = (total <= level[:, None]).sum(1).clamp(max=weights.shape[1] - 1)[:, None]
    own = weights.gather(1, place)[:, 0]
    before = total.gather(1, place)[:, 0] - own
    return place[:, 0], ((level - before) / own).nan_to_num(0.0).clamp(0, 1)


def _logits(rows: Rows, columns: Rows, logit_scale: torch.Tensor) -> torch.Tensor:
    logits = (wide(rows.emb) * logit_scale) @ wide(columns.emb).T
    return logits.masked_fill(rows.pair_id[:, None] == columns.pair_id[None, :], -torch.inf)


def _shares(key: int, side: str, positions: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(uniforms_at(hash64(key, side), positions.numpy())).to(device)


def _gather(rows: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    return rows if ranks.group is None else all_gather(rows, ranks)
