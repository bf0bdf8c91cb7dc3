"""Log lines of a run: one logger, on stderr, rank 0 speaks unless a line concerns one rank."""

import logging
import os
import sys


def get_logger() -> logging.Logger:
    return logging.getLogger("vlscale")


def setup_logging() -> None:
    """Plain lines on stderr for `vlscale`; other libraries only from warnings up."""
    logger = get_logger()
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING)
