"""The package imports in every way that people have it: checkout, editable, wheel; from any folder.

The wheel is installed into an empty environment. Dependencies come from this environment's site-packages through
PYTHONPATH, where `.pth` files (an editable vlscale among them) have no effect.
"""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = sysconfig.get_paths()["purelib"]
SIX = "contrastive_loss, relation_kl_loss, relation_match_loss, retrieval_ranks, sigmoid_loss, topk_neighbors"
IMPORT = (
    f"from vlscale.kernels import {SIX}; import torch, vlscale\n"
    "x = torch.eye(3, requires_grad=True)\n"
    "contrastive_loss(x, x, 10.0).backward()\n"
    "print(vlscale.__file__)"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what git would check out, so that nothing is left in the tree."""
    source = tmp_path_factory.mktemp("source")
    listed = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, files):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True)
    (built,) = out.glob("vlscale-*.whl")
    return built


@pytest.fixture(scope="module")
def empty_environment(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin" / "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    return folder


def run(python: Path | str, *arguments: str, cwd: Path, path: str = "") -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path:
        environment["PYTHONPATH"] = path
    done = subprocess.run([python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("folder", ["elsewhere", "checkout"])
def test_the_wheel_imports_from_any_folder(empty_environment, tmp_path, folder):
    """In the checkout `vlscale` of the working folder comes first, with the kernels beside it."""
    cwd = tmp_path if folder == "elsewhere" else ROOT
    where = run(empty_environment / "bin" / "python", "-c", IMPORT, cwd=cwd, path=SITE)
    assert where.startswith(str(empty_environment if folder == "elsewhere" else ROOT))


def test_the_checkout_imports_uninstalled(tmp_path):
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {SITE!r}]\n{IMPORT}"
    assert run(sys.executable, "-S", "-c", code, cwd=tmp_path).startswith(str(ROOT))


def test_the_editable_install_imports_from_any_folder(tmp_path):
    assert run(sys.executable, "-c", IMPORT, cwd=tmp_path).startswith(str(ROOT))


def test_the_wheel_holds_what_the_commands_need(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    needed = ["vlscale/_configs/demo.yaml", "vlscale/_launch/train.py", "vlscale/report/templates/report.html"]
    needed += [f"vlscale/_kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")]
    assert set(needed) <= names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "launch/", "configs/"))]


def test_the_installed_command_answers_and_finds_its_files(empty_environment, tmp_path):
    assert "demo" in run(empty_environment / "bin" / "vlscale", "--help", cwd=tmp_path, path=SITE)
    code = "from vlscale.resources import *; print(configs_folder() / 'demo.yaml', launch_folder() / 'train.py')"
    for path in run(empty_environment / "bin" / "python", "-c", code, cwd=tmp_path, path=SITE).split():
        assert Path(path).is_file()
