"""What this machine can do for a run, and what would not work: found before a job is spent.

Every finding is a name, what was found, and, where something is in the way, what to change. `fail` means that a run
would not start or not end; `warn` that it would be slow or small.
"""

import os
import platform
import resource
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import cv2
import numpy as np
import simplejpeg
import torch

from vlscale.data.images import NUM_DRAWS, ImageSpec, decode_train
from vlscale.kernels.checks import choose_impl
from vlscale.sections import AugmentConfig

PACKAGES = ("vlscale", "torch", "triton", "deepspeed", "transformers", "webdataset")
TOOLS = {
    "nvcc": "CUDA C++ kernels",
    "ninja": "CUDA C++ kernels",
    "g++": "DeepSpeed's own operators",
    "ssh": "hostfiles",
}
GIB = 1 << 30
OPEN_FILES = 4096  # shards, sockets of ranks and workers
SHARED = 2 * GIB  # /dev/shm, through which batches come from worker processes
DISK = 20 * GIB
DECODE_SECONDS = 0.3  # that measuring a decoder may take
PICTURE = (480, 640)


@dataclass(frozen=True)
class Finding:
    name: str
    value: str
    level: Literal["ok", "warn", "fail"] = "ok"
    change: str | None = None


def examine_machine(folder: str = ".") -> list[Finding]:
    """Everything that needs neither other ranks nor a config; runs and checkpoints would go to `folder`."""
    return [*versions(), *accelerator(), *limits(folder), *decoders(), *tools()]


def versions() -> list[Finding]:
    found = [Finding("python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append(Finding(package, version(package)))
        except PackageNotFoundError:
            needed = package != "triton" or torch.cuda.is_available()
            change = f"pip install -c constraints.txt {package}" if package != "vlscale" else "pip install -e ."
            level = "fail" if needed and package != "vlscale" else "warn"
            found.append(Finding(package, "not installed", level, change))
    return found


def accelerator() -> list[Finding]:
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        change = "runs go to the CPU; for GPUs install the driver" + ("" if torch.version.cuda else " and a CUDA torch")
        bf16 = Finding("bf16", "computed on the CPU, slowly", "warn", "set engine.dtype=fp32 on a CPU")
        return [Finding("GPU", f"none; {built}", "warn", change), bf16]
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        value = f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        level = "ok" if free > 0.9 * total else "warn"
        found.append(
            Finding(f"GPU {index}", value, level, "another process holds memory there" * (level != "ok") or None)
        )
    found.append(
        Finding("CUDA", f"torch {torch.version.cuda}, compute capability {torch.cuda.get_device_capability()}")
    )
    if (impl := choose_impl("auto", torch.device("cuda", 0))) == "triton":
        found.append(Finding("losses", impl))
    else:
        change = "for Triton's kernels take an NVIDIA GPU of compute capability 8.0 or more, and install triton"
        found.append(Finding("losses", impl, "warn", change))
    supported = torch.cuda.is_bf16_supported(including_emulation=False)
    change = None if supported else "set engine.dtype=fp32, or take a GPU of compute capability 8.0 or more"
    return [*found, Finding("bf16", "yes" if supported else "no", "ok" if supported else "warn", change)]


def limits(folder: str) -> list[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    available = _available_memory()
    disk = shutil.disk_usage(folder).free
    found = [
        Finding("CPU cores", str(len(os.sched_getaffinity(0)))),
        Finding("free memory", f"{available / GIB:.1f} GiB"),
        _at_least("open files", files, OPEN_FILES, str(files), f"ulimit -n {OPEN_FILES} before starting"),
        _at_least(
            f"disk at {folder}", disk, DISK, f"{disk / GIB:.1f} GiB free", "checkpoints need room; use another --out"
        ),
    ]
    if os.path.isdir("/dev/shm"):
        shared = shutil.disk_usage("/dev/shm").free
        change = "data.workers use it: docker run --shm-size=8g, or data.workers=0"
        found.append(_at_least("/dev/shm", shared, SHARED, f"{shared / GIB:.1f} GiB free", change))
    return found


def _at_least(name: str, got: int, wanted: int, shown: str, change: str) -> Finding:
    enough = got >= wanted
    return Finding(name, shown, "ok" if enough else "warn", None if enough else change)


def _available_memory() -> int:
    """Bytes that the kernel can give, within the limit of this container."""
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            return min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no limit: the file says `max`
        return free


def decoders() -> list[Finding]:
    """Pictures a second that one core decodes and resizes, of a synthetic photograph of 640 x 480."""
    ramp = np.add.outer(np.arange(PICTURE[0]), np.arange(PICTURE[1]))[..., None] * np.array([1, 2, 3])
    noise = np.random.default_rng(0).integers(0, 16, ramp.shape)
    jpeg = simplejpeg.encode_jpeg((ramp // 8 % 240 + noise).astype(np.uint8), quality=90)
    spec, draws = ImageSpec(224, (0.5,) * 3, (0.5,) * 3), np.full(NUM_DRAWS, 0.5)
    found = []
    for mode, what in (("fast", f"simplejpeg {version('simplejpeg')}, cv2 {cv2.__version__}"), ("pil", "Pillow")):
        count, started = 0, time.perf_counter()
        while (seconds := time.perf_counter() - started) < DECODE_SECONDS:
            decode_train(jpeg, spec, AugmentConfig(), mode, 64_000_000, draws)
            count += 1
        found.append(Finding(f"decode ({mode})", f"{count / seconds:,.0f} pictures/s a core, {what}"))
    return found


def tools() -> list[Finding]:
    found = []
    for tool, use in TOOLS.items():
        path = shutil.which(tool)
        needed = tool != "nvcc" or torch.cuda.is_available()
        level, change = (
            ("ok", None) if path or not needed else ("warn", f"install {tool}: {use} are not there without it")
        )
        found.append(Finding(tool, path or "not found", level, change))
    return found
