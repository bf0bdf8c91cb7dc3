"""Files that a command writes when its work is done: whether it can, is found before."""

import tempfile
from pathlib import Path


def prepare(option: str, path: Path | None) -> None:
    """Makes the folder of the file that `option` names. Raises ValueError where the file could not be written."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} {path}: its folder cannot be made ({error.strerror}); name another") from None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".vlscale-"):
            pass
    except OSError as error:  # permissions alone do not tell of a full disk or a server's own rules
        raise ValueError(f"{option} {path}: its folder takes no files ({error.strerror}); name another") from None
