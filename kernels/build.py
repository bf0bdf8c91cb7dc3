"""Builds and finds the CUDA C++ library of csrc/: once for a machine at first use, or ahead by setup.py.

The library has a plain C interface and its own copy of the CUDA runtime, so one build serves any torch. Only the
standard library is imported here: setup.py runs this file by itself, without torch. One source file, so nvcc is called
directly. `$XDG_CACHE_HOME/vlscale/kernels` (~/.cache where unset) keeps a build per source, architecture and nvcc.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

CSRC = Path(__file__).with_name("csrc")
SOURCES = (CSRC / "preprocess.cu", CSRC / "preprocess_core.h")
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC")
AHEAD = "VLSCALE_BUILD_CUDA"  # architectures for setup.py to build: "80 90a 100"
_ARCH = re.compile(r"(\d+)(\d)([af]?)")


def find_nvcc() -> Path | None:
    """The CUDA compiler: of CUDA_HOME, then of PATH, then of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    found = [Path(home) / "bin" / "nvcc"] if home else []
    found += [Path(path) for path in [shutil.which("nvcc")] if path]
    return next((path for path in [*found, Path("/usr/local/cuda/bin/nvcc")] if os.access(path, os.X_OK)), None)


@cache
def nvcc_version(nvcc: Path) -> str:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", said).group(1)


def parse_archs(text: str) -> list[str]:
    """'80 90a,100' -> ['80', '90a', '100']."""
    archs = re.split(r"[\s,;]+", text.strip())
    for arch in archs:
        if not _ARCH.fullmatch(arch):
            raise ValueError(f"{AHEAD}: expected compute capabilities such as '80 90a 100', got {text!r}")
    return archs


def digest() -> str:
    """Of the sources and flags: what a library was made from."""
    parts = [path.read_bytes() for path in SOURCES] + [" ".join(FLAGS).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def compile_library(out: Path, archs: Sequence[str], nvcc: Path | None = None) -> Path:
    """Machine code for every one of `archs` in one library; appears whole or not at all."""
    nvcc = nvcc or find_nvcc()
    if nvcc is None:
        raise ValueError("nvcc: expected the CUDA compiler in CUDA_HOME, PATH or /usr/local/cuda, got none; install it")
    out.parent.mkdir(parents=True, exist_ok=True)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        unfinished = Path(folder) / "library.so"
        command = [str(nvcc), *FLAGS, *targets, "-o", str(unfinished), str(SOURCES[0])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {SOURCES[0].name}: {' '.join(command)}\n{done.stdout}{done.stderr}")
        unfinished.replace(out)
    return out


def ahead_name(archs: Sequence[str]) -> str:
    return f"preprocess-{digest()}-{'_'.join(archs)}.so"


def runs_on(built_for: str, capability: tuple[int, int]) -> bool:
    """Machine code of '80' runs on 8.x from 8.0 up, of '90a' on 9.0 alone, of '100f' on the family 10.x."""
    major, minor, kind = _ARCH.fullmatch(built_for).groups()
    least = (int(major), int(minor))
    return capability == least if kind == "a" else capability[0] == least[0] and capability >= least


def built_ahead(capability: tuple[int, int], folder: Path = CSRC) -> Path | None:
    """A library that setup.py put beside the sources, made from these very sources, for this device."""
    for path in sorted(folder.glob(f"preprocess-{digest()}-*.so")):
        if any(runs_on(arch, capability) for arch in path.stem.rsplit("-", 1)[1].split("_")):
            return path
    return None


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlscale" / "kernels"


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds a lock file: one process builds, the others wait and find its work. Where the file system has no locks,
    all build; what appears is whole either way."""
    import fcntl  # here, since setup.py also runs where there is none

    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def library_for(capability: tuple[int, int]) -> Path:
    """The library for a device of compute capability (major, minor), built now if there is none."""
    if ahead := built_ahead(capability):
        return ahead
    nvcc = find_nvcc()
    if nvcc is None:
        raise ValueError(
            "nvcc: expected the CUDA compiler in CUDA_HOME, PATH or /usr/local/cuda, got none; install it, or install "
            f"vlscale with {AHEAD}='{capability[0]}{capability[1]}' where there is one"
        )
    arch = f"{capability[0]}{capability[1]}"
    out = cache_folder() / f"preprocess-{digest()}-{arch}-nvcc{nvcc_version(nvcc)}.so"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with _alone(out.with_suffix(".lock")):
            if not out.exists():
                compile_library(out, [arch], nvcc)
    return out
