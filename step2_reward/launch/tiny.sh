#!/usr/bin/env bash
# Step 2 of the embedded task, after step 1's tiny.sh. OUTPUT (output/tiny) from the environment.
. "$(dirname "$0")/../../utils/launch.sh"
. "$ROOT/recipes/tiny.sh"
OUTPUT=$(realpath -m "${OUTPUT:-output/tiny}")
launch step2_reward/collect.py --policy "$OUTPUT/step1_sft" \
    --prompt_data "$OUTPUT/data/prompts.jsonl" --output_file "$OUTPUT/data/comparisons_1.jsonl" \
    "${COLLECT_FLAGS[@]}" || exit
launch step2_reward/main.py --model_name_or_path "$OUTPUT/step1_sft" \
    --preference_data "$OUTPUT/data/comparisons_1.jsonl" --sft_data "$OUTPUT/data/sft.jsonl" \
    --output_dir "$OUTPUT/step2_reward" "${REWARD_FLAGS[@]}" "$@"
