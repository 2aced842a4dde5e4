# The embedded task: a model of a million random weights, data made on the spot, no downloads.
# Two CPU cores, under ten minutes.
EMBEDDED=1
MAX_RANKS=2 # more would only wait for each other on a model this small
SCRATCH_FLAGS=(--vocab_size 768 --max_positions 256)
SFT_FLAGS=(--learning_rate 3e-3 --global_batch_size 32 --micro_batch_size 16 --epochs 12
    --max_length 96 --log_every 200 --eval_every 1000)
COLLECT_FLAGS=(--answers_per_prompt 6 --max_prompt_length 64 --max_response_length 24
    --micro_batch_size 64)
REWARD_FLAGS=(--learning_rate 5e-4 --global_batch_size 32 --micro_batch_size 16 --epochs 5
    --max_length 96 --log_every 50 --eval_every 100 --max_eval_rows 256 --eval_fraction 0.1)
PPO_FLAGS=(--learning_rate 2e-4 --prompts_per_rollout 128 --global_batch_size 32
    --micro_batch_size 16 --ppo_epochs 4 --max_steps 25 --kl_coef 0.1 --max_prompt_length 64
    --max_response_length 24 --eval_every 5 --log_every 5 --max_eval_rows 128)
