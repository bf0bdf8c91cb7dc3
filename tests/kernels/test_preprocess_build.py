"""The CUDA library is built for every architecture, once a machine, whole or not at all; ahead by setup.py if asked.

A stand-in nvcc, a shell script that notes its calls, shows who builds and when; the real one runs where there is one.
"""

import ctypes
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from vlscale.kernels import build

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; fi
echo "$@" >> {calls}
sleep 1
while [ "$1" != -o ]; do shift; done
echo {content} > "$2"
exit {code}
"""


def stand_in(folder: Path, code: int = 0) -> Path:
    """A CUDA_HOME with an nvcc that notes its arguments in calls.txt and ends with `code`."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(STAND_IN.format(calls=folder / "calls.txt", content="library", code=code))
    nvcc.chmod(0o755)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CUDA_HOME", str(stand_in(tmp_path / "cuda")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cuda"


@pytest.mark.skipif(build.find_nvcc() is None, reason="no CUDA compiler here")
def test_nvcc_builds_for_every_architecture(tmp_path):
    archs = ["80", "90a", "100"]
    library = build.compile_library(tmp_path / build.ahead_name(archs), archs)
    loaded = ctypes.CDLL(str(library))
    assert loaded.vlscale_preprocess and loaded.vlscale_error
    found = find_spec("triton")
    tool = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if found else Path()
    if not tool.is_file():
        pytest.skip("no cuobjdump here")
    said = subprocess.run([tool, "--dump-resource-usage", library], capture_output=True, text=True, check=True).stdout
    assert [arch for arch in archs if f"arch = sm_{arch}\n" in said] == archs
    kernels = [line for line in said.splitlines() if "REG:" in line]
    assert len(kernels) == 6 * len(archs)  # two filters, three types
    for line in kernels:
        used = dict(part.split(":") for part in line.split() if part.count(":") == 1)
        assert int(used["REG"]) <= 128 and used["STACK"] == "0" and used["LOCAL"] == "0"


def test_several_processes_build_once(home, tmp_path):
    code = "from vlscale.kernels.build import library_for; print(library_for((9, 0)))"
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    (path,) = {rank.communicate()[0].strip() for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    (call,) = (home / "calls.txt").read_text().splitlines()
    assert "-gencode=arch=compute_90,code=sm_90" in call
    assert Path(path).read_text() == "library\n" and Path(path).is_relative_to(tmp_path / "cache")
    assert build.library_for((9, 0)) == Path(path)
    assert build.library_for((8, 0)) != Path(path)
    assert len((home / "calls.txt").read_text().splitlines()) == 2


def test_a_changed_source_is_built_anew(home, tmp_path, monkeypatch):
    before = build.library_for((9, 0))
    changed = tmp_path / "changed.h"
    changed.write_text("// another program")
    monkeypatch.setattr(build, "SOURCES", (*build.SOURCES, changed))
    assert build.library_for((9, 0)) != before


def test_a_failed_build_says_what_nvcc_said_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(stand_in(tmp_path / "cuda", code=1)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match=r"nvcc failed on preprocess\.cu"):
        build.library_for((9, 0))
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(ValueError, match="VLSCALE_BUILD_CUDA='90'"):
        build.library_for((9, 0))


def test_a_library_built_ahead_serves_the_devices_that_it_was_built_for(tmp_path):
    ahead = tmp_path / build.ahead_name(["80", "90a", "100f"])
    ahead.touch()
    (tmp_path / "preprocess-0123456789abcdef-75.so").touch()  # of other sources
    served = {(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3)}
    for capability in served | {(7, 5), (12, 0)}:
        assert build.built_ahead(capability, tmp_path) == (ahead if capability in served else None)


@pytest.mark.parametrize("text", ["", "sm_90", "90,x"])
def test_unreadable_architectures(text):
    with pytest.raises(ValueError, match="expected compute capabilities such as '80 90a 100'"):
        build.parse_archs(text)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_wheel_holds_the_sources_and_what_was_built_ahead(home, tmp_path, ahead):
    """Built from a copy of what packaging reads; the tree stays as it is."""
    source = tmp_path / "source"
    listed = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, files):
        if not name.startswith(("tests/", "docs/", "benchmarks/results/")):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    environment = os.environ | ({build.AHEAD: "80 90a"} if ahead else {})
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(command, check=True, env=environment)
    (wheel,) = tmp_path.glob("vlscale-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"vlscale/_kernels/csrc/{path.name}" for path in build.SOURCES} <= names
    assert {f"vlscale/_benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("kernels_bench*.py")} <= names
    library = f"vlscale/_kernels/csrc/{build.ahead_name(['80', '90a'])}"
    assert (library in names) == ahead
    assert wheel.stem.endswith("-none-any") != ahead
