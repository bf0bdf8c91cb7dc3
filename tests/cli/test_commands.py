"""Every command has help; the demo's folder; the launcher passes exit codes on."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlscale.cli import app
from vlscale.cli.bench import SCRIPTS
from vlscale.cli.demo import MARKER, claim_folder
from vlscale.resources import launch_folder

COMMANDS = [
    "",
    "demo",
    "train",
    "eval",
    "embed",
    "search",
    "export",
    "report",
    "doctor",
    "replay",
    "data teach",
    "data",
    "data synth",
    "data import emoji",
    "data check",
    "data index",
    "import",
    "import open-clip",
]


def test_bench_lists_its_benchmarks_and_passes_arguments_on():
    assert "kernels" in CliRunner().invoke(app, ["bench"]).output
    command = [sys.executable, "-m", "vlscale", "bench"]
    for name in SCRIPTS:
        done = subprocess.run([*command, name, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and "usage" in done.stdout.lower(), (name, done.stderr)
    done = subprocess.run([*command, "speed"], capture_output=True, text=True)
    assert done.returncode == 2 and "choose from: kernels" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    done = CliRunner().invoke(app, [*command.split(), "--help"])
    assert done.exit_code == 0 and "Usage" in done.output


def test_a_demo_folder_is_replaced_only_when_it_is_a_demos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = claim_folder(None)
    (folder / "old").touch()
    assert not (claim_folder(None) / "old").exists()
    with pytest.raises(ValueError, match="exists; choose a new folder"):
        claim_folder(folder)
    (folder / MARKER).unlink()
    with pytest.raises(ValueError, match="was not made by vlscale demo"):
        claim_folder(None)


def test_launch_train_takes_the_arguments_of_train_and_ignores_local_rank(tmp_path):
    command = [sys.executable, str(launch_folder() / "train.py"), "--local_rank=0", "no.yaml", "--out", "run", "x.y=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == "error: config no.yaml does not exist"
    assert list(Path(tmp_path).iterdir()) == []
