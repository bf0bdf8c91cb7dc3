"""`vlscale search --rerank K`: the K nearest of the other modality, put in order by the fusion encoder.

The order is that of evaluation's `fixed` column (see `vlscale.evaluate.reranked`): by the log-odds that query and
candidate match; in a gallery of both modalities the candidate that matches best takes the place, among them, of the
nearest. What was not scored keeps its order by cosine.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from vlscale.data.faults import BadSample
from vlscale.data.images import decode_eval, normalise
from vlscale.data.tokens import tokenise
from vlscale.evaluate.rerank import check_fusion
from vlscale.export.index_file import Index
from vlscale.export.loaded import LoadedModel
from vlscale.export.search import Hit, Of, Query, search
from vlscale.logging import get_logger
from vlscale.models.match_picture import match_picture

Pictures = Callable[[Iterable[str]], dict[str, bytes]]  # of samples by key; those that cannot be read are left out
BATCH = 64  # captions of a forward


def reranked_search(
    model: LoadedModel, index: Index, query: Query, pictures: Pictures, *, rerank: int, k: int, of: Of
) -> list[Hit]:
    """The first `k` after re-ranking; each hit keeps its own cosine and says its log-odds."""
    check_fusion(model.encoder, f"--rerank {rerank}")
    by_text = query.picture is None
    across = Of.IMAGES if by_text else Of.TEXTS
    if of not in (across, Of.BOTH):
        kinds = ("a text", "pictures") if by_text else ("a picture", "captions")
        raise ValueError(
            f"--rerank {rerank}: the fusion encoder matches pictures with captions; {kinds[0]} can re-rank {kinds[1]}: "
            f"expected --of {across} or both, got {of}"
        )
    size = len(index.keys if by_text else index.captions)
    if not 1 <= rerank <= size:
        raise ValueError(f"--rerank {rerank}: expected 1 to {size:,}, the {across} of the index")
    candidates = search(model, index, query, k=rerank, of=across)
    score = _match_pictures if by_text else _match_captions
    odds = score(model, query, candidates, pictures)
    matched = [replace(hit, match=found) for hit, found in zip(candidates, odds, strict=True)]
    best = sorted((hit for hit in matched if hit.match is not None), key=lambda hit: -hit.match)
    waiting = iter(best + [hit for hit in matched if hit.match is None])
    places = {hit.place for hit in candidates}
    return [next(waiting) if hit.place in places else hit for hit in search(model, index, query, k=k, of=of)]


@torch.no_grad()
def _match_pictures(model: LoadedModel, query: Query, candidates: list[Hit], pictures: Pictures) -> list[float | None]:
    """Log-odds of a text with each candidate's picture; None for those that cannot be read, which the log names."""
    found = pictures(hit.key for hit in candidates)
    tokens, mask = _text_tokens(model, [query.text])
    odds: dict[str, float] = {}
    spec, fusion = model.preprocess.spec, model.encoder.fusion
    for keys in _parts(sorted(found)):
        decoded = {}
        for key in keys:
            with suppress(BadSample):
                decoded[key] = torch.from_numpy(decode_eval(found[key], spec)).permute(2, 0, 1)
        if decoded:
            pixels = normalise(torch.stack(list(decoded.values())).to(model.device), spec)
            _, seen = model.encoder.image_tokens(pixels)
            same = len(seen), -1, -1
            logits = fusion.matching(fusion(tokens.expand(*same), mask.expand(*same[:2]), seen)[:, 0])
            odds |= dict(zip(decoded, _log_odds(logits), strict=True))
    lost = [hit.key for hit in candidates if hit.key not in odds]
    if lost:
        get_logger().warning(
            "%d of %d candidates stand behind the others, unscored: their pictures could not be read (%s)",
            len(lost), len(candidates), ", ".join(lost[:3]),
        )  # fmt: skip
    return [odds.get(hit.key) for hit in candidates]


@torch.no_grad()
def _match_captions(model: LoadedModel, query: Query, candidates: list[Hit], pictures: Pictures) -> list[float]:
    """Log-odds of a picture with each candidate's caption."""
    spec = model.preprocess.spec
    pixels = torch.from_numpy(decode_eval(query.picture, spec)).permute(2, 0, 1)[None]
    _, seen = model.encoder.image_tokens(normalise(pixels.to(model.device), spec))
    odds: list[float] = []
    for captions in _parts([hit.caption for hit in candidates]):
        odds += _log_odds(match_picture(model.encoder.fusion, *_text_tokens(model, captions), seen[0]))
    return odds


def _text_tokens(model: LoadedModel, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens (P, L, width) and mask (P, L)."""
    ids, mask = tokenise(model.preprocess.tokenizer, captions, model.preprocess.max_length)
    mask = mask.to(model.device)
    return model.encoder.text_tokens(ids.to(model.device), mask)[1], mask


def _log_odds(logits: Tensor) -> list[float]:
    return (logits[:, 1].double() - logits[:, 0].double()).tolist()


def _parts(items: list[str]) -> list[list[str]]:
    return [items[first : first + BATCH] for first in range(0, len(items), BATCH)]
