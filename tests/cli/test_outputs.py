"""Files that commands write at their end: found to be impossible before the work, not after it."""

from pathlib import Path

import pytest

from vlscale.cli import main
from vlscale.cli.outputs import prepare


def test_the_folder_is_made_and_what_cannot_be_written_is_one_line(tmp_path):
    prepare("--json", None)
    prepare("--json", tmp_path / "new/deeper/x.json")
    assert (tmp_path / "new/deeper").is_dir()
    with pytest.raises(ValueError, match=r"--json .*new is a folder; name a file in it"):
        prepare("--json", tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--json .*its folder cannot be made \(Not a directory\); name another"):
        prepare("--json", tmp_path / "file/below/x.json")
    with pytest.raises(ValueError, match=r"--json /proc/x\.json: its folder takes no files \(.*\); name another"):
        prepare("--json", Path("/proc/x.json"))  # whatever permissions say


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--json", "eval no-model --data no-shards.tar"),
        ("--out", "report no-run"),
        ("--html", "search no-model disc --index no-index.npz"),
        ("--json", "data check no-shards.tar"),
        ("--sheet", "data check no-shards.tar"),
    ],
)
def test_it_is_the_first_thing_that_a_command_looks_at(tmp_path, capsys, option, words):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main([*words.split(), option, str(tmp_path / "file/below/x")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {option} ")


def test_a_report_misses_a_run_before_it_embeds_another(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit):
        main(
            [
                "report",
                str(tmp_path / "run"),
                str(tmp_path / "gone"),
                "--data",
                "x.tar",
                "--out",
                str(tmp_path / "r.html"),
            ]
        )
    assert "gone is no folder; expected runs" in capsys.readouterr().err
