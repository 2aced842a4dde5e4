"""Step 3: PPO. The actor answers prompts, the reward model scores, actor and critic learn.

deepspeed step3_ppo/main.py --model_name_or_path SFT --reward_model RM --prompt_data DATA \\
    --output_dir FOLDER
"""

import functools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory


from step3_ppo import rollout as rollouts
from step3_ppo.checks import self_check
from step3_ppo.checks.watch import Watch
from step3_ppo.config import PPOConfig
from step3_ppo.models import build, parts
from step3_ppo.rewards.model import readers, reads_text
from step3_ppo.state import State
from step3_ppo.update import train_on
from utils import report as reporting
from utils.checkpoints import model_folder as checkpoint
from utils.checkpoints import resuming
from utils.checkpoints.checkpoints import Checkpoints
from utils.data import batches, chat_template, toy_tasks
from utils.data import prompts as prompt_data
from utils.data.loading import DataSettings
from utils.distributed import process_group, shared_files, zero
from utils.kernels.cpu_products import PRODUCTS
from utils.models import language_model
from utils.planner import plan as planner
from utils.seeding import seed_everything
from utils.settings import fields as run_config

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


def evaluate(models, prompts, config, device, report, when: str, kept: dict) -> dict[str, float]:
    """Metrics of sampled answers to the held-out prompts; shows people a few of them. kept: takes
    the score of each prompt, as "scores_before" or "scores_after"."""
    rollout, _ = rollouts.collect(models, prompts, config, device, EVALUATION_NOISE, judge=True)
    kept[f"scores_{when.split()[0]}"] = rollout.scores.tolist()
    measured = rollouts.measure(rollout, config.kl_estimator)
    metrics = {f"eval/{name}": value for name, value in measured.items()}
    texts = rollouts.texts_of(models.tokenizer, rollout.response_ids, rollout.response_mask)
    if all(toy_tasks.is_task(p.row) for p in prompts):
        verdicts = [toy_tasks.verify(p.row, t) for p, t in zip(prompts, texts, strict=True)]
        metrics["eval/verifier"] = sum(verdicts) / len(verdicts)
    shown = zip(prompts[: config.sample_answers], texts, rollout.scores, strict=False)
    lines = [
        f"  {p.messages[-1]['content'][:120]!r}\n    → {text[:120]!r}  (score {score:.2f})"
        for p, text, score in shown
    ]
    if lines:
        report.say("\n".join([f"answers {when}:", *lines]))
    return metrics


def say_engines(models, config, device, report) -> None:
    from utils.generation import engine as rollout_engines

    rows = config.decoded_at_once(process_group.world_size())
    others = [models.critic] if models.critic is not None else []
    report.say(rollout_engines.settle(models.rollout_engine, config, rows, others))
    if config.offload_frozen and device.type != "cuda":
        report.say("offload_frozen: the models are in CPU memory anyway")


def start(config, device, resumed_at: int | None):
    """(report, training prompts, held-out prompts, models, state) of this run."""
    world = process_group.world_size()
    dtype = zero.resolve_dtype(config.dtype, device)
    report = reporting.Report(config.output_dir, config.log_every, config.tensorboard, resumed_at)
    report.say(
        f"step 3, {config.algorithm.upper()}: {config.max_steps} rollouts of "
        f"{config.prompts_per_rollout} prompts × {config.samples_per_prompt} samples = "
        f"{config.minibatches()} minibatches of {config.global_batch_size}, {config.ppo_epochs} "
        f"epochs; an action is a {config.action_level}; {dtype}, ZeRO-{config.zero_stage} (critic "
        f"{config.stage_of_critic()}), " + reporting.batch_arithmetic(config, world)
    )
    critic = "" if config.algorithm == "reinforce" else f", critic {config.rate_of_critic():g}"
    report.say(f"peak learning rates: actor {config.learning_rate:g}{critic}")
    run_config.save(config, config.output_dir, world, process_group.is_main())
    language_model.check_positions(
        config.model_name_or_path,
        config.max_prompt_length + config.max_response_length,
        "--max_prompt_length, --max_response_length",
        config.trust_remote_code,
    )
    tokenizer = chat_template.load_tokenizer(
        config.model_name_or_path, config.trust_remote_code, config.date
    )
    prompts, held = prompt_data.load(
        config.prompt_data,
        tokenizer,
        config.pick(DataSettings),
        config.max_prompt_length,
        [r for r in readers(config).values() if reads_text(r, tokenizer)],
        report.say,
    )
    planner.first_lines("ppo", config, device, report.say)
    models = build(config, tokenizer, dtype, device)
    say_engines(models, config, device, report)
    models.old_logprobs.say = report.say
    if models.ptx is not None:
        report.say(models.ptx.counts.line("ptx rows"))
    return report, prompts, held, models, State(kl_coef=config.kl_coef)


