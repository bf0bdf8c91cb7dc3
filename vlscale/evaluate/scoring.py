"""Matching logits of pairs: captions' tokens encoded when needed and kept in a window, pairs grouped by picture.

Letters: n pictures at hand, V vision tokens, p pairs, T captions, L tokens of the longest caption of a forward.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vlscale.data.tokens import tokenise
from vlscale.distributed import Ranks
from vlscale.evaluate.embed import Preprocess
from vlscale.models.dual_encoder import DualEncoder
from vlscale.models.match_picture import match_read, read_captions

PAIRS = 64  # of a forward, at most: captions sorted by length are then padded by a twentieth, not by a quarter
WINDOW_BYTES = 1 << 30  # captions' tokens: 17,000 captions of 20 tokens of 768 numbers in float32


class PairScorer:
    """A rank's; the ranks call `score` together, equally often."""

    def __init__(self, window: "CaptionWindow"):
        self.window = window
        self.model, self.ranks, self.batch_size = window.model, window.ranks, window.batch_size

    def score(
        self,
        pictures: Tensor,
        whose: Tensor,
        captions: Tensor,
        on_pairs: Callable[[int], object] = lambda pairs: None,
    ) -> Tensor:
        """(p, 2) float32 on the host: pictures' tokens (n, V, width), and for each pair the place of its picture
        among them, ascending, and its caption. A rank without pairs gives one picture, to be in step."""
        logits = torch.empty(len(captions), 2)
        mask_of_one = torch.ones(1, 1, dtype=torch.int64, device=pictures.device)
        runs = self.window.runs(captions.unique())
        for turn in range(self._most(len(runs))):
            run = runs[turn] if turn < len(runs) else captions[:0]
            self.window.hold(run)
            inside = torch.isin(captions, run).nonzero()[:, 0]
            batches = self._batches(inside, whose, captions)
            for number in range(self._most(len(batches))):
                if number < len(batches):
                    pairs = batches[number]
                    text = self.window.tokens(captions[pairs])
                    picture = pictures[int(whose[pairs[0]])]
                    logits[pairs] = match_read(self.model.fusion, *text, picture).float().cpu()
                    on_pairs(len(pairs))
                else:  # another rank has more
                    word = pictures.new_zeros(1, 1, self.window.width), mask_of_one
                    match_read(self.model.fusion, *word, pictures[0])
        return logits

    def _batches(self, inside: Tensor, whose: Tensor, captions: Tensor) -> list[Tensor]:
        """Pairs of one picture with captions of alike length."""
        key = whose[inside] * (int(self.window.lengths.max()) + 1) + self.window.lengths[captions[inside]]
        inside = inside[key.argsort(stable=True)]
        _, counts = whose[inside].unique_consecutive(return_counts=True)
        return [part for own in inside.split(counts.tolist()) for part in own.split(min(PAIRS, self.batch_size))]

    def _most(self, count: int) -> int:
        return max(self.ranks.gather_objects(count))


class CaptionWindow:
    """Captions as the fusion encoder has read them before it sees a picture (`read_captions`), as many as
    `window_bytes` hold, packed without padding; a full window is emptied."""

    def __init__(
        self,
        model: DualEncoder,
        captions: list[str],
        preprocess: Preprocess,
        ranks: Ranks,
        batch_size: int,
        window_bytes: int = WINDOW_BYTES,
    ):
        self.model, self.captions, self.preprocess = model, captions, preprocess
        self.ranks, self.batch_size = ranks, batch_size
        parts = range(0, len(captions), 4096)
        masks = [self._tokenise(captions[first : first + 4096])[1] for first in parts]
        self.lengths = torch.cat([mask.sum(1) for mask in masks])
        self.width = model.fusion.width
        dtype = model.visual_projection.weight.dtype
        room = max(window_bytes // (self.width * dtype.itemsize), int(self.lengths.max()))
        self._rows = torch.zeros(min(room, int(self.lengths.sum())), self.width, dtype=dtype, device=ranks.device)
        self._first = torch.full((len(captions),), -1)  # where each held caption begins
        self._used = 0

    def runs(self, captions: Tensor) -> list[Tensor]:
        """Captions in parts that fit into the window, by length."""
        captions = captions[self.lengths[captions].argsort(stable=True)]
        end = self.lengths[captions].cumsum(0)
        runs, start, before = [], 0, 0
        while start < len(captions):
            stop = int(torch.searchsorted(end, before + len(self._rows), right=True))
            runs.append(captions[start:stop])
            start, before = stop, int(end[stop - 1])
        return runs

    def hold(self, captions: Tensor) -> None:
        """Encode those of a run that are not held yet; in step with the other ranks."""
        missing = self.missing(captions)
        if self._used + int(self.lengths[missing].sum()) > len(self._rows):
            self._first.fill_(-1)
            self._used, missing = 0, captions
        batches = list(missing.split(self.batch_size)) if len(missing) else []
        for number in range(max(self.ranks.gather_objects(len(batches)))):
            rows = batches[number] if number < len(batches) else captions[:0]
            ids, mask = self._tokenise([self.captions[row] for row in rows.tolist()] or ["empty"])
            device = self.ranks.device
            _, tokens = self.model.text_tokens(ids.to(device), mask.to(device))
            read = read_captions(self.model.fusion, tokens, mask.to(device))
            lengths = self.lengths[rows]
            packed = read[mask.bool().to(device)][: int(lengths.sum())]
            if len(rows):
                self._rows[self._used : self._used + len(packed)] = packed
                self._first[rows] = self._used + lengths.cumsum(0) - lengths
                self._used += len(packed)

    def missing(self, captions: Tensor) -> Tensor:
        """Those that are not held."""
        return captions[self._first[captions] < 0]

    def tokens(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        """(p, L, width) and mask (p, L) of captions that are held; what is masked repeats a caption's last token."""
        lengths = self.lengths[captions][:, None]
        place = torch.arange(int(lengths.max()))
        rows = self._first[captions][:, None] + place.minimum(lengths - 1)
        mask = (place < lengths).long()
        return self._rows[rows.to(self._rows.device)], mask.to(self._rows.device)

    def _tokenise(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        return tokenise(self.preprocess.tokenizer, captions, self.preprocess.max_length)
