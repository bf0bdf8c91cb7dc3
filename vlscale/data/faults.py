"""What can be wrong with data: one sample (skipped, counted, named) or a whole shard (the run stops)."""

MOST_TOLD = 100  # samples or pictures that the log names; it says how many more there are


class BadSample(ValueError):
    """A sample that cannot train. `kind` is a short word for counting; the message says what was found."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class BadShard(ValueError):
    """A shard that cannot be read, or is not what the manifest says."""


class DamagedShard(BadShard):
    """A shard that is no complete tar: a property of its bytes, so every process finds the same."""


class UnreadableShard(BadShard):
    """A shard that could not be read while the stream was running, after all tries; `shard` is its place in the
    manifest. Other ranks may still be able to read it."""

    def __init__(self, shard: int, message: str):
        super().__init__(shard, message)
        self.shard, self.message = shard, message

    def __str__(self) -> str:
        return self.message
