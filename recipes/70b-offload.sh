# A 70B model on many nodes: ZeRO-3 with optimizer states and weights in CPU memory. Its weights do
# not fit one GPU, so rollouts gather layer by layer for each token: slow (not measured). Start with
#   LAUNCH="--hostfile hosts" bash run_all.sh 70b-offload
MODEL=Qwen/Qwen2.5-72B
SFT_DATA=(HuggingFaceH4/ultrafeedback_binarized) # its split train_sft: of the same prompts
PREFERENCE_DATA=(HuggingFaceH4/ultrafeedback_binarized)
COMMON_FLAGS=(--dtype bf16 --zero_stage 3 --offload all --gradient_checkpointing
    --timeout_minutes 120 --rollout_gather layer)
SFT_FLAGS=(--learning_rate 5e-6 --global_batch_size 128 --micro_batch_size 1 --epochs 2
    --max_length 2048)
REWARD_FLAGS=(--learning_rate 5e-6 --global_batch_size 64 --micro_batch_size 1 --epochs 1
    --max_length 2048)
PPO_FLAGS=(--learning_rate 3e-7 --critic_learning_rate 5e-6 --prompts_per_rollout 512
    --global_batch_size 128 --micro_batch_size 1 --generation_tokens 16384 --release_decode_memory --max_steps 300
    --max_prompt_length 1024 --max_response_length 1024 --score_normalisation running
    --score_clip 5 --missing_eos_penalty 1
    --save_every 10)
