#!/usr/bin/env bash
# Step 1 of the embedded task on whatever is here. OUTPUT (output/tiny) from the environment.
. "$(dirname "$0")/../../utils/launch.sh"
export OUTPUT="${OUTPUT:-output/tiny}" MAX_RANKS=2 PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -m utils.data.toy_tasks --output_dir "$OUTPUT/data" &&
    "$PYTHON" -m utils.models.from_scratch --output_dir "$OUTPUT/base_model" \
        --data "$OUTPUT/data/sft.jsonl" --vocab_size 768 --max_positions 256 || exit
launch step1_sft/main.py --config "$ROOT/recipes/tiny.yaml" --model_name_or_path "$OUTPUT/base_model" \
    --sft_data "$OUTPUT/data/sft.jsonl" --output_dir "$OUTPUT/step1_sft" "$@"
