#!/usr/bin/env bash
# The main job: SFT → reward model → PPO → evaluation and report.
#
#   bash run_all.sh [RECIPE] [--flag value …]
#
# RECIPE is a file of recipes/ (tiny, scratch, qwen2.5-0.5b, 7b-zero3, 70b-offload) or a YAML file of
# your own with such sections. Without one: `tiny`, or `scratch` where data is named, or
# `qwen2.5-0.5b`'s settings where a model is named.
#
#   --output_dir FOLDER          default: output/RECIPE
#   --model_name_or_path MODEL   where step 1 starts
#   --sft_data A [B …]           demonstrations
#   --preference_data A [B …]    comparisons
#   --prompt_data A [B …]        prompts of step 3 (default: those of the comparisons)
#   --rounds N                   repeat collect → reward → PPO N times (embedded task; tiny: 2)
#   --sft.FLAG, --collect.FLAG, --reward.FLAG, --ppo.FLAG value   for one step
#   --config FILE [FILE …]       settings, in sections or for every step; they win over the recipe
#   any other flag               goes to every step (--seed, --zero_stage, --dtype, --offload, …);
#                                `python step3_ppo/main.py --help` lists those of a step
#
# Flags are checked before anything runs. The same command again goes on where the last one stopped:
# stages that are finished are passed over, a step goes on from its newest checkpoint. --overwrite
# begins anew and deletes what an earlier run made in the same folder. SIGTERM or SIGUSR1 saves at the
# next step boundary and ends with exit code 75.
#
# LAUNCH holds flags of the deepspeed launcher, e.g. LAUNCH="--hostfile hosts"; LAUNCH=srun starts
# the ranks by Slurm (utils/slurm.sh is the job for it).
set -uo pipefail
for word in "$@"; do
    case $word in -h | --help) sed -n '2,/^set /p' "$0" | grep '^#' | cut -c3-; exit 0 ;; esac
done
. "$(dirname "${BASH_SOURCE[0]}")/utils/launch.sh"
exec "$PYTHON" "$ROOT/run_all.py" "$@"
