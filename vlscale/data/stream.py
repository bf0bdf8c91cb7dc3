"""The training stream: an endless row of `Batch`, the same whatever the ranks, exactly resumable.

Global batch t is lane 0's next samples, then lane 1's, and so on; a rank owns a run of lanes. Batches are made ahead in
a thread, but each carries the state that belongs to it, so what was made ahead and not used is not lost.
"""

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vlscale.data.ahead import Ahead
from vlscale.data.batch import Batch, PackedPictures
from vlscale.data.fast_tokens import TokenRows, state_of
from vlscale.data.faults import MOST_TOLD
from vlscale.data.images import ImageSpec, Piece
from vlscale.data.lanes import LANE_STATE, StreamState, choose_lanes, merge_states
from vlscale.data.loader import LoaderJob, Part, PartLoader, Views
from vlscale.data.manifest import Manifest, build_manifest
from vlscale.data.tokens import padded, tokenise_and_count
from vlscale.data.urls import expand_sources
from vlscale.data.worker import WorkerPool
from vlscale.logging import get_logger
from vlscale.sections import DataConfig

__all__ = ["StreamState", "TrainStream", "merge_states", "open_train_corpus"]

_LONGEST = 512  # tokens, for tokenizers that name no length


def open_train_corpus(data: DataConfig, rank: int = 0, world_size: int = 1) -> Manifest:
    """The shards of data.train, with the source of each where there are weights. Ranks share the indexing; the first
    one says what was left out."""
    shards, sources = expand_sources(data.train, pipes=data.pipes)
    manifest = build_manifest(shards, data, first=len(shards) * rank // world_size, tell=rank == 0)
    return manifest if data.weights is None else replace(manifest, sources=np.array(sources))


class TrainStream:
    """Rank `rank`'s part of the stream. `state` continues exactly after the batch that carried it.

    A state may hold more lanes than this rank's (`merge_states` of all ranks), so a run goes on at any world size that
    divides the lanes. `teacher_cache`: a folder of `vlscale data teach`, whose rows join the batches by sample key.
    `device`: where batches go; for a GPU they are made in page-locked memory. `manifest`: what `open_train_corpus`
    found, where that is known already.
    """

    def __init__(
        self,
        data: DataConfig,
        spec: ImageSpec,
        tokenizer,
        *,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        state: StreamState | None = None,
        second_view: bool = False,
        second_caption: bool = False,
        max_length: int | None = None,
        teacher_cache: str | None = None,
        device: torch.device | None = None,
        manifest: Manifest | None = None,
    ):
        self.device = device or torch.device("cpu")
        self.data, self.spec, self.tokenizer = data, spec, tokenizer
        self.max_length = max_length or min(tokenizer.model_max_length, _LONGEST)
        lanes = choose_lanes(global_batch_size, world_size, data.lanes)
        self.manifest = manifest or open_train_corpus(data, rank, world_size)
        if global_batch_size > self.manifest.num_samples:
            raise ValueError(
                f"train.global_batch_size={global_batch_size} is larger than the corpus of {self.manifest.num_samples} "
                "samples; lower it or add shards"
            )
        self.global_batch_size = global_batch_size
        self.per_lane, self.lanes_here = global_batch_size // lanes, lanes // world_size
        self.first_lane, self.first_position = rank * self.lanes_here, rank * self.lanes_here * self.per_lane
        self.views, self.teacher_cache = Views(second_view, second_caption), teacher_cache
        weights = tuple(data.weights or [1.0])
        rows = np.zeros((lanes, len(weights)), LANE_STATE)
        fresh = StreamState(self.manifest.hash, seed, lanes, data.window, 0, 0, weights, rows, data.length_buckets)
        if state is None:
            state = fresh
        elif state.manifest != fresh.manifest and data.changed_shards == "next_epoch":
            state = state.next_epoch(fresh.manifest)
        self.state = _continue(state, fresh).part(self.first_lane, self.lanes_here)
        self._told: set[str] = set()  # faults that the log has named

    def __iter__(self) -> Iterator[Batch]:
        """Goes on after the last batch that was handed out."""
        made: Ahead[Batch | BaseException] = Ahead(self.data.prefetch, self.data.read_ahead_mb * 1e6)
        thread = threading.Thread(target=self._make, args=(self.state, made), name="vlscale-stream", daemon=True)
        thread.start()
        try:
            while True:
                batch = made.get()
                if isinstance(batch, BaseException):
                    raise batch
                self.state = batch.state
                yield batch
        finally:
            made.close()
            thread.join()

    def quarantine(self, shards: set[int], state: StreamState) -> None:
        """Go on after `state`, a batch's or that of the start, without these shards; all ranks have to do so together.
        What was made ahead is made again: the next iterator begins there."""
        lost = sorted({*state.quarantined, *shards})
        for counts in self.manifest.source_counts():
            if counts.sum() and not np.delete(counts, lost).sum():
                raise ValueError(
                    f"{len(lost)} of {len(self.manifest.urls)} shards cannot be read, and a source has no other; "
                    f"the last is {self.manifest.urls[lost[-1]]}"
                )
        self.state = replace(state, quarantined=tuple(lost))

    def _make(self, state: StreamState, made: Ahead) -> None:
        """Runs in the thread: batches, or the exception that ended it, into `made`."""
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a thread begins on the first one
            job = LoaderJob(
                self.manifest, self.data, self.spec, self.views,
                lanes=state.lanes, seed=state.seed, first=state.first, states=state.rows, weights=state.weights,
                per_lane=self.per_lane, quarantined=frozenset(state.quarantined), teacher_cache=self.teacher_cache,
                tokenizer=state_of(self.tokenizer, self.max_length),
            )  # fmt: skip
            loader = WorkerPool(job, self.data.workers) if self.data.workers else PartLoader(job)
            try:
                wanted = True
                while wanted:
                    part = loader.next()
                    state = replace(state, samples=state.samples + self.global_batch_size, rows=part.states)
                    batch = self._batch(part, state)
                    batch = batch.pinned() if self.device.type == "cuda" else batch
                    wanted = made.put(batch, _size(batch))
            finally:
                loader.close()
        except Exception as error:
            made.put(error, 0)

    def _batch(self, part: Part, state: StreamState) -> Batch:
        self._tell(part.faults)
        input_ids, attention_mask, cut = self._tokens(part.tokens, part.captions)
        second = (None, None)
        if self.views.second_caption:
            second = self._tokens(part.second_tokens, part.second_captions)[:2]
        return Batch(
            keys=part.keys,
            captions=part.captions,
            positions=torch.arange(self.first_position, self.first_position + len(part.keys)),
            pair_id=torch.tensor(part.pair_id, dtype=torch.int64),
            images=_pictures(part.images),
            input_ids=input_ids,
            attention_mask=attention_mask,
            second_images=None if part.second_images is None else _pictures(part.second_images),
            second_input_ids=second[0],
            second_attention_mask=second[1],
            state=state,
            epoch=state.samples / self.manifest.num_samples if part.progress is None else float(part.progress.mean()),
            skipped=int(part.states["skipped"].sum()),
            second_captions=part.second_captions if self.views.second_caption else None,
            teacher_image=None if part.teacher_image is None else torch.from_numpy(part.teacher_image),
            teacher_text=None if part.teacher_text is None else torch.from_numpy(part.teacher_text),
            truncated=cut,
        )

    def _tell(self, faults: list[str]) -> None:
        """Each once, since a sample comes again in every epoch, and no more than anybody reads."""
        for fault in faults:
            if fault in self._told or len(self._told) > MOST_TOLD:
                continue
            self._told.add(fault)
            if len(self._told) > MOST_TOLD:
                get_logger().warning("more are skipped: `skipped` in metrics.jsonl counts them, no more are named here")
            else:
                get_logger().warning("skipped sample %s", fault)

    def _tokens(self, tokens: TokenRows | None, captions: list[str]) -> tuple[Tensor, Tensor, int]:
        if tokens is None:
            return tokenise_and_count(self.tokenizer, captions, self.max_length)
        return *padded(tokens, self.tokenizer), int(tokens.cut.sum())


def _continue(state: StreamState, fresh: StreamState) -> StreamState:
    """The state to go on from, or an error that says what has changed since it was saved."""
    changed = {
        "the form of the stream's state": (state.rows.dtype.names, fresh.rows.dtype.names),
        "the shards (their manifest)": (state.manifest, fresh.manifest),
        "train.seed": (state.seed, fresh.seed),
        "data.lanes": (state.lanes, fresh.lanes),
        "data.window": (state.window, fresh.window),
        "data.length_buckets": (state.buckets, fresh.buckets),
        "data.weights": (state.weights, fresh.weights),
    }
    for what, (saved, now) in changed.items():
        if saved != now:
            raise ValueError(
                f"cannot resume: {what} changed, the checkpoint has {saved}, this run has {now}; "
                "put it back, start a new run with model.init_from, or for other shards set "
                "data.changed_shards=next_epoch"
            )
    return state


def _pictures(images: np.ndarray | list[Piece]) -> Tensor | PackedPictures:
    if isinstance(images, list):
        return PackedPictures.of(images)
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _size(batch: Batch) -> int:
    """Bytes of its tensors."""
    return sum(value.nbytes for value in vars(batch).values() if isinstance(value, Tensor | PackedPictures))
