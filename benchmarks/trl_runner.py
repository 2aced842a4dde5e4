"""TRL's PPOTrainer on our models, prompts and settings, and a view into its train() as it runs.

TRL 1.12, trl/experimental/ppo/ppo_trainer.py: train() computes a rollout's numbers inline, in local
variables. `Capture` reads those variables while train() runs; no line of it is copied here.
"""

import contextlib
import math
import sys

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl.experimental.ppo import PPOConfig as TRLConfig
from trl.experimental.ppo import PPOTrainer, ppo_trainer

from utils.distributed import zero


def trl_settings(config, output_dir: str) -> TRLConfig:
    """Our PPOConfig → theirs: every setting that both have.

    Their gradient_accumulation_steps must be 1 here. A minibatch of theirs is a micro-batch at
    most, and accelerate steps the optimizer once every gradient_accumulation_steps micro-batches;
    as a rollout is per_device_train_batch_size × gradient_accumulation_steps sequences, that is
    once an epoch, whatever num_mini_batches says. With 1, and the rollout as "per device" batch,
    each minibatch is one micro-batch and one optimizer step, as ours.
    """
    return TRLConfig(
        output_dir=output_dir,
        per_device_train_batch_size=config.rollout_size(),
        gradient_accumulation_steps=1,
        num_mini_batches=config.minibatches(),
        num_ppo_epochs=config.ppo_epochs,
        total_episodes=config.max_steps * config.rollout_size(),
        local_rollout_forward_batch_size=config.rollout_size(),
        response_length=config.max_response_length,
        stop_token="eos",
        temperature=config.temperature,
        # Ours replaces the score of an unfinished response, theirs subtracts from it: left off.
        missing_eos_penalty=None,
        kl_coef=config.kl_coef,
        kl_estimator=config.estimator_of_kl(),
        cliprange=config.clips()[0],
        cliprange_value=config.clip_value or math.inf,
        # Policy and value model share no weight and Adam divides by the gradient's own size, so
        # this coefficient only scales the printed loss. 1: the critic's gradient is ours.
        vf_coef=1.0,
        whiten_rewards=config.whiten_rewards,
        gamma=config.gamma,
        lam=config.lam,
        learning_rate=config.learning_rate,
        seed=config.seed,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=config.dtype == "bf16",  # autocast over fp32 weights
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def load_models(config):
    """(policy, reference, reward model, value model) as plain transformers loads them, in fp32
    whatever they were saved in: ours are."""
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (
            config.model_name_or_path,
            config.reference_model or config.model_name_or_path,
        )
    )
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
        for path in (config.reward_model, config.critic_model or config.reward_model)
    )
    for model in (reward, value):
        bias = float(getattr(model.config, "reward_bias", 0.0))
        # Their get_reward reads `model.score`; our heads have no bias, the config holds it.
        model.score.register_forward_hook(lambda module, inputs, out, bias=bias: out - bias)
    return policy, reference, reward, value


def optimizer_and_schedule(policy, value, config):
    """AdamW over both models, as TRL has it, with our settings of it.

    TRL's own would have one learning rate for both; here the value model keeps our critic's. TRL
    steps the schedule once a rollout, we once an optimizer step: here each rollout gets the
    mean of what our schedule gives its steps.
    """
    critic_rate = config.rate_of_critic()
    optimizer = torch.optim.AdamW(
        [
            {"params": list(policy.parameters()), "lr": config.learning_rate},
            {"params": list(value.parameters()), "lr": critic_rate},
        ],
        betas=(0.9, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    total, each = config.optimizer_steps(), config.ppo_epochs * config.minibatches()
    warmup = math.ceil(config.warmup_ratio * total)

    def factor(rollout: int) -> float:
        steps = range(rollout * each, (rollout + 1) * each)
        return sum(zero.lr_factor(s, total, warmup, config.lr_schedule) for s in steps) / each

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def build_trainer(config, prompts: list[list[int]], tokenizer, output_dir: str, callbacks=()):
    """A PPOTrainer that has not begun; `prompts` are token ids, `tokenizer` becomes theirs."""
    set_seed(config.seed)  # PPOTrainer leaves numpy, which shuffles its minibatches, unseeded
    tokenizer.padding_side = "left"  # of the prompts: their collator asks the tokenizer
    policy, reference, reward, value = load_models(config)
    trainer = PPOTrainer(
        args=trl_settings(config, output_dir),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        optimizers=optimizer_and_schedule(policy, value, config),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def locals_of_train() -> dict:
    """Local variables of the PPOTrainer.train() that is running above us on the stack."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not PPOTrainer.train.__code__:
        frame = frame.f_back
    if frame is None:
        raise RuntimeError("called from outside PPOTrainer.train()")
    return dict(frame.f_locals)


def _copy(values: dict, names: str) -> dict:
    """The named tensors (cloned) and numbers. KeyError where their train() has no such variable."""
    return {
        name: values[name].detach().clone() if torch.is_tensor(values[name]) else values[name]
        for name in names.split()
    }


class Capture(TrainerCallback):
    """What PPOTrainer.train() computes, read while it computes it, inside `watching`.

    rollout: its per-token tensors (B,R) at the end of one iteration, plus `raw_advantages`, before
    whitening. updates: one dict an optimizer step: the rows, the losses, the weights after it.
    Only the last iteration's rollout is kept, so run one.
    """

    ROLLOUT = (
        "queries responses logprobs ref_logprobs values scores kl non_score_reward rewards "
        "advantages returns padding_mask padding_mask_p1 sequence_lengths context_length"
    )
    UPDATE = "micro_batch_inds pg_loss vf_loss new_logprobs vpred ratio"

    def __init__(self):
        self.rollout: dict = {}
        self.updates: list[dict] = []
        self._raw = None

    @contextlib.contextmanager
    def watching(self, trainer):
        trainer.add_callback(self)
        self._modules = {"policy": trainer.policy_model, "value": trainer.value_model}
        backward, whiten = trainer.accelerator.backward, ppo_trainer.masked_whiten

        def watched_backward(loss, **kwargs):
            self.updates.append(_copy(locals_of_train(), self.UPDATE))
            return backward(loss, **kwargs)

        def watched_whiten(values, mask, shift_mean=True):
            self._raw = values.detach().clone()  # of the last call in a rollout: the advantages
            return whiten(values, mask, shift_mean)

        trainer.accelerator.backward = watched_backward
        ppo_trainer.masked_whiten = watched_whiten
        # The hook sits in torch's own AdamW, so it counts steps that are really made.
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        optimizer.register_step_post_hook(self._after_step)
        try:
            yield
        finally:
            ppo_trainer.masked_whiten = whiten

    def _after_step(self, optimizer, args, kwargs) -> None:
        self.updates[-1]["weights"] = {
            name: {k: v.detach().clone() for k, v in module.named_parameters()}
            for name, module in self._modules.items()
        }

    def on_step_end(self, args, state, control, **kwargs):
        # Still inside train(): the variables are deleted right after this callback.
        self.rollout = _copy(locals_of_train(), self.ROLLOUT)
        self.rollout["raw_advantages"] = self._raw
