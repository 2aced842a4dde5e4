"""Step 3: PPO. The actor answers prompts, the reward model scores, actor and critic learn.

deepspeed step3_ppo/main.py --model_name_or_path SFT --reward_model RM --prompt_data DATA \\
    --output_dir FOLDER
"""

import dataclasses
import functools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

from step3_ppo import drawing, measures, old_logprobs, samples
from step3_ppo import rollout as rollouts
from step3_ppo.checks import self_check
from step3_ppo.checks.watch import Watch
from step3_ppo.config import PPOConfig
from step3_ppo.experience import make_experience
from step3_ppo.models import build, outputs, readers
from step3_ppo.state import State
from step3_ppo.update import train_on
from utils import report as reporting
from utils.data import prompts as prompt_data
from utils.data import toy_tasks
from utils.data.loading import DataSettings
from utils.distributed import program
from utils.distributed.process_group import StopRun
from utils.models import freezing
from utils.models.scorer import reads_text
from utils.run import Run
from utils.settings import command_line

SHOWN = (
    "score",
    "kl",
    "eval/score",
    "eval/verifier",
    "entropy",
    "response_length",
    "turns",
    "eos_share",
    "explained_variance",
    "seconds",
)
# Numbers the noise of evaluations: the same samples each time, and other ones than any rollout's.
EVALUATION_NOISE = 2**31


def evaluate(models, prompts, config, device, report, when: str, facts: dict) -> dict:
    """Metrics of sampled answers to the held-out prompts; shows people a few of them. The score of
    each prompt, and some of the answers, go to `facts`, as "scores_before" or "scores_after"."""
    rollout, found = rollouts.collect(models, prompts, config, device, EVALUATION_NOISE, judge=True)
    moment = when.split()[0]
    facts[f"scores_{moment}"] = rollout.scores.tolist()
    measured = measures.measure_rollout(rollout, config.estimator_of_kl())
    measured |= {name: value for name, value in found.items() if name.startswith("score_")}
    metrics = {f"eval/{name}": value for name, value in measured.items()}
    texts = rollouts.texts_of(models.tokenizer, rollout)
    verdicts = []
    if all(toy_tasks.is_task(p.row) for p in prompts):
        verdicts = [toy_tasks.verify(p.row, t) for p, t in zip(prompts, texts, strict=True)]
        metrics["eval/verifier"] = sum(verdicts) / len(verdicts)
    facts[f"answers_{moment}"] = samples.held_out(prompts, texts, rollout, verdicts)
    samples.write_answers(config.output_dir, facts)
    report.table("answers", reporting.answers_as_table(facts[f"answers_{moment}"]))
    lines = []
    for i, prompt in enumerate(prompts[: config.sample_answers]):
        said = [turn["content"] for turn in (prompt.messages[-1], *rollout.earlier[i])] + [texts[i]]
        whole = "\n    → ".join(f"{text[:120]!r}" for text in said)
        lines.append(f"  {whole}  (score {rollout.scores[i]:.2f})")
    if lines:
        report.say("\n".join([f"answers {when}:", *lines]))
    return metrics


def load(run: Run):
    """(training prompts, held-out prompts, models) of this run."""
    config, say = run.config, run.say
    length = config.max_prompt_length + config.max_response_length
    tokenizer = run.load_tokenizer(length, "--max_prompt_length, --max_response_length")
    of_scorers = readers(config)
    prompts, held = prompt_data.load(
        config.prompt_data,
        tokenizer,
        config.pick(DataSettings),
        config.max_prompt_length,
        # Prompts that a reward model with another template refuses are left out.
        [r for r in of_scorers.values() if reads_text(r, tokenizer)],
        say,
    )
    critic = f", critic {config.rate_of_critic():g}" if config.has_critic() else ""
    critic += f" (ZeRO-{config.stage_of_critic()})" if config.has_critic() else ""
    say(f"peak learning rates: actor {config.learning_rate:g}{critic}")
    run.announce(
        f"step 3, {config.algorithm.upper()}: {config.max_steps} rollouts of "
        f"{config.prompts_per_rollout} prompts × {config.samples_per_prompt} samples = "
        f"{config.minibatches()} minibatches of {config.global_batch_size}, {config.ppo_epochs} "
        f"epochs; an action is a {config.action_level}",
        config.max_steps,
    )
    models = build(config, tokenizer, run.dtype, run.device, of_scorers)
    for role, engine in models.trained().items():
        say(f"{role}: {freezing.counts(engine.module)}")
    say(f"rollouts: {models.rollout_engine.description}")
    if config.offload_frozen and run.device.type != "cuda":
        say("offload_frozen: the models are in CPU memory anyway")
    if models.ptx is not None:
        say(models.ptx.counts.line("ptx rows"))
    return prompts, held, models


