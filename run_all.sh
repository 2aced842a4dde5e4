#!/usr/bin/env bash
# The main job: SFT → reward model → PPO → evaluation and report.
#
#   bash run_all.sh [RECIPE] [--flag value …]
#
# RECIPE is a file of recipes/ (tiny, scratch, qwen2.5-0.5b, 7b-zero3, 70b-offload). Without one:
# `tiny`, or `scratch` where data is named, or `qwen2.5-0.5b`'s settings where a model is named.
#
#   --output_dir FOLDER          default: output/RECIPE
#   --model_name_or_path MODEL   where step 1 starts
#   --sft_data A [B …]           demonstrations
#   --preference_data A [B …]    comparisons
#   --prompt_data A [B …]        prompts of step 3 (default: those of the comparisons)
#   --rounds N                   repeat collect → reward → PPO N times (embedded task; tiny: 2)
#   --sft.FLAG, --collect.FLAG, --reward.FLAG, --ppo.FLAG value   for one step
#   any other flag               goes to every step (--seed, --zero_stage, --dtype, --offload, …)
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

RECIPE="" OUTPUT="" ROUNDS=1 EMBEDDED=0 MODEL="" MAX_RANKS=0
SFT_DATA=() PREFERENCE_DATA=() PROMPT_DATA=()
COMMON_FLAGS=() SCRATCH_FLAGS=() SFT_FLAGS=() COLLECT_FLAGS=() REWARD_FLAGS=() PPO_FLAGS=() LATER_PPO_FLAGS=()
SCRATCH_COLUMNS=() my_model="" my_rounds="" my_sft=() my_preference=() my_prompts=()
overwrite=0 my_common=() my_sft_flags=() my_collect=() my_reward=() my_ppo=() seed=42

if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then RECIPE=$1; shift; fi
while [ $# -gt 0 ]; do
    flag=$1 values=()
    shift
    [ "${flag#--}" != "$flag" ] || { echo "run_all.sh: $flag is no flag; see --help" >&2; exit 2; }
    while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do values+=("$1"); shift; done
    case $flag in *=*) values=("${flag#*=}" "${values[@]}") flag=${flag%%=*} ;; esac
    case $flag in
        --output_dir | --rounds | --model_name_or_path | --seed)
            [ ${#values[@]} -eq 1 ] && [ -n "${values[0]}" ] || {
                echo "run_all.sh: $flag takes one value, not ${#values[@]}" >&2
                exit 2
            } ;;&
        --output_dir) OUTPUT=${values[*]} ;;
        --rounds) my_rounds=${values[*]} ;;
        --model_name_or_path) my_model=${values[*]} ;;
        --sft_data) my_sft=("${values[@]}") ;;
        --preference_data) my_preference=("${values[@]}") ;;
        --prompt_data) my_prompts=("${values[@]}") ;;
        --overwrite) [ "${values[*]:-true}" = true ] && overwrite=1 ;;
        --sft.*) my_sft_flags+=("--${flag#--sft.}" "${values[@]}") ;;
        --collect.*) my_collect+=("--${flag#--collect.}" "${values[@]}") ;;
        --reward.*) my_reward+=("--${flag#--reward.}" "${values[@]}") ;;
        --ppo.*) my_ppo+=("--${flag#--ppo.}" "${values[@]}") ;;
        --columns) my_common+=("$flag" "${values[@]}") SCRATCH_COLUMNS=("$flag" "${values[@]}") ;;
        --seed) seed=${values[*]} my_common+=("$flag" "$seed") ;;
        *) my_common+=("$flag" "${values[@]}") ;;
    esac
