#!/usr/bin/env bash
# Check a commit on a CPU: prepare the environment, then run ruff, mypy and the tests.
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

# One test process per core (at most four), with one thread each, uses the cores best.
cores=$(python -c 'import os; print(len(getattr(os, "sched_getaffinity", lambda _: [0])(0)))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python -m pytest tests -n "$((cores < 4 ? cores : 4))" --dist loadfile \
    --no-loadscope-reorder "$@"
