#!/usr/bin/env bash
# ZeRO-3 with optimizer states and weights in CPU memory: slow, for models that do not fit.
# MODEL (step 1's output), REWARD (step 2's), DATA (names apart by spaces) and OUTPUT from the environment; further flags go to main.py.
. "$(dirname "$0")/../../utils/launch.sh"
launch step3_ppo/main.py --model_name_or_path "${MODEL:-output/step1_sft}" \
    --reward_model "${REWARD:-output/step2_reward}" \
    --prompt_data ${DATA:-HuggingFaceH4/ultrafeedback_binarized} \
    --output_dir "${OUTPUT:-output/step3_ppo}" \
    --zero_stage 3 --offload all --dtype bf16 --gradient_checkpointing \
    --prompts_per_rollout 128 --global_batch_size 64 --micro_batch_size 1 --generation_tokens 8192 \
    --learning_rate 1e-6 --critic_learning_rate 9e-6 --max_prompt_length 1024 --max_response_length 1024 "$@"
