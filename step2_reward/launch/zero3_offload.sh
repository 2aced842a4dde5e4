#!/usr/bin/env bash
# ZeRO-3 with optimizer states and weights in CPU memory: slow, for models that do not fit.
# MODEL (step 1's output), DATA (names apart by spaces) and OUTPUT from the environment; further flags go to main.py.
. "$(dirname "$0")/../../utils/launch.sh"
launch step2_reward/main.py --model_name_or_path "${MODEL:-output/step1_sft}" \
    --preference_data ${DATA:-HuggingFaceH4/ultrafeedback_binarized} \
    --output_dir "${OUTPUT:-output/step2_reward}" \
    --zero_stage 3 --offload all --dtype bf16 --gradient_checkpointing \
    --global_batch_size 64 --micro_batch_size 1 --max_length 2048 "$@"
