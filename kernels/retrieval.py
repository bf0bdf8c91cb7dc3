"""`retrieval_ranks` and `topk_neighbors`: exact retrieval over a gallery of any size, without the Q x G scores.

Ranks are counts, not sorted lists: how many beat the best positive, how many tie with it. Ties are scores that are
equal as computed, so identical rows tie. Nothing here has a gradient. `triton` never waits for the device; `chunked`
does on a GPU, where it lists what it found. float64 is the chunked tiles' on every impl, and so are more than MOST
neighbours. Indices are checked on a CPU; on a GPU one outside the gallery counts as padding.
"""

from numbers import Integral

import torch
from torch import Tensor

from . import chunked_retrieval as tiles
from . import reference
from .checks import check_embeddings, check_indices, check_same, choose_impl, compute_dtype
from .chunked import without_autocast

MOST = 512  # neighbours that Triton seeks, 64 in a pass over the gallery; chunked blocks sort better than more passes


def _check(query_emb: Tensor, gallery_emb: Tensor) -> tuple[Tensor, Tensor]:
    check_embeddings("query_emb", query_emb)
    check_embeddings("gallery_emb", gallery_emb)
    check_same("gallery_emb", gallery_emb, "query_emb", query_emb, shape=False)
    return query_emb.detach(), gallery_emb.detach()


def _run(name: str, impl: str, query: Tensor, gallery: Tensor, *arguments):
    """The function of that name in the implementation's module; `reference` alone takes widened embeddings."""
    with without_autocast(query.device):
        if impl == "triton":
            from . import triton_retrieval

            return getattr(triton_retrieval, name)(query, gallery, *arguments)
        if impl == "reference":
            dtype = compute_dtype(query)
            return getattr(reference, name)(query.to(dtype), gallery.to(dtype), *arguments)
        return getattr(tiles, name)(query, gallery, *arguments)


@torch.no_grad()
def retrieval_ranks(
    query_emb: Tensor, gallery_emb: Tensor, positives: Tensor, *, exclude: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """(above, tied, same), each (Q,) int64: non-positives over the best positive, level with it, and positives level.

    query_emb (Q, D), gallery_emb (G, D); positives (Q, P) and exclude (Q, E) gallery indices padded by -1; an excluded
    row counts for nothing, also where it is listed as positive. Expected rank (from 1) = 1 + above + tied / (same + 1).
    A query without positives has same = 0 and everything above it; a NaN counts as above.
    """
    query, gallery = _check(query_emb, gallery_emb)
    impl = choose_impl(impl, query.device)
    if positives is None:
        raise ValueError(f"positives: expected a tensor ({len(query)}, P) of gallery indices padded by -1, got None")
    for name, table in (("positives", positives), ("exclude", exclude)):
        check_indices(name, table, len(query), len(gallery), query.device)
    impl = "chunked" if impl == "triton" and query.dtype == torch.float64 else impl
    return _run("retrieval_ranks", impl, query, gallery, positives, exclude)


@torch.no_grad()
def topk_neighbors(
    query_emb: Tensor, gallery_emb: Tensor, k: int, *, exclude: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(scores, indices), each (Q, k), best first, ties by lower index.

    query_emb (Q, D), gallery_emb (G, D); exclude (Q, E) gallery indices padded by -1. Where exclusions leave fewer than
    k, the rest is score -inf and index -1.
    """
    query, gallery = _check(query_emb, gallery_emb)
    impl = choose_impl(impl, query.device)
    if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k <= len(gallery):
        raise ValueError(f"k: expected an integer 1 to {len(gallery)}, the size of the gallery, got {k!r}")
    check_indices("exclude", exclude, len(query), len(gallery), query.device)
    impl = "chunked" if impl == "triton" and (query.dtype == torch.float64 or k > MOST) else impl
    return _run("topk_neighbors", impl, query, gallery, int(k), exclude)
