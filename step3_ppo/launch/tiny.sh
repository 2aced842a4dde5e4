#!/usr/bin/env bash
# Step 3 of the embedded task, after step 2's tiny.sh. OUTPUT (output/tiny) from the environment.
. "$(dirname "$0")/../../utils/launch.sh"
export OUTPUT="${OUTPUT:-output/tiny}" MAX_RANKS=2
launch step3_ppo/main.py --config "$ROOT/recipes/tiny.yaml" --model_name_or_path "$OUTPUT/step1_sft" \
    --reward_model "$OUTPUT/step2_reward" --prompt_data "$OUTPUT/data/prompts.jsonl" \
    --output_dir "$OUTPUT/step3_ppo" "$@"
