"""TRL 1.12's trainers as sides of the throughput benchmarks, in the environment of
requirements_trl.txt. Each function is run by benchmarks.worker in a process of its own.

Their loops are not touched: a callback, called once an optimizer step (PPO: once a rollout), waits
for the turn inside train().
"""

import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.ppo import ppo_trainer

from benchmarks import trl_runner, trl_trainers
from step3_ppo.config import PPOConfig
from utils.data import chat_template
from utils.distributed import program
from utils.settings import command_line


class TakeTurns(TrainerCallback):
    """Every `steps` of the trainer are a turn; `measured()` is told with it."""

    def __init__(self, turns, measured=dict, steps: int = 1):
        self.turns, self.measured, self.steps = turns, measured, steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.turns.ready()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            self.turns.done(**self.measured())


def ppo(turns, argv: list[str], prompts: list[list[int]]) -> None:
    """PPOTrainer with the settings of trl_runner.trl_settings: one optimizer step a minibatch."""
    config = command_line.build(PPOConfig, argv, world_size=1)
    program.quiet_libraries()
    tokenizer = chat_template.load_tokenizer(config.model_name_or_path)
    clock = {"generated": 0.0, "began": 0.0, "scored": 0.0}

    generate, whiten = ppo_trainer.batch_generation, ppo_trainer.masked_whiten

    def timed_generate(*args, **kwargs):
        clock["began"] = now()
        found = generate(*args, **kwargs)
        clock["generated"] = now()
        return found

    def timed_whiten(*args, **kwargs):
        found = whiten(*args, **kwargs)
        clock["scored"] = now()  # its last call in a rollout is of the advantages
        return found

    def measured() -> dict[str, float]:
        values = trl_runner.locals_of_train()
        return {
            "seconds_generate": clock["generated"] - clock["began"],
            "seconds_score": clock["scored"] - clock["generated"],
            "seconds_train": now() - clock["scored"],
            "tokens": int((values["sequence_lengths"] + 1).sum()),
        }

    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = timed_generate, timed_whiten
    callbacks = [TakeTurns(turns, measured)]
    trl_runner.build_trainer(config, prompts, tokenizer, config.output_dir, callbacks).train()


def online(turns, name: str, argv: list[str], prompts: list[list[int]]) -> None:
    """GRPOTrainer or RLOOTrainer: one rollout and one optimizer step a minibatch are a turn. Its
    reward model is given texts, as it asks for."""
    config = command_line.build(PPOConfig, argv, world_size=1)
    program.quiet_libraries()
    tokenizer = chat_template.load_tokenizer(config.model_name_or_path)
    seconds = {}

    def timed(trainer, method: str) -> None:
        plain = getattr(trainer, method)

        def call(*args, **kwargs):
            started = now()
            found = plain(*args, **kwargs)
            seconds[method] = now() - started
            return found

        setattr(trainer, method, call)

    def measured() -> dict[str, float]:
        whole = seconds["_generate_and_score_completions"]
        return {
            "seconds_generate": seconds["_generate"],
            "seconds_score": whole - seconds["_generate"],
            "seconds_train": now() - turns.started - whole,
            "tokens": sum(int(part["completion_mask"].sum()) for part in trainer._buffered_inputs),
        }

    reward_model = AutoModelForSequenceClassification.from_pretrained(
        config.reward_model, num_labels=1, dtype=torch.float32
    )
    trainer = trl_trainers.online(
        name,
        config,
        [tokenizer.decode(ids) + " " for ids in prompts],
        reward_model,
        config.output_dir,
        [TakeTurns(turns, measured, steps=config.minibatches())],
        max_steps=100_000,
    )
    timed(trainer, "_generate")
    timed(trainer, "_generate_and_score_completions")
    trainer.train()


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def sft(turns, folder: str, rows: str, **settings) -> None:
    """SFTTrainer. rows: a file of [prompt, answer] token ids; loss on the answers."""
    program.quiet_libraries()
    rows = json.loads(Path(rows).read_text(encoding="utf-8"))
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=SFTConfig(**trl_trainers.settings(rows=len(rows), **settings), max_length=None),
        processing_class=chat_template.load_tokenizer(folder),
        train_dataset=Dataset.from_dict(
            {
                "input_ids": [[*p, *a] for p, a in rows],
                "labels": [[-100] * len(p) + a for p, a in rows],
            }
        ),
        callbacks=[TakeTurns(turns)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def reward(turns, folder: str, rows: str, **settings) -> None:
    """RewardTrainer. rows: a file of [prompt, preferred answer, other answer] token ids."""
    program.quiet_libraries()
    rows = json.loads(Path(rows).read_text(encoding="utf-8"))
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    )
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**trl_trainers.settings(rows=len(rows), **settings), max_length=None),
        processing_class=chat_template.load_tokenizer(folder),
        train_dataset=Dataset.from_dict(
            {
                "chosen_ids": [[*p, *a] for p, a, _ in rows],
                "rejected_ids": [[*p, *b] for p, _, b in rows],
            }
        ),
        callbacks=[TakeTurns(turns)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def dpo(turns, folder: str, rows: str, cached: bool, **settings) -> None:
    """DPOTrainer. rows: as `reward`. cached: the reference's log-probabilities are computed once
    before training, which is not its default."""
    program.quiet_libraries()
    rows = json.loads(Path(rows).read_text(encoding="utf-8"))
    tokenizer = chat_template.load_tokenizer(folder)
    given = trl_trainers.settings(rows=len(rows), **settings)
    given |= {"max_length": None, "precompute_ref_log_probs": cached}
    columns = {
        name: [tokenizer.decode(row[i]) + " " * (i == 0) for row in rows]
        for i, name in enumerate(("prompt", "chosen", "rejected"))
    }
    callbacks = [TakeTurns(turns)]
    trl_trainers.offline("dpo", folder, None, columns, callbacks, **given).train()
