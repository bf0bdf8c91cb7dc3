# Sourced by demo.sh and test.sh: a Python 3.11-3.13 environment with vlscale and the versions of constraints.txt.
# Usage: source launch/setup.sh [EXTRA]. A second run installs nothing again.
set -euo pipefail
vlscale_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
vlscale_extra=${1:-}

vlscale_python() {
    for name in python3 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: no Python 3.11, 3.12 or 3.13 found as python3, python3.13, python3.12 or python3.11" >&2
    return 2
}

if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x "$vlscale_root/.venv/bin/python" ]; then
        python=$(vlscale_python)
        echo "making $vlscale_root/.venv with $("$python" --version)" >&2
        "$python" -m venv "$vlscale_root/.venv"
    fi
    source "$vlscale_root/.venv/bin/activate"
fi

stamp="$VIRTUAL_ENV/.vlscale-installed${vlscale_extra:+-$vlscale_extra}"
wanted="$vlscale_root $(cat "$vlscale_root"/{constraints.txt,pyproject.toml,setup.py} | sha256sum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing vlscale and its pinned dependencies into $VIRTUAL_ENV (some minutes the first time)" >&2
    # DeepSpeed builds its kernels at first use, not now: that needs no compiler here.
    export DS_BUILD_OPS=0
    pins=(-c "$vlscale_root/constraints.txt" --disable-pip-version-check -q)
    python -m pip install "${pins[@]}" torch numpy setuptools wheel ninja packaging psutil
    python -m pip install "${pins[@]}" --no-build-isolation -e "$vlscale_root${vlscale_extra:+[$vlscale_extra]}"
    echo "$wanted" > "$stamp"
fi
