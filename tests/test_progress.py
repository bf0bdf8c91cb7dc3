"""Progress: lines where there is no terminal, a bar with rate and time left where there is one, silence when asked."""

import logging
import pty
import subprocess
import sys
from os import close, read

from vlscale.progress import Progress


def test_lines_come_every_so_often_and_at_the_end(caplog):
    caplog.set_level(logging.INFO, logger="vlscale")
    with Progress("run", 7, "pairs", done=2, lines_every=3) as progress:
        for _ in range(5):
            progress.advance(units=32, note="loss 1.0")
    lines = caplog.messages
    assert [line.split("  ")[1] for line in lines] == ["3/7", "6/7", "7/7"]
    assert all("loss 1.0" in line and "pairs/s" in line for line in lines)
    assert lines[-1].endswith("0:00 left")


def test_lines_come_by_the_clock_where_there_are_no_steps(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="vlscale")
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("vlscale.progress.time.monotonic", lambda: next(clock))
    with Progress("embedding", None, "samples", line_seconds=20) as progress:
        progress.advance(0)
        progress.expect(8)
        for _ in range(8):
            progress.advance()
    assert [line.split("  ")[1] for line in caplog.messages] == ["2/8", "5/8", "8/8"]


def test_nothing_is_said_when_not_shown(caplog):
    caplog.set_level(logging.INFO, logger="vlscale")
    with Progress("run", 2, "pairs", shown=False, lines_every=1) as progress:
        progress.advance(2)
    assert caplog.messages == []


def test_a_terminal_gets_a_bar():
    code = (
        "from vlscale.progress import Progress\n"
        "with Progress('embedding', None, 'samples') as bar:\n"
        "    bar.expect(4)\n"
        "    bar.advance(4)\n"
    )
    master, slave = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=slave, check=True)
    close(slave)
    shown = b""
    try:
        while chunk := read(master, 65536):
            shown += chunk
    except OSError:  # the terminal's end, on Linux
        pass
    close(master)
    assert b"embedding" in shown and b"4/4" in shown and b"samples/s" in shown and b"\xe2\x94\x81" in shown
