"""Input and output errors may pass: a few tries with growing waits, then the shard is bad and says why."""

import time
from collections.abc import Callable
from typing import TypeVar

from vlscale.data.faults import BadShard
from vlscale.logging import get_logger

TRIES = 4
FIRST_WAIT = 0.1  # seconds; doubles with each try


class CacheFull(OSError):
    """The local disk's fault, not the source's: another try would meet it again."""


Result = TypeVar("Result")


def with_retries(action: Callable[[], Result], shard: str) -> Result:
    attempt = 0
    while True:
        try:
            return action()
        except (FileNotFoundError, PermissionError) as error:
            raise BadShard(f"shard {shard} cannot be read: {error.strerror or error}") from error
        except CacheFull:
            raise
        except OSError as error:
            attempt += 1
            if attempt == TRIES:
                raise BadShard(f"shard {shard} cannot be read: {error} (tried {TRIES} times)") from error
            wait = FIRST_WAIT * 2 ** (attempt - 1)
            get_logger().warning("shard %s: %s; next try in %.1f s", shard, error, wait)
            time.sleep(wait)
