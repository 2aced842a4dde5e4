#!/usr/bin/env bash
# One GPU.
# MODEL, DATA (names apart by spaces) and OUTPUT from the environment; further flags go to main.py.
. "$(dirname "$0")/../../utils/launch.sh"
LAUNCH="${LAUNCH:---num_gpus 1}"
launch step1_sft/main.py --model_name_or_path "${MODEL:-Qwen/Qwen2.5-0.5B}" \
    --sft_data ${DATA:-HuggingFaceH4/ultrafeedback_binarized} \
    --output_dir "${OUTPUT:-output/step1_sft}" \
    --zero_stage 0 --dtype bf16 --global_batch_size 64 --micro_batch_size 8 "$@"
