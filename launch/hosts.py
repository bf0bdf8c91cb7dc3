"""`deepspeed` for the machines of a hostfile, all tried first: one line names those that ssh does not reach.

python launch/hosts.py --hostfile FILE [deepspeed's options] launch/train.py CONFIG --out DIR [key=value ...]

DeepSpeed itself tries the first one alone, ends in a traceback where it does not answer, and misses the others after
`engine.timeout_seconds`. Its own launcher then takes this process's place.
"""

import os
import sys
from pathlib import Path

from deepspeed.launcher.runner import fetch_hostfile, parse_args, parse_inclusion_exclusion

from vlscale.train.doctor_ranks import check_hosts, check_pdsh, read_hostfile


def check_machines(arguments: list[str]) -> None:
    """Raises ValueError where deepspeed, given these arguments, would not start a rank on every machine."""
    given = parse_args(arguments)
    read_hostfile(Path(given.hostfile))
    wanted = parse_inclusion_exclusion(fetch_hostfile(given.hostfile), given.include, given.exclude)
    hosts = list(wanted)[: given.num_nodes if given.num_nodes > 0 else None]
    if given.no_ssh:
        return
    check_hosts(hosts, given.ssh_port)
    if given.launcher == "pdsh":
        check_pdsh(hosts)


if __name__ == "__main__":
    try:
        check_machines(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    os.execv(sys.executable, [sys.executable, "-m", "deepspeed.launcher.runner", *sys.argv[1:]])
