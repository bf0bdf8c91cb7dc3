#!/usr/bin/env bash
# The whole test suite: bash launch/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
cd "$vlscale_root"
exec python -m pytest "$@"
