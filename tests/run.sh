#!/usr/bin/env bash
# The tests: bash tests/run.sh [pytest arguments]. Makes .venv where something is missing.
# `-m slow` runs the long ones, `-m gpu` those that need a GPU.
set -uo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/utils/environment.sh"
set_up_environment
cd "$ROOT" || exit
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$PYTHON" -m ruff check . && "$PYTHON" -m ruff format --check . || exit
# Half the tests start processes of their own, so as many workers as cores and not more.
"$PYTHON" -m pytest -n "${TEST_WORKERS:-2}" --dist worksteal "$@"