def say_result(models, config, report, before: dict, after: dict, kept: dict, counted) -> None:
    """Write result.json; what the evaluations before and after say, for people."""
    first = kept.get("scores_before", [])
    last = kept.get("scores_after", first)
    # --resume_anyway may have changed who is asked: then nothing can be paired.
    gained = [b - a for a, b in zip(first, last, strict=True)] if len(first) == len(last) else []
    counted |= {"held_out_prompts": len(last)}
    counted |= {"score_se_before": reporting.standard_error(first)}
    counted |= {"score_se_after": reporting.standard_error(last)}
    counted |= {"score_se_change": reporting.standard_error(gained)}  # paired, prompt by prompt
    result = {f"{k.removeprefix('eval/')}_before": v for k, v in before.items()}
    result |= {f"{k.removeprefix('eval/')}_after": v for k, v in after.items()} | counted
    reporting.save_result(config.output_dir, result)
    report.say(
        f"held-out score {result['score_before']:.3f} → {result['score_after']:.3f} at KL "
        f"{result['kl_after']:.3f}; saved {config.output_dir}/actor"
        + (", critic" if models.critic is not None else "")
        + (", actor_ema" if models.ema is not None else "")
    )


def main() -> None:
    config = run_config.parse(PPOConfig, __doc__)
    if config.check_only:
        config = config.shortened()
    resuming.check_output(config)
    reporting.quiet_libraries()
    device = process_group.init(config.timeout_minutes)
    shared_files.check(config)
    seed_everything(config.seed, config.deterministic)
    found = resuming.find(config)
    resuming.settle_date(config, found)

    # Build: prompts, models; of a resumed run, where its checkpoint ends.
    report, prompts, held, models, state = start(config, device, found and found.step)
    saved = parts(models, config, state)
    save = functools.partial(checkpoint.save, config.output_dir, saved)

    run = Checkpoints(config, report, found, device)
    check = self_check.SelfCheck(models, prompts, held, config, device, report.say)
    watch = Watch(config, report.say, save)
    carried = {"state": state, "watch": watch, "old_logprobs": models.old_logprobs}
    carried |= {"products": PRODUCTS} | ({"ptx": models.ptx} if models.ptx is not None else {})
    done = run.follow(check.trained(), carried, saved, prompts.fingerprint(), models.ema)

    # Check what must hold of the weights that training goes on from; look at the first ones.
    check.before_the_first_step(done)
    evaluation = functools.partial(evaluate, models, held, config, device, report)
    before = run.once("before", lambda: evaluation("before", run.facts))
    if config.score_normalisation == "fixed":
        state.fix(before["eval/score"], before["eval/score_std"])
    report.expect(config.max_steps)
    if found is None:
        report.log(0, before, show=SHOWN)

    # Loop: rollout, advantages, updates.
    after = run.facts.setdefault("after", before)
    with run:
        for step in range(done, config.max_steps):
            tick = time.time()
            chosen = batches.rows_of_step(
                step, config.prompts_per_rollout, len(prompts), config.seed
            )
            sampled = [prompts[i] for i in chosen for _ in range(config.samples_per_prompt)]
            rollout, metrics = rollouts.collect(models, sampled, config, device, noise_step=step)
            if watch.may_train_on(rollout, step):
                experience, measured = rollouts.make_experience(rollout, config, state)
                metrics |= measured
                state.adapt(metrics["kl"], len(sampled), config)
                trained = time.time()
                metrics |= train_on(models, experience, config, device, step, watch, check.follow)
                metrics["seconds_train"] = time.time() - trained
                check.after_the_first_rollout(sampled, experience, metrics)
                if config.check_only:
                    break
            else:
                metrics |= rollouts.measure(rollout, config.kl_estimator)
            state.rollouts = step + 1
            stop = watch.reason_to_stop(metrics)

            metrics["seconds"] = time.time() - tick
            metrics |= rollouts.speeds(rollout, metrics)
            last = bool(stop) or step + 1 == config.max_steps
            if last or (config.eval_every and (step + 1) % config.eval_every == 0):
                after = run.facts["after"] = evaluation(f"after {step + 1} rollouts", run.facts)
                metrics |= after
            watch.warn(step, metrics)
            report.log(step + 1, metrics, show=SHOWN)
            if stop:
                report.say(f"stopped after {step + 1} rollouts: {stop}")
                break
            run.after_step(step + 1, metrics)

    if config.check_only:
        report.say("check_only: every check was made; nothing was saved")
    else:
        save()
        counted = {"rollouts": state.rollouts, "seconds": run.seconds()}
        say_result(models, config, report, before, after, run.facts, counted)
    report.close()
    process_group.shut_down()


if __name__ == "__main__":
    reporting.run(main)
