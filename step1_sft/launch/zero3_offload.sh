#!/usr/bin/env bash
# ZeRO-3 with optimizer states and weights in CPU memory: slow, for models that do not fit.
# MODEL, DATA (names apart by spaces) and OUTPUT from the environment; further flags go to main.py.
. "$(dirname "$0")/../../utils/launch.sh"
launch step1_sft/main.py --model_name_or_path "${MODEL:-Qwen/Qwen2.5-7B}" \
    --sft_data ${DATA:-HuggingFaceH4/ultrafeedback_binarized} \
    --output_dir "${OUTPUT:-output/step1_sft}" \
    --zero_stage 3 --offload all --dtype bf16 --gradient_checkpointing \
    --global_batch_size 64 --micro_batch_size 2 --max_length 2048 "$@"
