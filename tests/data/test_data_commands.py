"""`vlscale data`: the commands, on small corpora."""

import pytest
from typer.testing import CliRunner

from vlscale.cli.data import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_synth_writes_a_corpus_and_says_so(tmp_path):
    result = run(
        "synth", tmp_path / "out", "--pairs", 30, "--val-pairs", 10, "--preset", "text-noisy", "--never-said", "size"
    )
    assert result.exit_code == 0 and "30 training pairs and 10 held-out pairs" in result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train-000000.tar", "val-000000.tar"]


@pytest.mark.parametrize(
    "command",
    [["synth"], ["index"], ["check"], ["teach"], ["import", "emoji"], ["import", "karpathy"], ["import", "lists"]],
)
def test_every_command_has_help(command):
    assert run(*command, "--help").exit_code == 0


def test_a_wrong_preset_is_the_users_error(tmp_path):
    result = run("synth", tmp_path / "out", "--preset", "dirty")
    assert isinstance(result.exception, ValueError) and not (tmp_path / "out").exists()
