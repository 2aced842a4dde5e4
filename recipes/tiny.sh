# The embedded task: a model of a million random weights, data made on the spot, no downloads.
# Two CPU cores, five and a half minutes.
EMBEDDED=1
ROUNDS=2 # new comparisons of the policy that PPO made, a new reward model on all of them, PPO again
COMMON_FLAGS=(--save_every_minutes 1)
# Each step in fp32, as the figures in README and benchmarks were measured. (In bf16 scoring and
# updates at this size took 0.74 × the time on a core with AVX-512 BF16, of fp32 without oneDNN.)
MAX_RANKS=2 # more would only wait for each other on a model this small
SCRATCH_FLAGS=(--vocab_size 768 --max_positions 256)
SFT_FLAGS=(--dtype fp32 --learning_rate 3e-3 --global_batch_size 64 --micro_batch_size 32 --epochs 6
    --max_length 96 --log_every 100 --eval_every 500)
COLLECT_FLAGS=(--dtype fp32 --answers_per_prompt 6 --max_prompt_length 64 --max_response_length 24
    --micro_batch_size 64)
REWARD_FLAGS=(--dtype fp32 --learning_rate 1e-3 --global_batch_size 32 --micro_batch_size 16 --epochs 4
    --max_length 96 --log_every 50 --eval_every 200 --max_eval_rows 256 --eval_fraction 0.1)
PPO_FLAGS=(--dtype fp32 --learning_rate 1e-4 --critic_learning_rate 5e-4 --clip_value 5 # scores span ± 5
    --prompts_per_rollout 128 --global_batch_size 32 --micro_batch_size 16 --ppo_epochs 4
    --max_steps 25 --kl_coef 0.1 --max_prompt_length 64 --max_response_length 24 --eval_every 5
    --log_every 5 --max_eval_rows 128)
# Of the rounds after the first, which begin nearer to the end.
LATER_PPO_FLAGS=(--max_steps 32 --eval_every 8)
