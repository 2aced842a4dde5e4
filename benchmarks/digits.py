"""The digits task: can PPO make answers hold more numbers, for a reward of 0.2 a number up to 1?

    python benchmarks/digits.py --model_name_or_path output/tiny/step1_sft \\
        --data output/tiny/data [--output_dir output/digits] [--max_steps 60]

Runs step 3 with `--reward_function step3_ppo.rewards.shipped:count_of_numbers`, once with a token
as the action and once with the whole answer (a published attempt with the latter saw no growth in a
day), and counts the numbers in sampled answers to held-out prompts, before and after.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from step3_ppo.rewards.shipped import NUMBER  # noqa: E402
from utils.data import batches, chat_template  # noqa: E402
from utils.generation import sampling as generation  # noqa: E402

LENGTH = 24  # tokens an answer may have
FLAGS = (
    "--reward_function step3_ppo.rewards.shipped:count_of_numbers --missing_eos_penalty 1 "
    "--learning_rate 6e-4 --critic_learning_rate 1e-3 --prompts_per_rollout 128 "
    "--global_batch_size 32 --micro_batch_size 16 --ppo_epochs 4 --kl_coef 0.005 "
    f"--max_prompt_length 64 --max_response_length {LENGTH} --eval_every 10 --log_every 10 "
    "--max_eval_rows 128 --tensorboard false"
).split()


@torch.no_grad()
def count_numbers(folder: Path, prompts: list[str]) -> tuple[float, float]:
    """(numbers an answer, share of answers that end with the stop token), at temperature 1."""
    from transformers import AutoModelForCausalLM

    tokenizer = chat_template.load_tokenizer(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    encoded = [
        chat_template.encode_prompt(tokenizer, [{"role": "user", "content": p}]) for p in prompts
    ]
    ids, mask = batches.prompt_batch(encoded, tokenizer.pad_token_id)
    responses = generation.generate(
        model,
        ids,
        mask,
        max_new_tokens=LENGTH,
        stop_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        noise=generation.uniform_noise(len(prompts), LENGTH, 0, 0),
    )
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    ended = (responses == tokenizer.eos_token_id).any(1).float().mean().item()
    return sum(len(NUMBER.findall(text)) for text in texts) / len(texts), ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--data", required=True, help="folder of prompts.jsonl, held_out.jsonl")
    parser.add_argument("--output_dir", default="output/digits")
    parser.add_argument("--max_steps", type=int, default=60)
    arguments = parser.parse_args()
    data, output = Path(arguments.data), Path(arguments.output_dir)
    lines = (data / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    before, ended = count_numbers(Path(arguments.model_name_or_path), prompts)
    print(f"{len(prompts)} held-out prompts")
    print("| policy | numbers an answer | end with the stop token | seconds |")
    print("| --- | --- | --- | --- |")
    print(f"| SFT | {before:.3f} | {ended:.1%} | |", flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for level in ("token", "sequence"):
        out, started = output / level, time.time()
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "step3_ppo/main.py"), *FLAGS, "--overwrite"]
        command += ["--model_name_or_path", arguments.model_name_or_path]
        command += ["--prompt_data", str(data / "prompts.jsonl"), "--output_dir", str(out)]
        command += ["--max_steps", str(arguments.max_steps), "--action_level", level]
        with open(out / "log.txt", "w", encoding="utf-8") as log:
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
        after, ended = count_numbers(out / "actor", prompts)
        seconds = time.time() - started
        print(f"| PPO, {level} level | {after:.3f} | {ended:.1%} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
