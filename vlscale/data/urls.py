"""From what a user writes (paths, brace lists, globs) to the shards it names, in a fixed order."""

import glob
import os

import braceexpand

from vlscale.data.storage import SCHEMES, path_of, scheme_of
from vlscale.logging import HIDDEN


def expand(urls: list[str] | str | None, what: str = "data.train", *, pipes: str | None = None) -> list[str]:
    """Paths of all shards: braces in the order written, globs sorted. Every pattern has to match something.

    `pipes`: where commands' output is kept, which is what allows them; None: they are refused.
    """
    if not urls:
        raise ValueError(
            f"{what} is not given: expected shards, for example {what}=FOLDER/train-{{000000..000007}}.tar"
        )
    shards: list[str] = []
    for pattern in [urls] if isinstance(urls, str) else urls:
        if "::" in pattern and scheme_of(pattern) != "pipe":
            raise ValueError(f"{what}: '::' joins nothing here, in {pattern}; {_as_list(pattern.split('::'), what)}")
        for url in braceexpand.braceexpand(pattern, escape=False):
            _check_whole(url, what)
            shards += [url] if pipes is not None and scheme_of(url) == "pipe" else _matches(url, pattern, what)
    repeated = next((url for url in shards if shards.count(url) > 1), None) if len(set(shards)) < len(shards) else None
    if repeated:
        raise ValueError(f"{what}: shard {repeated} is named twice; name each shard once")
    return shards


def expand_sources(
    urls: list[str] | None, what: str = "data.train", *, pipes: str | None = None
) -> tuple[list[str], list[int]]:
    """The shards of all entries, and for each shard the number of the entry that names it."""
    parts = [expand([url], what, pipes=pipes) for url in urls or []]
    expand(urls, what, pipes=pipes)  # the checks over all of them
    return [shard for part in parts for shard in part], [number for number, part in enumerate(parts) for _ in part]


def _as_list(patterns: list[str], what: str) -> str:
    quoted = ", ".join(f'"{pattern.strip()}"' for pattern in patterns)  # braces would be read as YAML's otherwise
    return f"several are a list: {what}='[{quoted}]'"


def _check_whole(url: str, what: str) -> None:
    if HIDDEN in url and scheme_of(url) not in (None, "file"):
        raise ValueError(
            f"{what}: the credentials in {url} were left out when it was kept; give the whole url again, or "
            "credentials by the environment or the files of the store's own tools"
        )


def _matches(url: str, pattern: str, what: str) -> list[str]:
    scheme = scheme_of(url)
    if scheme is not None and scheme not in SCHEMES:
        allow = ", or data.allow_pipe=true with data.cache_dir set" if scheme == "pipe" else ""
        raise ValueError(
            f"{what}: scheme {scheme!r} of {url} is not allowed; expected a path or {', '.join(SCHEMES)}{allow}"
        )
    if scheme == "file":
        url = path_of(url)
    elif scheme is not None:
        if glob.has_magic(url):
            raise ValueError(
                f"{what}: {url} has a wildcard, which only paths may have; write braces: {{000000..000127}}"
            )
        return [url]
    path = os.path.expanduser(url)
    if os.path.isdir(path):
        found = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
    else:
        found = sorted(glob.glob(path)) if glob.has_magic(path) else [path] * os.path.isfile(path)
    if not found:
        among = "" if url == pattern else f", of {pattern!r}"
        several = "," in pattern and "{" not in pattern
        hint = _as_list(pattern.split(","), what) if several else "check the path"
        raise ValueError(f"{what}: no shard matches {url!r}{among}; expected existing .tar files, {hint}")
    return found