done
if [ -z "$RECIPE" ]; then
    RECIPE=tiny
    [ ${#my_sft[@]} -eq 0 ] && [ ${#my_preference[@]} -eq 0 ] || RECIPE=scratch
    [ -z "$my_model" ] || RECIPE=qwen2.5-0.5b
fi
[ -f "$ROOT/recipes/$RECIPE.sh" ] || {
    echo "run_all.sh: no recipe $RECIPE; there are: $(cd "$ROOT/recipes" && ls | sed 's/\.sh$//' | tr '\n' ' ')" >&2
    exit 2
}
. "$ROOT/recipes/$RECIPE.sh"
MODEL=${my_model:-$MODEL} ROUNDS=${my_rounds:-$ROUNDS}
[ ${#my_sft[@]} -eq 0 ] || SFT_DATA=("${my_sft[@]}")
[ ${#my_preference[@]} -eq 0 ] || PREFERENCE_DATA=("${my_preference[@]}")
PROMPT_DATA=("${my_prompts[@]}")
OUTPUT=${OUTPUT:-output/$RECIPE}
[ "$overwrite" = 1 ] && COMMON_FLAGS+=(--overwrite) || COMMON_FLAGS+=(--resume auto)
# Chat templates may state the day: every stage, and every resume, states the day of the first start.
day=$(date +%F)
[ "$overwrite" = 1 ] || day=$(cat "$OUTPUT/.date" 2>/dev/null || echo "$day")
COMMON_FLAGS+=(--date "$day")
# Of a flag given twice the last counts: the recipe's for all steps, the recipe's for this step, the
# user's for all, the user's for this step.
SFT_FLAGS=("${COMMON_FLAGS[@]}" "${SFT_FLAGS[@]}" "${my_common[@]}" "${my_sft_flags[@]}")
COLLECT_FLAGS=("${COMMON_FLAGS[@]}" "${COLLECT_FLAGS[@]}" "${my_common[@]}" "${my_collect[@]}")
REWARD_FLAGS=("${COMMON_FLAGS[@]}" "${REWARD_FLAGS[@]}" "${my_common[@]}" "${my_reward[@]}")
LATER_PPO_FLAGS=("${COMMON_FLAGS[@]}" "${PPO_FLAGS[@]}" "${LATER_PPO_FLAGS[@]}" "${my_common[@]}" "${my_ppo[@]}")
PPO_FLAGS=("${COMMON_FLAGS[@]}" "${PPO_FLAGS[@]}" "${my_common[@]}" "${my_ppo[@]}")
if [ "$EMBEDDED" = 0 ]; then
    [ ${#SFT_DATA[@]} -gt 0 ] && [ ${#PREFERENCE_DATA[@]} -gt 0 ] || {
        echo "run_all.sh: recipe $RECIPE needs --sft_data and --preference_data" >&2
        exit 2
    }
    [ ${#PROMPT_DATA[@]} -gt 0 ] || PROMPT_DATA=("${PREFERENCE_DATA[@]}")
    [ "$ROUNDS" = 1 ] || { echo "run_all.sh: --rounds needs the embedded task, whose verifier ranks new answers" >&2; exit 2; }
fi

started=$SECONDS
stage() { # stage NAME command …: stops the run at the first failure, with its code
    local name=$1 code began=$SECONDS
    shift
    printf '\n=== %s\n' "$name"
    "$@"
    code=$?
    echo "$((spent + SECONDS - started))" >"$OUTPUT/.seconds"
    if [ $code -eq 75 ]; then
        echo "run_all.sh: $name stopped as asked and is saved in $OUTPUT; the same command goes on" >&2
        exit $code
    fi
    if [ $code -ne 0 ]; then
        echo "run_all.sh: $name failed with exit code $code; what was written stays in $OUTPUT" >&2
        exit $code
    fi
    echo "=== $name took $((SECONDS - began)) s"
}
in_root() { PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" "$@"; }

launcher=$(launch_flags)
echo "recipe $RECIPE → $OUTPUT; launcher: $launcher"
# A flag that step 3 does not know should not cost the hours of steps 1 and 2.
ranks=$(ranks_of "$launcher")
checks=() # all at once: each is a second or two of imports
check() {
    WORLD_SIZE=${ranks:-1} "$PYTHON" "$ROOT/$1" --check_config "${@:2}" &
    checks+=($!)
}
[[ $ROUNDS =~ ^[1-9][0-9]*$ && $seed =~ ^[0-9]+$ ]] || {
    echo "run_all.sh: --rounds $ROUNDS and --seed $seed must be whole numbers" >&2
    exit 2
}
check step1_sft/main.py --model_name_or_path m --sft_data "${SFT_DATA[@]:-d}" --output_dir o "${SFT_FLAGS[@]}"
check step2_reward/main.py --model_name_or_path m --preference_data "${PREFERENCE_DATA[@]:-d}" --output_dir o "${REWARD_FLAGS[@]}"
check step3_ppo/main.py --model_name_or_path m --reward_model r --prompt_data "${PROMPT_DATA[@]:-d}" --output_dir o "${PPO_FLAGS[@]}"
[ "$EMBEDDED" = 0 ] || check step2_reward/collect.py --policy m --prompt_data d --output_file o/c.jsonl "${COLLECT_FLAGS[@]}"
for one in "${checks[@]}"; do wait "$one" || refused=1; done
[ -z "${refused:-}" ] || exit 2
if [ "$overwrite" = 1 ]; then
    rm -rf "$OUTPUT"/{data,base_model,step1_sft,step2_reward,step3_ppo,summary.json,summary.txt,.seed,.seconds}
    rm -rf "$OUTPUT"/round[0-9]*
fi
mkdir -p "$OUTPUT" || exit
made_with=$(cat "$OUTPUT/.seed" 2>/dev/null || echo "$seed") spent=$(cat "$OUTPUT/.seconds" 2>/dev/null || echo 0)
[ "$made_with" = "$seed" ] || {
    echo "run_all.sh: $OUTPUT was begun with --seed $made_with, not $seed; --overwrite begins anew" >&2
    exit 2
}
echo "$seed" >"$OUTPUT/.seed"
echo "$day" >"$OUTPUT/.date"
trap 'exit 75' TERM USR1 # during a stage without steps; it is done again
# What has no checkpoints is made under another name, so that what has its name is whole.
if [ "$EMBEDDED" = 1 ]; then
    [ -d "$OUTPUT/data" ] || {
        stage "data" in_root -m utils.data.toy_tasks --output_dir "$OUTPUT/data.writing" --seed "$seed"
        mv "$OUTPUT/data.writing" "$OUTPUT/data" || exit
    }
    SFT_DATA=("$OUTPUT/data/sft.jsonl") PROMPT_DATA=("$OUTPUT/data/prompts.jsonl")
fi
if [ -z "$MODEL" ]; then
    [ -d "$OUTPUT/base_model" ] || {
        stage "base model" in_root -m utils.models.from_scratch --output_dir "$OUTPUT/base_model.writing" \
            --data "${SFT_DATA[@]}" "${PREFERENCE_DATA[@]}" --seed "$seed" "${SCRATCH_FLAGS[@]}" "${SCRATCH_COLUMNS[@]}"
        mv "$OUTPUT/base_model.writing" "$OUTPUT/base_model" || exit
    }
    MODEL="$OUTPUT/base_model"
fi
stage "step 1: SFT" launch step1_sft/main.py --model_name_or_path "$MODEL" \
    --sft_data "${SFT_DATA[@]}" --output_dir "$OUTPUT/step1_sft" "${SFT_FLAGS[@]}"

policy="$OUTPUT/step1_sft"
for round in $(seq 1 "$ROUNDS"); do
    folder="$OUTPUT" # the last round's models stand where a single round's would
    [ "$round" = "$ROUNDS" ] || folder="$OUTPUT/round$round"
    if [ "$EMBEDDED" = 1 ]; then
        stage "round $round: comparisons" launch step2_reward/collect.py --policy "$policy" \
            --prompt_data "${PROMPT_DATA[@]}" --output_file "$OUTPUT/data/comparisons_$round.jsonl" \
            "${COLLECT_FLAGS[@]}"
        PREFERENCE_DATA+=("$OUTPUT/data/comparisons_$round.jsonl")
    fi
    stage "step 2: reward model" launch step2_reward/main.py --model_name_or_path "$OUTPUT/step1_sft" \
        --preference_data "${PREFERENCE_DATA[@]}" --sft_data "${SFT_DATA[@]}" \
        --output_dir "$folder/step2_reward" "${REWARD_FLAGS[@]}"
    stage "step 3: PPO" launch step3_ppo/main.py --model_name_or_path "$policy" \
        --reward_model "$folder/step2_reward" --prompt_data "${PROMPT_DATA[@]}" \
        --preference_data "${PREFERENCE_DATA[@]}" --reference_model "$OUTPUT/step1_sft" \
        --output_dir "$folder/step3_ppo" "${PPO_FLAGS[@]}"
    policy="$folder/step3_ppo/actor" PPO_FLAGS=("${LATER_PPO_FLAGS[@]}")
done
extra=()
[ "$EMBEDDED" = 0 ] || extra=(--verifier_data "$OUTPUT/data/held_out.jsonl")
evaluate() {
    in_root -m evaluation.summary --output_dir "$OUTPUT" --seed "$seed" \
        --seconds $((spent + SECONDS - started)) "${extra[@]}" | tee "$OUTPUT/summary.writing"
    return "${PIPESTATUS[0]}"
}
if [ -f "$OUTPUT/summary.txt" ]; then
    printf '\n=== finished before (--overwrite begins anew)\n'
    cat "$OUTPUT/summary.txt"
else
    stage "evaluation" evaluate
    mv "$OUTPUT/summary.writing" "$OUTPUT/summary.txt"
fi
