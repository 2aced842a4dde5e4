#!/usr/bin/env bash
# The main job: SFT → reward model → PPO, or another method → evaluation and report.
#
#   bash run_all.sh [RECIPE] [--flag value …]
#
# RECIPE is a file of recipes/ (tiny, calculator, scratch, qwen2.5-0.5b, 7b-zero3, 70b-offload) or a
# YAML file of your own with such sections. Without one: `tiny`, or `scratch` where data is named, or
# `qwen2.5-0.5b`'s settings where a model is named.
#
#   --output_dir FOLDER          default: output/RECIPE
#   --model_name_or_path MODEL   where step 1 starts
#   --sft_data A [B …]           demonstrations
#   --preference_data A [B …]    comparisons
#   --prompt_data A [B …]        prompts of step 3 (default: those of the comparisons)
#   --method A [B …]             ppo (default), grpo, rloo, dpo, kto, best_of_n, … or all: each beside
#                                the others, which are then compared (docs/online.md)
#   --scored_by reward_function  by --ppo.reward_function alone: without comparisons and step 2
#   --rounds N                   repeat collect → train N times (tiny: 2); new answers are ranked by
#   --labeller WHAT              verifier (embedded task), reward_model, reward_function or judge
#   --replay_share S             learn from this share of older rounds' answers again (default: 1)
#   --round_prompts disjoint     other prompts in each round
#   --report_every MINUTES       write OUTPUT/report.html while it runs too, not only at its end
#   --sft.FLAG, --collect.FLAG, --reward.FLAG, --ppo.FLAG, --preference.FLAG value   for one step
#   --METHOD.FLAG value          for one method
#   --config FILE [FILE …]       settings, in sections or for every step; they win over the recipe
#   --rollout_engine vllm        vLLM samples in step 3 (docs/vllm.md)
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
