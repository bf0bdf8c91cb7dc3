#!/usr/bin/env bash
# The whole test suite: bash launch/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
cd "$vlscale_root"
# Two workers with one thread each use two cores fully; a file's tests stay together, since they share what they trained.
export OMP_NUM_THREADS=1
exec python -m pytest -n 2 --dist loadfile "$@"
