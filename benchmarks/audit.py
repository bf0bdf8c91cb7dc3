"""Licences and known vulnerabilities of what constraints.txt pins: `python benchmarks/audit.py [--offline] [--strict]`.

Licences come from the metadata of the installed packages; each has to be one of ALLOWED. Known vulnerabilities come
from pip-audit, where it is installed (`pip install pip-audit`) and reaches a service that knows; what could not be
asked for is said and counted, and is an error with `--strict`: nothing passes in silence. Exit code 1 where something
is wrong.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {  # SPDX names: permissive, or copyleft of single files (MPL) that nothing here changes
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-CMU",
    "MPL-2.0", "PSF-2.0", "Zlib",
}  # fmt: skip
SPELLINGS = {  # as older metadata and classifiers have them
    "Apache 2.0": "Apache-2.0", "Apache 2.0 License": "Apache-2.0", "Apache Software License": "Apache-2.0",
    "Apache Software License 2.0": "Apache-2.0", "BSD": "BSD-3-Clause", "BSD License": "BSD-3-Clause",
    "BSD 3-Clause License": "BSD-3-Clause", "ISC License": "ISC", "ISC License (ISCL)": "ISC", "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0", "Python Software Foundation License": "PSF-2.0",
}  # fmt: skip
EXCEPTIONS = {"LLVM-exception"}
TIMEOUT = 300  # seconds
SHOWN = 5  # packages that could not be asked for


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", action="store_true", help="licences alone")
    parser.add_argument("--strict", action="store_true", help="what could not be asked is an error")
    given = parser.parse_args(arguments)
    pins = read_pins(ROOT / "constraints.txt")
    wrong, absent = licence_faults(list(pins))
    print(f"licences: {len(pins) - len(absent)} of {len(pins)} pinned packages looked at, {len(wrong)} not allowed")
    for line in [*wrong, *(f"{name}: not installed here, its licence is not known" for name in absent)]:
        print(f"  {line}")
    if given.offline:
        print("vulnerabilities: NOT CHECKED (--offline)")
        return 1 if wrong or given.strict else 0
    found, unknown = vulnerabilities(ROOT / "constraints.txt", pins)
    asked = len(pins) - len(unknown)
    state = "" if asked == len(pins) else f", NOT CHECKED for {len(unknown)}"
    print(f"vulnerabilities: {asked} of {len(pins)} packages asked for, {len(found)} known{state}")
    more = [f"and {len(unknown) - SHOWN} more that could not be asked for"] if len(unknown) > SHOWN else []
    for line in [*found, *unknown[:SHOWN], *more]:
        print(f"  {line}")
    return 1 if wrong or found or (given.strict and (unknown or absent)) else 0


def read_pins(path: Path) -> dict[str, str]:
    """Package to version."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def licence_faults(names: list[str]) -> tuple[list[str], list[str]]:
    """What is not allowed, and packages that are not installed."""
    wrong, absent = [], []
    for name in names:
        try:
            found = licence_of(name)
        except PackageNotFoundError:
            absent.append(name)
            continue
        if not is_allowed(found):
            wrong.append(f"{name}: {found or 'no licence in its metadata'}")
    return wrong, absent


def licence_of(name: str) -> str:
    """An SPDX expression where the package has one; else its licence line, or its classifiers joined by OR."""
    known = metadata(name)
    if known.get("License-Expression"):
        return known["License-Expression"]
    lines = (known.get("License") or "").strip().splitlines()
    if lines and all(_spdx(part) in ALLOWED for part in _parts(lines[0])):
        return lines[0]
    classifiers = [c.rpartition(" :: ")[2] for c in known.get_all("Classifier") or [] if c.startswith("License ::")]
    return " OR ".join(classifiers) or (lines[0] if lines else "")


def is_allowed(expression: str) -> bool:
    """All of what is joined by AND, one of what is joined by OR."""
    either = [[part.strip() for part in _split(side, "AND")] for side in _split(expression, "OR")]
    return any(all(_spdx(part) in ALLOWED for part in side) for side in either)


def _parts(expression: str) -> list[str]:
    return [part.strip() for side in _split(expression, "OR") for part in _split(side, "AND")]


def _split(expression: str, word: str) -> list[str]:
    return re.split(rf"\s+{word}\s+", expression.strip("() "))


def _spdx(name: str) -> str:
    name, _, exception = name.strip("() ").partition(" WITH ")
    return SPELLINGS.get(name, name) if not exception or exception in EXCEPTIONS else f"{name} WITH {exception}"


def vulnerabilities(requirements: Path, pins: dict[str, str]) -> tuple[list[str], list[str]]:
    """Known ones, and the packages that could not be asked for, with the reason."""
    if importlib.util.find_spec("pip_audit") is None:
        return [], [f"{name}: pip-audit is not installed (pip install pip-audit)" for name in pins]
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--no-deps", "--disable-pip"]
    try:
        done = subprocess.run(
            [*command, "--progress-spinner", "off", "--format", "json"], capture_output=True, text=True, timeout=TIMEOUT
        )
        told = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        return [], [f"{name}: pip-audit gave no answer; is this machine offline?" for name in pins]
    return read_answer(told, list(pins))


def read_answer(told: list[dict], names: list[str]) -> tuple[list[str], list[str]]:
    """From pip-audit's list; a package that it does not mention was not asked for."""
    found = [
        f"{each['name']} {each['version']}: {fault['id']}, fixed in {', '.join(fault['fix_versions']) or 'none yet'}"
        for each in told
        for fault in each.get("vulns", [])
    ]
    skipped = {_plain(each["name"]): each["skip_reason"] for each in told if "skip_reason" in each}
    answered = {_plain(each["name"]) for each in told} - skipped.keys()
    unknown = [
        f"{name}: {skipped.get(_plain(name), 'pip-audit does not mention it')}"
        for name in names
        if _plain(name) not in answered
    ]
    return found, unknown


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
