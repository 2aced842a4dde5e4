# Your own data and no model: a small Llama-shaped model from random weights and a tokenizer
# trained on that data. Two CPU cores, under an hour on a few thousand rows.
MAX_RANKS=2 # more would only wait for each other on a model this small
SCRATCH_FLAGS=(--vocab_size 8192 --hidden_size 128 --layers 4 --heads 4 --intermediate_size 344)
SFT_FLAGS=(--learning_rate 2e-3 --global_batch_size 32 --micro_batch_size 8 --epochs 2
    --max_length 512 --log_every 20 --eval_every 80)
REWARD_FLAGS=(--learning_rate 5e-4 --global_batch_size 32 --micro_batch_size 8 --epochs 2
    --max_length 768 --log_every 20 --eval_every 107)
PPO_FLAGS=(--learning_rate 4e-5 --prompts_per_rollout 64 --global_batch_size 32
    --micro_batch_size 16 --max_steps 24 --kl_coef 0.2 --max_prompt_length 192
    --max_response_length 96 --eval_every 6 --log_every 2 --max_eval_rows 128)
