#!/usr/bin/env bash
# The whole test suite: bash launch/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
cd "$vlscale_root"
# Two workers with one thread each use two cores fully; a file's tests stay together, since they share what they trained,
# and files begin in the order of tests/conftest.py.
export OMP_NUM_THREADS=1
# A run of one rank takes a thread a core all the same: those that wait leave the core to the other worker.
export OMP_WAIT_POLICY=passive
# Hundreds of processes import the package: compiled once where the environment says never.
export PYTHONDONTWRITEBYTECODE=
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
