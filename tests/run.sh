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
run=("$PYTHON" -m pytest -n "${TEST_WORKERS:-2}" --dist worksteal)
"${run[@]}" "$@" || exit
# What multiplies, attends and decodes once more, as a CPU without AVX-512 would: that reaches torch's
# own kernels and oneDNN's. MKL, NumPy and what DeepSpeed compiles still see the real CPU.
NUMERICAL=(tests/utils/kernels tests/utils/generation/{test_decoder,test_kv_cache,test_sampling,engines/test_native}.py
    tests/utils/data/test_batches.py tests/step2_reward/test_loss.py
    tests/step3_ppo/test_{algorithm,algorithm_kl,algorithm_variants,ptx,update}.py)
if [ $# = 0 ] && [ -z "${ONEDNN_MAX_CPU_ISA:-}" ] && grep -qs avx512f /proc/cpuinfo; then
    echo "the numerical part as on a CPU without AVX-512:"
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 "${run[@]}" "${NUMERICAL[@]}"
fi
