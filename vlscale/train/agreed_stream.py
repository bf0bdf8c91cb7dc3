"""The stream when a shard may fall out: what one rank cannot read, all ranks leave out, from the same batch on.

Ranks ask each other before every batch is handed out, one small all_reduce. So the batches stay a function of the data,
the seed and the shards that were lost when, which the stream's state tells: a resumed run leaves them out too.
"""

from collections.abc import Generator, Iterator
from contextlib import closing

import torch

from vlscale.data.batch import Batch
from vlscale.data.faults import UnreadableShard
from vlscale.data.stream import StreamState, TrainStream
from vlscale.distributed import Ranks
from vlscale.logging import get_logger


class AgreedStream:
    """As the TrainStream that it is given, of which each rank has its own."""

    def __init__(self, stream: TrainStream, ranks: Ranks):
        self._stream, self._ranks = stream, ranks

    def __iter__(self) -> Iterator[Batch]:
        while True:
            with closing(iter(self._stream)) as batches:
                lost, state = yield from self._until_one_is_lost(batches)
            self._stream.quarantine(lost, state)

    def _until_one_is_lost(self, batches: Iterator[Batch]) -> Generator[Batch, None, tuple[set[int], StreamState]]:
        """Hands out batches; returns the shards that some rank cannot read, and the state of the batch before."""
        while True:
            state, batch, fault = self._stream.state, None, None
            try:
                batch = next(batches)
            except UnreadableShard as error:
                fault = error.shard, str(error)
            faults = self._ranks.sum(torch.tensor(int(fault is not None), device=self._ranks.device))
            if int(faults) == 0:
                yield batch
                continue
            found = [each for each in self._ranks.gather_objects(fault) if each is not None]
            for _, message in found:
                get_logger().warning("data.unreadable_shards=quarantine: left out from here on: %s", message)
            return {shard for shard, _ in found}, state
