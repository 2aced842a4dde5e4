#!/usr/bin/env bash
# Many nodes, ZeRO-3. HOSTS is DeepSpeed's hostfile: lines of `host slots=8`.
# MODEL (step 1's output), DATA (names apart by spaces) and OUTPUT from the environment; further flags go to main.py.
. "$(dirname "$0")/../../utils/launch.sh"
[ -n "${LAUNCH:-}" ] || [ -f "${HOSTS:-hosts}" ] || { echo "no hostfile ${HOSTS:-hosts}; set HOSTS" >&2; exit 2; }
LAUNCH="${LAUNCH:---hostfile ${HOSTS:-hosts}}"
launch step2_reward/main.py --model_name_or_path "${MODEL:-output/step1_sft}" \
    --preference_data ${DATA:-HuggingFaceH4/ultrafeedback_binarized} \
    --output_dir "${OUTPUT:-output/step2_reward}" \
    --zero_stage 3 --dtype bf16 --gradient_checkpointing --global_batch_size 256 --micro_batch_size 2 \
    --max_length 2048 "$@"
