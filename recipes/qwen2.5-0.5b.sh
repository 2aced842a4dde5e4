# Qwen2.5-0.5B on one GPU of 40 GB or more (reckoned, not measured); chosen when --model_name_or_path is given alone.
MODEL=Qwen/Qwen2.5-0.5B
SFT_DATA=(HuggingFaceH4/ultrafeedback_binarized) # its split train_sft: of the same prompts
PREFERENCE_DATA=(HuggingFaceH4/ultrafeedback_binarized)
COMMON_FLAGS=(--dtype bf16 --zero_stage 2)
SFT_FLAGS=(--learning_rate 1e-5 --global_batch_size 64 --micro_batch_size 8 --epochs 2
    --max_length 1024)
REWARD_FLAGS=(--learning_rate 9e-6 --global_batch_size 64 --micro_batch_size 4 --epochs 1
    --max_length 1024 --gradient_checkpointing)
PPO_FLAGS=(--learning_rate 1e-6 --critic_learning_rate 5e-6 --prompts_per_rollout 256
    --global_batch_size 64 --micro_batch_size 8 --generation_tokens 131072 --max_steps 200
    --max_prompt_length 512 --max_response_length 512 --score_normalisation running
    --score_clip 5 --missing_eos_penalty 1
    --eval_every 25 --save_every 50)
