#!/usr/bin/env bash
# The whole story on a synthetic corpus, on CPU: bash launch/demo.sh [--quick] [--out DIR]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
exec vlscale demo "$@"
