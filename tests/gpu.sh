#!/usr/bin/env bash
# What only a GPU can show, in at most ten minutes on one:
#
#   bash tests/gpu.sh           the tests marked gpu, and run_all.sh in bf16 with CUDA graphs and
#                               varlen packing under ZeRO 0, 2, 3, with and without a CUDA toolkit;
#                               each run's output is read for every fallback
#   bash tests/gpu.sh --walk    the same lines without a GPU: on the CPU, smaller
#
# Ends with exit code 1 where a test fails or a fallback was not to be expected, 4 without a GPU.
# OUTPUT (output/gpu) keeps the logs, and report.md says what ran, on what.
set -uo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "${1:-}" in
    "") walk=0 ;;
    --walk) walk=1 ;;
    *) sed -n '2,/^set /p' "$0" | grep '^#' | cut -c3-; exit 2 ;;
esac
. "$ROOT/utils/environment.sh"
set_up_environment
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
OUTPUT=$(realpath -m "${OUTPUT:-$ROOT/output/gpu}")
if [ $walk = 1 ]; then
    export DS_ACCELERATOR=cpu
    hardware="no GPU: a walk on the CPU, which says nothing of a GPU"
elif ! hardware=$("$PYTHON" -c 'import sys, torch
if not torch.cuda.is_available(): sys.exit(1)
print(f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}, torch {torch.__version__}")'); then
    echo "gpu.sh: torch sees no GPU here, so nothing was tested; --walk goes the same way on the CPU" >&2
    exit 4
fi
mkdir -p "$OUTPUT"
report="$OUTPUT/report.md" failures=0
{
    echo "# bash tests/gpu.sh$([ $walk = 0 ] || echo ' --walk')"
    printf '\n%s, %s, commit %s\n\n' "$(date +%F)" "$hardware" \
        "$(git -C "$ROOT" rev-parse --short HEAD 2>/dev/null || echo unknown)"
    echo "| what | seconds | result |"
    echo "| --- | --- | --- |"
} >"$report"

# part NAME LIMIT COMMAND …: its output is shown and kept in OUTPUT/NAME.log.
part() {
    local name=$1 limit=$2 began=$SECONDS code
    shift 2
    # Ten minutes in all.
    [ $walk = 1 ] || limit=$((limit < 600 - SECONDS ? limit : SECONDS < 590 ? 600 - SECONDS : 10))
    printf '\n=== %s\n' "$name"
    timeout --kill-after 20 "$limit" "$@" 2>&1 | tee "$OUTPUT/$name.log"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 124 ] && echo "gpu.sh: $name took longer than $limit s" >&2
    told "$name" $((SECONDS - began)) "$code"
    return "$code"
}

told() { # NAME SECONDS CODE
    echo "| $1 | $2 | $([ "$3" -eq 0 ] && echo passed || echo "failed with exit code $3") |" >>"$report"
    [ "$3" -eq 0 ] || failures=$((failures + 1))
}

# The walk takes the same tests with "cpu" for their device.
chosen=(-m gpu tests)
[ $walk = 0 ] || chosen=(-m "not gpu and not slow" tests/whole/test_gpu.py)
cd "$ROOT" || exit
part tests $((walk ? 600 : 300)) "$PYTHON" -m pytest -n $((walk ? 0 : 4)) -rs "${chosen[@]}"
if grep -q '^SKIPPED' "$OUTPUT/tests.log"; then # a test that did not run has not passed
    told "tests: none skipped" 0 1
fi

# Few steps: enough for every line, and for the self-check to let PPO begin. By name, so that what
# cannot be ends the run instead of going another way.
small=(--rounds 1 --seed 3 --overwrite --sft.max_steps 60 --collect.num_prompts 100 --reward.max_steps 6
    --ppo.max_steps 2 --ppo.ppo_epochs 1 --ppo.max_eval_rows 16)
fast=(--dtype bf16 --packing on --ppo.decode "$([ $walk = 1 ] && echo static || echo graph)")
tools=$(command -v "${CXX:-c++}" >/dev/null && command -v ninja >/dev/null && echo yes || echo no)
here=$("$PYTHON" -c 'from torch.utils import cpp_extension as c; print("yes" if c.CUDA_HOME else "no")')
[ "$here" = yes ] || echo "gpu.sh: no CUDA toolkit on this machine; the runs with one are left out" | tee -a "$report"

run() { # NAME ZERO_STAGE TOOLKIT [FLAG …]
    local name=$1 stage=$2 toolkit=$3 hide=()
    shift 3
    [ "$toolkit" = yes ] || hide=(bash tests/without_toolkit.sh)
    part "$name" $((walk ? 1800 : 200)) "${hide[@]}" bash run_all.sh tiny --output_dir "$OUTPUT/$name" "${small[@]}" \
        --zero_stage "$stage" "$@" || return
    "$PYTHON" tests/helpers/gpu_logs.py "$OUTPUT/$name.log" --zero_stage "$stage" \
        --tools "$tools" $([ $walk = 0 ] || echo --walk) | tee -a "$report"
    told "$name: no fallback" 0 "${PIPESTATUS[0]}"
}

for stage in ${STAGES:-0 2 3}; do
    run "zero$stage" "$stage" "$here" "${fast[@]}"
done
# As a user has it, nothing chosen by name; and where DeepSpeed finds no toolkit.
run without-toolkit 0 no --dtype bf16

printf '\n'
cat "$report"
[ $failures = 0 ] || { echo "gpu.sh: $failures of them failed" >&2; exit 1; }
