"""The sigmoid loss of a global batch over ranks: each rank its own rows x all columns, 3/W of N^2 D products.

Legend: W ranks, b rows a rank, N = W b, D width. There is no normaliser: one sweep makes the loss and its gradients, so
bytes are those of the contrastive loss without its sums, and in a ring the columns travel once.
"""

import torch
from torch import Tensor

from vlscale.distributed import COMMS, Agreement, Ranks, all_gather, all_reduce, gather_rows
from vlscale.kernels import sigmoid_loss
from vlscale.kernels.checks import as_scalar, check_choice, compute_dtype
from vlscale.objectives.pair_tiles import Ids, Tiles, check_pairs, describe_pairs
from vlscale.objectives.sharded import Computed, made_in_forward, make_blocks


def sharded_sigmoid_loss(
    image_emb: Tensor,
    text_emb: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    pair_id: Tensor | None = None,
    ranks: Ranks,
    comm: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """`sigmoid_loss` of all ranks' pairs, 0-d and the same on every rank; arguments as `sharded_contrastive_loss`.

    Differentiable once; impl `reference` gathers everything and is dense and whole on each rank, of any order.
    """
    if ranks.size == 1:
        check_choice("comm", comm, COMMS)
        return sigmoid_loss(image_emb, text_emb, logit_scale, logit_bias, pair_id=pair_id, impl=impl)
    with Agreement("sigmoid loss", ranks) as agreement:
        impl, comm = check_pairs(image_emb, text_emb, pair_id, ranks, comm, impl)
        dtype = compute_dtype(image_emb)
        scale = as_scalar("logit_scale", logit_scale, image_emb, dtype, positive=True)
        bias = as_scalar("logit_bias", logit_bias, image_emb, dtype, positive=False)
        agreement.offer(len(image_emb), (*describe_pairs(image_emb, pair_id), comm, impl))
    everyone = None if pair_id is None else all_gather(pair_id, ranks)
    if impl == "reference":
        image_emb, text_emb = gather_rows(image_emb, ranks), gather_rows(text_emb, ranks)
        return sigmoid_loss(image_emb, text_emb, scale, bias, pair_id=everyone, impl=impl)
    inputs = image_emb, text_emb, scale, bias
    want = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs)
    ids = None if everyone is None else Ids.of(everyone, ranks.rank, len(image_emb))

    def compute():
        tiles = Tiles(image_emb.detach(), scale.detach(), ids, impl)
        return _sweep(tiles, text_emb.detach(), bias.detach(), want, comm, ranks)

    return made_in_forward(compute, inputs, ranks)


def _sweep(tiles: Tiles, text: Tensor, bias: Tensor, want: tuple[bool, ...], comm: str, ranks: Ranks) -> Computed:
    """The loss, and the gradients of image, text, scale and bias that are wanted."""
    blocks, scale = make_blocks(comm, ranks), tiles.scale
    sums = scale.new_zeros(3, dtype=torch.float64)
    rows = scale.new_zeros(tiles.rows.shape) if want[0] else None

    def visit(block):
        part, dx, dy = tiles.sigmoid(block, bias, want)
        sums.add_(part)
        if want[0]:
            rows.add_(dx)
        return [dy] if want[1] else []

    returned = blocks.sweep(blocks.hold(text), [], visit)
    n = ranks.size * len(text)
    loss, along, total = sums.unbind()
    gradients = [
        rows.mul_(scale / n) if want[0] else None,
        returned[0].mul_(scale / n) if want[1] else None,
        along / n if want[2] else None,
        total / n if want[3] else None,
    ]
    return (all_reduce(loss, ranks) / n).to(scale.dtype), gradients
