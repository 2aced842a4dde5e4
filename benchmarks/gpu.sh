#!/usr/bin/env bash
# The figures of one GPU, in at most 30 minutes:
#
#   bash benchmarks/gpu.sh           Qwen2.5-0.5B and 1.5B by shape, random weights, bf16: the decode
#                                    against generate (plain, and compiled with a static cache) and
#                                    the memory's bandwidth; PPO against TRL 1.12; updates as MFU;
#                                    the planner against measured peaks
#   bash benchmarks/gpu.sh --walk    the same lines without a GPU, on tiny shapes: no figure counts
#
# OUTPUT (output/benchmarks/gpu) gets gpu.md and gpu.json, with date and hardware, to be committed.
# Ends with exit code 1 where a part failed, 4 without a GPU.
set -uo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "${1:-}" in
    "") walk=0 device=cuda shapes=(qwen2.5-0.5b qwen2.5-1.5b) repeats=3 ;;
    --walk) walk=1 device=cpu shapes=(walk) repeats=1 ;;
    *) sed -n '2,/^set /p' "$0" | grep '^#' | cut -c3-; exit 2 ;;
esac
. "$ROOT/utils/environment.sh"
set_up_environment
cd "$ROOT" || exit
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
OUTPUT=$(realpath -m "${OUTPUT:-$ROOT/output/benchmarks/gpu}")
if [ $walk = 1 ]; then
    export DS_ACCELERATOR=cpu
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch sees no GPU here, so nothing was measured; --walk goes the same way on the CPU" >&2
    exit 4
fi
# Of an earlier run nothing but the models stays.
mkdir -p "$OUTPUT"
rm -f "$OUTPUT"/*/*.json "$OUTPUT"/{gpu.md,gpu.json,planner.json,left_out.txt}
touch "$OUTPUT/left_out.txt"
failures=0

left_out() { echo "gpu.sh: LEFT OUT: $1" | tee -a "$OUTPUT/left_out.txt" >&2; }

# part LIMIT COMMAND …: at most so many seconds, and half an hour in all.
part() {
    local limit=$1
    shift
    limit=$((limit < 1780 - SECONDS ? limit : 1780 - SECONDS))
    printf '\n=== %s (after %s s)\n' "$*" "$SECONDS"
    if [ $limit -lt 30 ]; then
        left_out "half an hour is over: $*"
        failures=$((failures + 1))
    elif ! timeout --signal TERM --kill-after 30 "$limit" "$PYTHON" "$@"; then
        left_out "failed, or took more than $limit s: $*"
        failures=$((failures + 1))
    fi
}

# TRL has an environment of its own, 1.7 GB on a CPU and more for CUDA. Quick to say no without network.
trl=()
if [ $walk = 1 ] && [ ! -e benchmarks/.venv_trl/installed.txt ]; then
    left_out "TRL: the walk does not install its environment"
elif PIP_RETRIES=1 PIP_DEFAULT_TIMEOUT=15 timeout 600 "$PYTHON" -m benchmarks.trl_environment; then
    trl=(trl-bf16)
else
    left_out "TRL: $(grep '^trl==' benchmarks/requirements_trl.txt | cut -d' ' -f1) is not there and could not be installed; ours stands alone"
fi
peers=(generate)
if [ $walk = 1 ] || command -v "${CC:-cc}" >/dev/null; then
    peers+=(compiled)
else
    left_out "compiled generate: no C compiler here, which torch.compile needs"
fi

for shape in "${shapes[@]}"; do
    here=(--device $device --repeats $repeats --shape "$shape" --output_dir "$OUTPUT/$shape")
    part 420 benchmarks/rollout_throughput.py --work W --dtypes bf16 --zero_stages 0 --peers "${peers[@]}" "${here[@]}"
    # Ours and TRL's models do not fit one GPU beside one another from 1.5B on, so each goes alone.
    part 240 benchmarks/ppo_throughput.py --work W --systems ours-bf16 "${here[@]}"
    part 150 benchmarks/sft_throughput.py --systems ours-bf16 "${here[@]}"
    part 150 benchmarks/reward_throughput.py --systems ours-bf16 "${here[@]}"
    [ ${#trl[@]} -eq 0 ] || {
        here[7]="$OUTPUT/$shape/trl"
        mkdir -p "${here[7]}" && ln -sfn ../models "${here[7]}/models"
        part 300 benchmarks/ppo_throughput.py --work W --systems "${trl[@]}" "${here[@]}"
        part 150 benchmarks/sft_throughput.py --systems "${trl[@]}" "${here[@]}"
        part 150 benchmarks/reward_throughput.py --systems "${trl[@]}" "${here[@]}"
    }
done
cases=()
[ $walk = 0 ] || cases=(--cases sft-20M-bf16-zero0)
part 420 benchmarks/planner_check.py --device $device --output "$OUTPUT/planner.json" "${cases[@]}"

"$PYTHON" -m benchmarks.gpu_report "$OUTPUT" --device $device || failures=$((failures + 1))
[ $failures = 0 ] || { echo "gpu.sh: $failures parts failed" >&2; exit 1; }
