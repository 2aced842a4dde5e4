#!/usr/bin/env bash
# All GPUs of this node, ZeRO-2: gradients and optimizer states sharded.
# MODEL, DATA (names apart by spaces) and OUTPUT from the environment; further flags go to main.py.
. "$(dirname "$0")/../../utils/launch.sh"
launch step1_sft/main.py --model_name_or_path "${MODEL:-Qwen/Qwen2.5-0.5B}" \
    --sft_data ${DATA:-HuggingFaceH4/ultrafeedback_binarized} \
    --output_dir "${OUTPUT:-output/step1_sft}" \
    --zero_stage 2 --dtype bf16 --global_batch_size 128 --micro_batch_size 8 "$@"
