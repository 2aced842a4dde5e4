"""TRL 1.12's trainers without a critic or without a reward model, on our models and rows, and a
view into them as they run.

`watching` reads local variables of their methods when these return, and the gradients and weights
of each optimizer step; no line of TRL is copied here.
"""

import contextlib
import inspect
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from utils.data import chat_template

ONLINE = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
OFFLINE = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "cpo": (CPOTrainer, CPOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
}


def settings(output_dir: str, rows: int, micro: int, learning_rate: float, dtype: str) -> dict:
    """What our steps do, in their words: `rows` an optimizer step, `micro` a forward pass. Their
    defaults stay where speed is meant: only gradient checkpointing is off, as in ours."""
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
        bf16=dtype == "bf16",  # autocast over fp32 weights
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def online(name: str, config, prompts: list[str], rewards, folder: str, callbacks=(), **more):
    """A GRPOTrainer or RLOOTrainer that has not begun, with the settings of our PPOConfig: the
    rollout, its minibatches and epochs, the clip, the optimizer. prompts: as the chat template
    renders them; rewards: TRL's reward_funcs; `more` of their settings."""
    trainer, arguments = ONLINE[name]
    rows, micro = config.global_batch_size, config.micro_batch_size
    given = settings(folder, rows, micro, config.learning_rate, config.dtype)
    given |= dict(
        seed=config.seed,
        max_steps=config.optimizer_steps(),
        max_grad_norm=config.gradient_clipping,
        generation_batch_size=config.rollout_size(),
        num_generations=config.samples_per_prompt,
        num_iterations=config.ppo_epochs,
        max_completion_length=config.max_response_length,
        temperature=config.temperature,
        beta=config.kl_coef,
        epsilon=config.clips()[0],
        epsilon_high=config.clips()[1],
    )
    made = trainer(
        model=_load(config.model_name_or_path),
        reward_funcs=rewards,
        args=arguments(**given | more),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=chat_template.load_tokenizer(config.model_name_or_path),
        callbacks=list(callbacks),
    )
    if config.reference_model and made.ref_model is not None:  # they take the policy's own start
        made.ref_model.load_state_dict(_load(config.reference_model).state_dict())
    made.remove_callback(PrinterCallback)
    return made


def offline(name: str, model: str, reference: str | None, rows: dict, callbacks=(), **more):
    """A trainer on preferences that has not begun. rows: TRL's columns; `more`: its settings."""
    trainer, arguments = OFFLINE[name]
    loaded = {"ref_model": _load(reference)} if reference else {}
    made = trainer(
        model=_load(model),
        args=arguments(**more),
        train_dataset=Dataset.from_dict(rows),
        processing_class=chat_template.load_tokenizer(model),
        callbacks=list(callbacks),
        **loaded,
    )
    made.remove_callback(PrinterCallback)
    return made


def _load(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def snapshot(value):
    """A copy of tensors, alone or in a dict, that what runs on will not change."""
    if torch.is_tensor(value):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: snapshot(v) for k, v in value.items()}
    return value


@contextlib.contextmanager
def watching(trainer, **wanted: str):
    """Inside, `trainer.train()` is watched. wanted: method → the local variables to keep of it.

    Yields {method: [{variable: value} of each call, in the order of their ends], "steps":
    [{"gradients", "weights": {name: tensor}} of each optimizer step, before and after it]}.
    KeyError where a method has no such variable.
    """
    found = {method: [] for method in wanted} | {"steps": []}
    codes = {
        inspect.unwrap(getattr(type(trainer), method)).__code__: (method, names.split())
        for method, names in wanted.items()
    }
    trainer.create_optimizer()
    weights = dict(trainer.model.named_parameters())

    def on_return(frame, event, value):
        if event == "return" and frame.f_code in codes:
            method, names = codes[frame.f_code]
            found[method].append({name: snapshot(frame.f_locals[name]) for name in names})

    def before_step(optimizer, args, kwargs):
        gradients = {n: p.grad.clone() for n, p in weights.items()}
        found["steps"].append({"gradients": gradients})

    def after_step(optimizer, args, kwargs):
        found["steps"][-1]["weights"] = snapshot(weights)

    trainer.optimizer.register_step_pre_hook(before_step)
    trainer.optimizer.register_step_post_hook(after_step)
    sys.setprofile(on_return)
    try:
        yield found
    finally:
        sys.setprofile(None)
