#!/usr/bin/env bash
# Step 2 of the embedded task, after step 1's tiny.sh. OUTPUT (output/tiny) from the environment.
. "$(dirname "$0")/../../utils/launch.sh"
export OUTPUT="${OUTPUT:-output/tiny}" MAX_RANKS=2
comparisons="$OUTPUT/data/comparisons_1.jsonl"
(launch step2_reward/collect.py --config "$ROOT/recipes/tiny.yaml" --policy "$OUTPUT/step1_sft" \
    --prompt_data "$OUTPUT/data/prompts.jsonl" --output_file "$comparisons") || exit
launch step2_reward/main.py --config "$ROOT/recipes/tiny.yaml" --model_name_or_path "$OUTPUT/step1_sft" \
    --preference_data "$comparisons" --sft_data "$OUTPUT/data/sft.jsonl" --output_dir "$OUTPUT/step2_reward" "$@"