def result_of(before: dict, after: dict, facts: dict) -> dict:
    """What result.json says of the evaluations before and after training; facts: the scores of
    each held-out prompt, as `evaluate` wrote them."""
    first = facts.get("scores_before", [])
    last = facts.get("scores_after", first)
    # --resume_anyway may have changed who is asked: then nothing can be paired.
    gained = [b - a for a, b in zip(first, last, strict=True)] if len(first) == len(last) else []
    result = {f"{k.removeprefix('eval/')}_before": v for k, v in before.items()}
    result |= {f"{k.removeprefix('eval/')}_after": v for k, v in after.items()}
    return result | {
        "held_out_prompts": len(last),
        "score_se_before": reporting.standard_error(first),
        "score_se_after": reporting.standard_error(last),
        "score_se_change": reporting.standard_error(gained),  # paired, prompt by prompt
    }


def main() -> None:
    config = command_line.parse(PPOConfig, __doc__)
    if config.check_only:
        config = config.shortened()
    run = Run(config)
    device = run.device
    prompts, held, models = load(run)
    state = State(kl_coef=config.kl_coef)
    watch = Watch(config, run.say, run.bad_steps)
    engines = models.trained() | ({"average": models.ema} if models.ema is not None else {})
    engines |= {"nucleus": models.nucleus} if models.nucleus is not None else {}
    resumable = {"state": state, "watch": watch}
    resumable |= {"ptx": models.ptx} if models.ptx is not None else {}
    folders = outputs(models, run.settings) | {".": state}
    done = run.restore(folders, engines, prompts.fingerprint(), **resumable)

    if models.nucleus is not None:
        models.nucleus.fill()

    # Decided before the first rollout and kept to the end, also by a resumed run.
    if config.logprobs_from == "auto":
        if not state.logprobs_from:
            state.logprobs_from = old_logprobs.choose(models, held, config, device, run.say)
        config = dataclasses.replace(config, logprobs_from=state.logprobs_from)

    # The self-check: now on a few probe prompts, later on the first rollout and its updates.
    check = self_check.SelfCheck(models, prompts, held, config, device, run.say)
    check.before_the_first_step(done)
    evaluation = functools.partial(evaluate, models, held, config, device, run.report)
    before = run.once("before", lambda: evaluation("before", run.facts))
    after = run.facts.setdefault("after", before)
    if config.score_normalisation == "fixed":
        state.fix(before["eval/score"], before["eval/score_std"])
    if run.resumed_from is None:
        run.report.log(0, before, SHOWN)

    with run:
        for step in range(done, config.max_steps):
            tick = time.time()
            if models.nucleus is not None and step and step % config.mask_every == 0:
                models.nucleus.update()
            try:
                drawn = drawing.draw(models, prompts, config, device, step)
            except StopRun:  # of a reward or an environment, before anything of this step is done
                if step:
                    run.checkpoints.save(step, wait=True)
                raise
            rollout, sampled, greedy, metrics = drawn
            if watch.may_train_on(rollout, step):
                experience, measured = make_experience(rollout, config, state, greedy)
                metrics |= measured
                samples.write_tokens(models.tokenizer, experience, sampled, config, step + 1)
                state.adapt(metrics["kl"], len(sampled), config)
                if config.rollout_ahead:
                    drawing.begin(models, prompts, config, step + 1)
                trained = time.time()
                metrics |= train_on(models, experience, config, device, step, watch, check.follow)
                metrics["seconds_train"] = time.time() - trained
                check.after_the_first_rollout(sampled, experience, metrics)
                if config.check_only:
                    break
            else:
                metrics |= measures.measure_rollout(rollout, config.estimator_of_kl())
            state.rollouts = step + 1
            stop = watch.reason_to_stop(metrics)

            metrics["seconds"] = time.time() - tick
            metrics |= measures.speeds(rollout, metrics)
            last = bool(stop) or step + 1 == config.max_steps
            if last or (config.eval_every and (step + 1) % config.eval_every == 0):
                after = run.facts["after"] = evaluation(f"after {step + 1} rollouts", run.facts)
                metrics |= after
            watch.warn(step, metrics)
            if stop:
                run.report.log(step + 1, metrics, SHOWN)
                run.say(f"stopped after {step + 1} rollouts: {stop}")
                break
            run.after_step(step + 1, metrics, SHOWN)

    if config.check_only:
        run.say("check_only: every check was made; nothing was saved")
        run.close()
        return
    run.save()
    saved = ", ".join(name for name in folders if name != ".")
    result = result_of(before, after, run.facts) | {"rollouts": state.rollouts}
    run.finish(
        result,
        f"held-out score {result['score_before']:.3f} → {result['score_after']:.3f} at KL "
        f"{result['kl_after']:.3f}; saved {config.output_dir}/{saved}",
    )


if __name__ == "__main__":
    program.run(main)
