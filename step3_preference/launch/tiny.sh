#!/usr/bin/env bash
# Step 3 of the embedded task by preferences, on the comparisons that step 2's tiny.sh has collected.
# OUTPUT (output/tiny) from the environment.
. "$(dirname "$0")/../../utils/launch.sh"
export OUTPUT="${OUTPUT:-output/tiny}" MAX_RANKS=2
launch step3_preference/main.py --config "$ROOT/recipes/tiny.yaml" --model_name_or_path "$OUTPUT/step1_sft" \
    --preference_data "$OUTPUT/data/comparisons_1.jsonl" --output_dir "$OUTPUT/step3_preference" "$@"
