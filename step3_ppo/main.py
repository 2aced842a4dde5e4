"""Step 3: PPO. The actor answers prompts, the reward model scores, actor and critic learn.

deepspeed step3_ppo/main.py --model_name_or_path SFT --reward_model RM --prompt_data DATA \\
    --output_dir FOLDER
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import torch

from step3_ppo import algorithm
from step3_ppo import rollout as rollouts
from step3_ppo.config import PPOConfig
from step3_ppo.models import build, save
from step3_ppo.update import train_on
from utils import config as run_config
from utils import report as reporting
from utils.data import batches, chat_template, instructions, rows, splits, toy_tasks
from utils.distributed import process_group, zero
from utils.models import language_model

SHOWN = (
    "score",
    "kl",
    "eval/score",
    "eval/verifier",
    "entropy",
    "response_length",
    "eos_share",
    "explained_variance",
    "seconds",
)
EVALUATION_NOISE = 2**31  # its samples are the same at every evaluation and no rollout's


def load_prompts(config, tokenizer, report):
    """(ids of training prompts, ids of held-out prompts, held-out prompts)."""
    bad = rows.BadRows(config.on_bad_rows, f"{config.output_dir}/bad_rows.jsonl")

    def load(names, role):
        return instructions.load_prompts(names, split_role=role, schema=config.data_schema, bad=bad)

    train, held = splits.train_and_held_out(
        config.prompt_data, load, instructions.PROMPT_SPLITS["eval"], config, step=3, bad=bad
    )
    limit = config.max_prompt_length
    _, encoded, counts = batches.encode_prompts(tokenizer, train, limit, bad)
    held, held_encoded, held_counts = batches.encode_prompts(tokenizer, held, limit, bad)
    bad.finish("prompt_data")
    report.say(counts.line("prompts"))
    report.say(held_counts.line("held-out prompts"))
    return encoded, held_encoded, held


def evaluate(models, encoded, prompts, config, device) -> tuple[dict[str, float], str]:
    """Metrics of sampled answers to the held-out prompts, and a few of them for people."""
    rollout, _ = rollouts.collect(models, encoded, config, device, EVALUATION_NOISE)
    metrics = {f"eval/{k}": v for k, v in rollouts.measure(rollout).items()}
    texts = models.tokenizer.batch_decode(
        rollout.response_ids.where(rollout.response_mask, models.tokenizer.pad_token_id),
        skip_special_tokens=True,
    )
    if all(toy_tasks.is_task(p.row) for p in prompts):
        verdicts = [toy_tasks.verify(p.row, t) for p, t in zip(prompts, texts, strict=True)]
        metrics["eval/verifier"] = sum(verdicts) / len(verdicts)
    shown = "\n".join(
        f"  {p.messages[-1]['content'][:120]!r}\n    → {text[:120]!r}  (score {score:.2f})"
        for p, text, score in zip(
            prompts[: config.sample_answers], texts, rollout.scores, strict=False
        )
    )
    return metrics, shown


def main() -> None:
    config = run_config.parse(PPOConfig, __doc__)
    reporting.quiet_libraries()
    device = process_group.init(config.timeout_minutes)
    world = process_group.world_size()
    dtype = zero.resolve_dtype(config.dtype, device)
    torch.manual_seed(config.seed)
    started = time.time()

    # Build: prompts, models.
    report = reporting.Report(config.output_dir, config.log_every, config.tensorboard)
    report.expect(config.max_steps)
    report.say(
        f"step 3, PPO: {config.max_steps} rollouts of {config.prompts_per_rollout} prompts × "
        f"{config.samples_per_prompt} samples = {config.minibatches()} minibatches of "
        f"{config.global_batch_size}, {config.ppo_epochs} epochs; {dtype}, "
        f"ZeRO-{config.zero_stage} (critic {config.stage_of_critic()}), "
        + reporting.batch_arithmetic(config, world)
    )
    run_config.save(config, config.output_dir, world, process_group.is_main())
    language_model.check_positions(
        config.model_name_or_path,
        config.max_prompt_length + config.max_response_length,
        "--max_prompt_length, --max_response_length",
        config.trust_remote_code,
    )
    tokenizer = chat_template.load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    prompts, held_encoded, held = load_prompts(config, tokenizer, report)
    models = build(config, tokenizer, dtype, device)

    before, shown = evaluate(models, held_encoded, held, config, device)
    if shown:
        report.say(f"answers before:\n{shown}")
    report.log(0, before, show=SHOWN)

    # Loop: rollout, advantages, updates.
    after, kl_coef = before, config.kl_coef
    for step in range(config.max_steps):
        tick = time.time()
        chosen = batches.rows_of_step(step, config.prompts_per_rollout, len(prompts), config.seed)
        sampled = [prompts[i] for i in chosen for _ in range(config.samples_per_prompt)]
        rollout, seconds = rollouts.collect(models, sampled, config, device, noise_step=step)
        experience, metrics = rollouts.make_experience(rollout, config, kl_coef)
        if config.kl_target > 0:
            kl_coef = algorithm.adapted_kl_coef(
                kl_coef, metrics["kl"], config.kl_target, len(sampled), config.kl_horizon
            )

        trained = time.time()
        metrics |= train_on(models, experience, config, device, step)

        now = time.time()
        tokens = int(rollout.response_mask.sum())
        metrics |= seconds | {"seconds_train": now - trained, "seconds": now - tick}
        for phase in ("generate", "score", "train"):
            metrics[f"tokens_per_second_{phase}"] = tokens / metrics[f"seconds_{phase}"]
        last = step + 1 == config.max_steps
        if last or (config.eval_every and (step + 1) % config.eval_every == 0):
            after, shown = evaluate(models, held_encoded, held, config, device)
            metrics |= after
            if shown:
                report.say(f"answers after {step + 1} rollouts:\n{shown}")
        report.log(step + 1, metrics, show=SHOWN)
        if config.save_every and (step + 1) % config.save_every == 0 and not last:
            save(models, config)

    # Save.
    save(models, config)
    result = {f"{k.removeprefix('eval/')}_before": v for k, v in before.items()}
    result |= {f"{k.removeprefix('eval/')}_after": v for k, v in after.items()}
    reporting.save_result(config.output_dir, result | {"seconds": time.time() - started})
    report.say(
        f"held-out score {result['score_before']:.3f} → {result['score_after']:.3f} at KL "
        f"{result['kl_after']:.3f}; saved {config.output_dir}/actor, critic"
        + (", actor_ema" if models.ema is not None else "")
    )
    report.close()
    process_group.shut_down()


if __name__ == "__main__":
    reporting.run(main)
