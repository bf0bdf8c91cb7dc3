"""`ssh` and `pdsh` for a test of hostfiles: every machine is this one, with nothing of our environment, but for `away`,
which cannot be reached. No tests here."""

import sys
from pathlib import Path

SSH = """#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
host=$1
shift
echo "$host" >> {log}
if [ "$host" = away ]; then
    echo "ssh: connect to host away port 22: No route to host" >&2
    exit 255
fi
case "$*" in
    hostname*) echo 127.0.0.1;;
    *) exec env -i HOME="$HOME" PATH="$PATH" sh -c "$*";;
esac
"""
PDSH = """#!{python}
import subprocess, sys
words = sys.argv[1:]
place = words.index("-w") + 1
command = " ".join(words[place + 1 :])
given = [["ssh", host, command.replace("%n", str(n))] for n, host in enumerate(words[place].split(","))]
sys.exit(max(process.wait() for process in [subprocess.Popen(words) for words in given]))
"""


def stand_in(folder: Path) -> Path:
    """Both in a new folder, for the beginning of PATH; returned is the file to which `ssh` adds the name of every
    machine that it is asked for."""
    folder.mkdir()
    log = folder / "asked.txt"
    for name, text in (("ssh", SSH.format(log=log)), ("pdsh", PDSH.format(python=sys.executable))):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return log
