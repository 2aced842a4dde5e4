# A 7B model on one node of 8 GPUs with 80 GB each, ZeRO-3 (reckoned, not measured).
MODEL=Qwen/Qwen2.5-7B
SFT_DATA=(HuggingFaceH4/ultrafeedback_binarized) # its split train_sft: of the same prompts
PREFERENCE_DATA=(HuggingFaceH4/ultrafeedback_binarized)
COMMON_FLAGS=(--dtype bf16 --zero_stage 3 --gradient_checkpointing)
SFT_FLAGS=(--learning_rate 1e-5 --global_batch_size 128 --micro_batch_size 4 --epochs 2
    --max_length 2048)
REWARD_FLAGS=(--learning_rate 9e-6 --global_batch_size 64 --micro_batch_size 2 --epochs 1
    --max_length 2048)
PPO_FLAGS=(--learning_rate 5e-7 --critic_learning_rate 9e-6 --prompts_per_rollout 512
    --global_batch_size 128 --micro_batch_size 2 --generation_tokens 65536 --release_decode_memory --max_steps 300
    --max_prompt_length 1024 --max_response_length 1024 --score_normalisation running
    --score_clip 5 --missing_eos_penalty 1
    --eval_every 25 --save_every 25)
