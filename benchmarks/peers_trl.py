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

from benchmarks import trl_runner
from step3_ppo.config import PPOConfig
from utils.data import chat_template
from utils.distributed import program
from utils.settings import command_line


class TakeTurns(TrainerCallback):
    """Each step of the trainer is a turn; `measured()` is told with it."""

    def __init__(self, turns, measured=dict):
        self.turns, self.measured = turns, measured

    def on_train_begin(self, args, state, control, **kwargs):
        self.turns.ready()

    def on_step_end(self, args, state, control, **kwargs):
        self.turns.done(**self.measured())


def ppo(turns, argv: list[str], prompts: list[list[int]]) -> None:
    """PPOTrainer with the settings of trl_runner.trl_settings: one optimizer step a minibatch."""
    config = command_line.build(PPOConfig, argv, world_size=1)
    program.quiet_libraries()
    tokenizer = chat_template.load_tokenizer(config.model_name_or_path)
    clock = {"generated": 0.0, "began": 0.0, "scored": 0.0}

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

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


def trainer_settings(output_dir: str, rows: int, micro: int, learning_rate: float, dtype: str):
    """What our SFT and reward steps do, in their words. Their defaults stay where speed is meant:
    only gradient checkpointing is off, as in ours."""
    return dict(
        output_dir=output_dir,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=100_000,
        bf16=dtype == "bf16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        max_length=None,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def sft(turns, folder: str, rows: str, dtype: str, **settings) -> None:
    """SFTTrainer. rows: a file of [prompt, answer] token ids; loss on the answers."""
    program.quiet_libraries()
    rows = json.loads(Path(rows).read_text(encoding="utf-8"))
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=SFTConfig(**trainer_settings(rows=len(rows), dtype=dtype, **settings)),
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


def reward(turns, folder: str, rows: str, dtype: str, **settings) -> None:
    """RewardTrainer. rows: a file of [prompt, preferred answer, other answer] token ids."""
    program.quiet_libraries()
    rows = json.loads(Path(rows).read_text(encoding="utf-8"))
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    )
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**trainer_settings(rows=len(rows), dtype=dtype, **settings)),
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
