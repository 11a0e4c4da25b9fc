#!/usr/bin/env bash
# Everything that must hold before a commit: environment, ruff, mypy, then the tests, on a CPU.
#
#     bash scripts/run_tests.sh [flags for pytest, e.g. -k launch, -m slow, -x]

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
prepare_environment requirements.txt tests/requirements.txt

echo "ruff"
python -m ruff check --quiet --config tests/ruff.toml .
echo "mypy"
python -m mypy --config-file tests/mypy.ini --no-error-summary alpaca_rlhf

# One test process a core (four at most), one thread each: that keeps the cores busiest.
cores=$(python -c 'import os; print(len(getattr(os, "sched_getaffinity", lambda _: [0])(0)))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python -m pytest tests -n "$((cores < 4 ? cores : 4))" --dist loadfile "$@"
