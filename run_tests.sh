#!/usr/bin/env bash
# Everything that must hold: lint, format, shell, tests. What CI runs. Any pytest argument: bash run_tests.sh -m slow
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=medicalgpt/environment.sh
source medicalgpt/environment.sh

ruff check .
ruff format --check .
shellcheck -x ./*.sh medicalgpt/*.sh
OMP_NUM_THREADS=1 python -m pytest "$@"
