"""Log lines of a run: one logger, on stderr, rank 0 speaks unless a line concerns one rank. No line holds a secret."""

import logging
import os
import re
import sys

HIDDEN = "***"
_NAMES = r"(?<![a-z])(?:token|secret|password|passwd|api[_-]?key|access[_-]?key)"
_KEYS = re.compile(
    r"token|(?:.*[_-])?(?:secret|password|passwd|api[_-]?key|access[_-]?key|(?:auth|access|hub|hf)[_-]?token)"
)
_URL = r"\b[a-z][a-z0-9+.-]*://"
_SECRETS = (  # each with what stays of it
    (re.compile(rf"({_URL})[^\s/@'\"]+@", re.I), rf"\1{HIDDEN}@"),  # user name and password
    (re.compile(rf"((?!file:){_URL}[^\s?'\"<>]*\?)[^\s'\"<>)\]}}]+", re.I), rf"\1{HIDDEN}"),  # a signed url's query
    (re.compile(r"\b((?:Bearer|Basic)\s+)[\w.~+/=-]{6,}", re.I), rf"\1{HIDDEN}"),
    (re.compile(rf"({_NAMES}['\"]?\s*[=:]\s*['\"]?)[^\s'\",&]+", re.I), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:hf_|ghp_|github_pat_|AKIA|ASIA|sk-)\w{12,}"), HIDDEN),
)


def get_logger() -> logging.Logger:
    return logging.getLogger("vlscale")


def without_secrets(text: str) -> str:
    """Passwords, tokens and queries of urls hidden: for whatever is logged, kept in a run or shown."""
    for pattern, kept in _SECRETS:
        text = pattern.sub(kept, text)
    return text


def names_secret(key: str) -> bool:
    """Whether a setting of that name is one: `api_key`, but not `pad_token`."""
    return _KEYS.fullmatch(key.lower()) is not None


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


def setup_logging() -> None:
    """Plain lines on stderr for `vlscale`; other libraries only from warnings up."""
    logger = get_logger()
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING)
