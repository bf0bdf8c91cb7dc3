"""What the ranks of a test run: one step of every objective, the bytes that came and the operations. No tests here.

Each rank has B rows of width D; embeddings of e bytes an element, teachers of the same width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vlscale.distributed import Ranks, count_traffic
from vlscale.objectives.matching import HardNegatives, Rows, hard_negatives
from vlscale.objectives.sharded_contrastive import sharded_contrastive_loss
from vlscale.objectives.sharded_relation_kl import sharded_relation_kl_loss
from vlscale.objectives.sharded_relation_match import sharded_relation_match_loss
from vlscale.objectives.sharded_sigmoid import sharded_sigmoid_loss

B, D, TOKENS = 32, 64, 24
DTYPES = (torch.float32, torch.bfloat16)
KEY = 5


def operations(_, left: torch.Size, right: torch.Size, **kwargs) -> int:
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: operations}  # which the counter does not know


def rows_of(ranks: Ranks, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and text embeddings (B, D) of this rank."""
    draw = torch.Generator().manual_seed(ranks.rank)
    unit = (F.normalize(torch.randn(B, D, generator=draw), dim=1) for _ in range(2))
    image, text = (rows.to(ranks.device, dtype).requires_grad_() for rows in unit)
    return image, text


def objectives(x: torch.Tensor, y: torch.Tensor, ids: torch.Tensor) -> dict[str, Callable[..., torch.Tensor]]:
    """By name; each takes how ranks meet. Teachers are frozen."""
    teacher, taus = y.detach(), {"student_temperature": 0.1, "teacher_temperature": 0.1}
    match = {"teacher_embs": [teacher], "teacher_weights": [0.7], "temperature": 0.1}
    return {
        "contrastive": lambda **how: sharded_contrastive_loss(x, y, 14.3, **how),
        "contrastive by id": lambda **how: sharded_contrastive_loss(x, y, 14.3, pair_id=ids, **how),
        "sigmoid": lambda **how: sharded_sigmoid_loss(x, y, 14.3, -3.0, **how),
        "relation_kl": lambda **how: sharded_relation_kl_loss(x, teacher, **taus, **how),
        **{
            metric: lambda metric=metric, **how: sharded_relation_match_loss(x, **match, metric=metric, **how)
            for metric in ("mae", "mse", "wasserstein")
        },
    }


def costs(ranks: Ranks) -> dict[str, tuple[dict[str, int], int]]:
    """Bytes received by kind of collective, and operations, by objective, comm and dtype."""
    found, ids = {}, torch.arange(B, device=ranks.device) + B * ranks.rank
    for dtype in DTYPES:
        for name, loss in objectives(*rows_of(ranks, dtype), ids).items():
            for comm in ("gather", "ring", "half_ring"):
                with count_traffic() as traffic, FlopCounterMode(display=False, custom_mapping=IN_PLACE) as flops:
                    loss(ranks=ranks, comm=comm, impl="chunked").backward()
                found[f"{name} {comm} {dtype}"] = dict(traffic), flops.get_total_flops()
    return found


def costs_of_matching(ranks: Ranks) -> dict[str, tuple[int, int]]:
    """By dtype: bytes received when negatives are drawn and (B, TOKENS) of them and their gradients travel; and how
    many rows this rank asked others for, with how many others asked it for."""
    ids, found = torch.arange(B) + B * ranks.rank, {}
    scale = torch.tensor(14.3, device=ranks.device)
    for dtype in DTYPES:
        image, text = (rows.detach() for rows in rows_of(ranks, dtype))
        own = ids.to(ranks.device)
        negatives = HardNegatives(own, ids, KEY, ranks)
        tokens = torch.ones(B, TOKENS, dtype=dtype, device=ranks.device, requires_grad=True)
        with count_traffic() as traffic:
            negatives.choose(image, text, scale)
            (negatives.pictures(tokens).sum() + negatives.captions(tokens).sum()).backward()
        drawn = torch.cat(hard_negatives(Rows(image, own), Rows(text, own), ids, scale, KEY, ranks)) // B
        asked_by = torch.tensor(ranks.gather_objects(torch.bincount(drawn, minlength=ranks.size).tolist()))
        away, asked = (
            int(rows.sum() - asked_by[ranks.rank, ranks.rank])
            for rows in (asked_by[ranks.rank], asked_by[:, ranks.rank])
        )
        found[str(dtype)] = sum(traffic.values()), away + asked
    return found
