"""Where the files beside the package are: in a checkout at its root, in an installed wheel inside the package."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent


def configs_folder() -> Path:
    return _folder("configs")


def launch_folder() -> Path:
    return _folder("launch")


def benchmarks_folder() -> Path:
    return _folder("benchmarks")


def _folder(name: str) -> Path:
    in_checkout = (CHECKOUT / "setup.py").is_file() and (CHECKOUT / name).is_dir()
    return CHECKOUT / name if in_checkout else PACKAGE / f"_{name}"
