"""A step's health in words, from what it recorded: what a reader of its page should know first."""

import difflib
import math
import re
from dataclasses import dataclass

from evaluation.run_folder import Step
from step3_ppo.checks import watch as ppo_watch
from step3_preference import watch as preference_watch

BAD, DOUBT, GOOD, NOTE = LEVELS = ("bad", "doubt", "good", "note")
COLLAPSED, NEVER_STOPS = "collapsed", "never stops"
OVER_OPTIMISED, FAR = "over-optimised", "far from the reference"
# Which warning says the same as a finding.
TELLS = {
    COLLAPSED: "entropy collapses",
    OVER_OPTIMISED: "the score rises and the judge falls",
    FAR: "kl above its limit",
}


# How programs, their launcher and the system say that a step ended by an error.
BROKE_OFF = re.compile(
    r"^\w*(Error|Interrupt): |out of memory|the self-check found|optimizer steps in a row were"
    r"|cannot write |is gone, and the run ends|Traceback"
)


@dataclass(frozen=True)
class Finding:
    """level: one of LEVELS. name: two or three words. text: a sentence or two with the values."""

    level: str
    name: str
    text: str


def replayed(step: Step) -> tuple[dict[str, int], dict[str, str]]:
    """The warnings of step 3 on what it recorded: {name: step at which it was first given}, and
    {name: text} of those that hold at the end."""
    given: dict[str, int] = {}
    rows = [{n: math.nan if v is None else v for n, v in m.items()} for m in step.metrics]
    if step.kind == "ppo":
        watch, module = ppo_watch.Watch(step.config, lambda text: None, None), ppo_watch
        rows = [m for m in rows if m["step"]]  # what is before the first rollout it does not see
    else:
        module = preference_watch
        watch = module.Watch(step.config, lambda text: None)
    for m in rows:
        watch.warn(m["step"], {n: v for n, v in m.items() if n != "step"})
        given |= {name: m["step"] for name in watch.warned if name not in given}
    now = {name: test(watch) for name, test in module.WARNINGS.items()} if rows else {}
    return given, {name: text for name, text in now.items() if text}


def both(step: Step, name: str) -> tuple[float, float] | None:
    """A held-out metric before training and at its newest evaluation."""
    seen = [value for _, value in step.values(f"eval/{name}")]
    return (seen[0], seen[-1]) if len(seen) > 1 else None


def gold_of(step: Step) -> str:
    """The measure of held-out answers that training did not see: the first there is."""
    return next((n for n in ("verifier", "judge") if step.values(f"eval/{n}")), "")


def gold_fell(step: Step, warnings: dict[str, str]) -> bool:
    """Did the answers become worse by what training did not see?"""
    name = gold_of(step)
    values = both(step, name) if name else None
    spread = step.values("eval/judge_std")[0][1] if name == "judge" else 1.0
    fell = values is not None and values[1] - values[0] <= -0.02 * spread
    return fell or TELLS[OVER_OPTIMISED] in warnings


def moved_most(step: Step) -> str:
    """Which part of the reward the change of the score comes from."""
    parts = step.parts()
    if parts:
        return max(parts, key=lambda part: abs(parts[part][1] - parts[part][0]))
    return "reward model" if step.config.reward_model else "reward function"


def pays_for(step: Step) -> str:
    """What the reward seems to pay for, where the length of answers or empty ones tell it."""
    length, text = both(step, "response_length"), ""
    if length and not 0.6 <= length[1] / max(length[0], 1e-9) <= 1 / 0.6:
        how = "shrink" if length[1] < length[0] else "grow"
        text = f" Answers {how} from {length[0]:.1f} to {length[1]:.1f} tokens: look at what the "
        text += f"{moved_most(step)} pays for."
    rows = [row for rows in step.answers().values() for row in rows if "score" in row]
    nothing = [row["score"] for row in rows if not row["answer"].strip()]
    other = [row["score"] for row in rows if row["answer"].strip()]
    if nothing and other and max(nothing) > (mean := sum(other) / len(other)):
        text += f" An empty answer scores {max(nothing):.2f}, others on average {mean:.2f}."
    return text


def repeats(answers: list[dict]) -> bool:
    """Are those that were cut off mostly the same few words again and again?"""
    said = [row["answer"].split() for row in answers if not row["finished"]]
    said = [words for words in said if len(words) >= 8]
    shares = [len(set(words)) / len(words) for words in said]
    return bool(shares) and sum(share < 0.3 for share in shares) > len(shares) / 2


def state_of(step: Step) -> Finding:
    total, done = step.config.max_steps, step.steps_done()
    unit = "rollouts" if step.kind == "ppo" else "steps"
    of = f" of {total}" if total else ""
    stopped = [x for x in step.log if re.match(r"stopped after \d+ rollouts: ", x)]
    if step.result and stopped:
        return Finding(DOUBT, "stopped early", f"It {stopped[-1]}.")
    if step.result:
        minutes = step.result.get("seconds", 0) / 60
        return Finding(NOTE, "finished", f"{done} {unit} in {minutes:.1f} minutes.")
    last = next((x for x in reversed(step.log) if x.strip()), "")
    text = f"{done}{of} {unit} are recorded."
    if broke := next((x for x in step.log[-60:] if BROKE_OFF.search(x)), ""):
        return Finding(BAD, "broke off", f"{text} {broke.strip()[:300]}")
    return Finding(NOTE, "not finished", f"{text} Last line of the log: {last[:200] or 'none'}")


def of_score(step: Step, worse: bool = False) -> Finding | None:
    """worse: the answers are, by what training did not see."""
    values = both(step, "score")
    if values is None:
        return Finding(NOTE, "score", "No held-out score after training is recorded yet.")
    change, error = values[1] - values[0], step.result.get("score_se_change")
    shown = f"{change:+.3f}" + (f" ± {error:.3f}" if error else "")
    text = f"Held-out score {values[0]:.3f} → {values[1]:.3f} ({shown})."
    parts = [f"{part} {a:.3f} → {b:.3f}" for part, (a, b) in step.parts().items()]
    text += f" Of it: {', '.join(parts)}." if parts else ""
    if abs(change) <= 2 * (error or 0):
        return Finding(DOUBT, "score unchanged", f"{text} No more than chance would give.")
    if change > 0:
        return Finding(NOTE if worse else GOOD, "score rose", text)
    return Finding(BAD, "score fell", text)


def of_gold(step: Step, warnings: dict[str, str]) -> Finding:
    name = gold_of(step)
    values = both(step, name) if name else None
    if values is None:
        return Finding(
            NOTE,
            "no second judge",
            "Nothing but the trained reward judged the answers, so over-optimisation cannot be "
            "seen here: set --judge_model, or compare answers with people.",
        )
    seen = step.values(f"eval/{name}")
    best = max(seen, key=lambda point: point[1])
    prompts = step.result.get("held_out_prompts")
    of = f", on {prompts} held-out prompts" if prompts else ""
    text = f"By the {name}, which training did not see{of}: {values[0]:.3f} → {values[1]:.3f} "
    text += "(before: as this step began)."
    if best[1] > values[1]:
        text += f" Best after {best[0]} ({best[1]:.3f})."
    if "the score rises and the judge falls" in warnings:
        why = pays_for(step)
        keep = f" Keep the checkpoint nearest to {best[0]}" + ("." if why else ", or train less.")
        since = "The score rises while this falls from its best."
        if step.parts():
            since += f" The {moved_most(step)} made most of the score's change."
        return Finding(BAD, OVER_OPTIMISED, f"{text} {since}{why}{keep}")
    spread = step.values("eval/judge_std")[0][1] if name == "judge" else 1.0
    change = (values[1] - values[0]) / spread
    if abs(change) < 0.02:
        return Finding(DOUBT, f"{name} unchanged", text)
    return Finding(GOOD if change > 0 else BAD, f"{name} {'rose' if change > 0 else 'fell'}", text)


def of_stops(step: Step) -> Finding | None:
    values = both(step, "eos_share")
    if values is None:
        return None
    text = f"{values[1]:.0%} of the held-out answers end by themselves (before: {values[0]:.0%})"
    mend = (
        "; the others were cut at --max_response_length. Raise it, or set --missing_eos_penalty 1"
    )
    if values[1] < 0.9 and repeats(step.answers().get("after", [])):
        mend = "; the others repeat a few words until they are cut: longer ones would not help. "
        mend += "The policy is broken: look at the reward, raise --kl_coef"
    if values[1] < 0.5:
        return Finding(BAD, NEVER_STOPS if values[1] < 0.2 else "mostly cut", text + mend + ".")
    if values[1] < 0.9:
        return Finding(DOUBT, "often cut", text + mend + ".")
    return Finding(GOOD, "stops", text + ".")


def of_kl(step: Step) -> Finding | None:
    seen = step.values("eval/kl") or step.values("kl")
    if not seen:
        return None
    kl, limit = seen[-1][1], step.config.kl_limit
    text = f"{kl:.2f} nats an answer from the reference policy"
    if kl > limit:
        return Finding(
            BAD, FAR, f"{text}, beyond --kl_limit {limit:g}: its answers are "
            "unlike any that it began with, and what rewards them may be wrong there."
        )  # fmt: skip
    level = DOUBT if kl > limit / 2 else GOOD
    return Finding(level, "KL", f"{text}; the limit is {limit:g}.")


def alike(answers: list[str]) -> float:
    """The share of pairs of answers to different prompts that are nearly the same text."""
    pairs = [(a, b) for i, a in enumerate(answers) for b in answers[:i]]
    same = [difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() > 0.8 for a, b in pairs]
    return sum(same) / len(same) if same else 0.0


def of_variety(step: Step, worse: bool = False) -> Finding | None:
    """worse: the answers are, by what training did not see."""
    entropy = step.values("entropy")
    if not entropy:
        return None
    (_, first), (_, now) = entropy[0], entropy[-1]
    now = sum(x for _, x in entropy[-3:]) / len(entropy[-3:])
    text = f"Entropy {first:.3f} → {now:.3f} nats a token"
    said = step.answers()
    share = {m: alike([row["answer"][:200] for row in said.get(m, [])]) for m in said}
    same = share.get("after", 0.0)
    if said:
        text += f"; of two answers to different prompts {same:.0%} say the same"
    length = both(step, "response_length")
    nothing = length is not None and length[1] <= 2.0 and length[0] > 3 * length[1]
    if now < 0.1 * first or same > max(0.3, 2 * share.get("before", 0.0)) or nothing:
        return Finding(
            BAD, COLLAPSED, f"{text}: whatever it is asked, the policy says the same. Raise "
            "--kl_coef, lower --learning_rate."
        )  # fmt: skip
    well = NOTE if worse else GOOD
    return Finding(DOUBT if now < 0.3 * first else well, "variety", f"{text}.")


def of_length(step: Step) -> Finding | None:
    values = both(step, "response_length")
    if values is None:
        return None
    text = f"Held-out answers have {values[1]:.1f} tokens (before: {values[0]:.1f})."
    steady = values[0] / 3 <= values[1] <= 3 * values[0]
    return Finding(NOTE if steady else BAD, "length" if steady else "length ran away", text)


def of_warnings(step: Step, given: dict[str, int], now: dict[str, str], told=()) -> list[Finding]:
    """told: names of warnings whose subject has a finding of its own."""
    unit = "rollout" if step.kind == "ppo" else "step"
    gone = [f"{name} ({unit} {at})" for name, at in given.items() if name not in now]
    rest = {name: text for name, text in now.items() if name not in told}
    found = [Finding(DOUBT, f"warning: {name}", text) for name, text in rest.items()]
    if gone:
        found.append(Finding(NOTE, "earlier warnings", "Given, and over now: " + "; ".join(gone)))
    return found


def of_self_check(step: Step) -> Finding:
    verdicts = step.verdicts()
    wrong = [f"{name}: {text}" for level, name, text in verdicts if level != "passed"]
    if any(level == "FAULT" for level, *_ in verdicts):
        return Finding(BAD, "self-check: fault", " · ".join(wrong))
    if wrong:
        return Finding(DOUBT, "self-check: doubt", " · ".join(wrong))
    if verdicts:
        return Finding(GOOD, "self-check", f"All {len(verdicts)} checks passed.")
    off = getattr(step.config, "self_check", "on") == "off"
    text = "It was switched off (--self_check off)." if off else "No log.txt tells its verdicts."
    return Finding(DOUBT if off else NOTE, "self-check unknown", text)


def of_skipped(step: Step) -> Finding | None:
    names = ("skipped", "actor_skipped", "critic_skipped")
    steps = {n for name in names for n, share in step.values(name) if share > 0}
    if not steps:
        return None
    text = f"In {len(steps)} of {step.steps_done()} steps updates were left out: not finite."
    return Finding(DOUBT, "skipped updates", text)


def of_reward_model(step: Step) -> Finding | None:
    """Of the end, else of the newest evaluation."""
    seen = [m for m in step.metrics if m.get("eval/accuracy") is not None]
    measured = {n.removeprefix("eval/"): v for n, v in seen[-1].items()} if seen else {}
    measured |= {n: v for n, v in step.result.items() if v is not None}
    if "accuracy" not in measured:
        return None
    accuracy, longer = measured["accuracy"], measured.get("accuracy_longer_answer", 0.0)
    low, high = (measured.get(f"accuracy_{end}", accuracy) for end in ("low", "high"))
    text = f"Right on {accuracy:.3f} (95 %: {low:.3f} to {high:.3f}) of the held-out pairs"
    text += f"; always choosing the longer answer: {longer:.3f}"
    above = low > max(longer, 0.5)
    name = "accuracy" if above else "no better than length or chance"
    return Finding(GOOD if above else BAD, name, f"{text}.")


def of_loss(step: Step) -> Finding | None:
    seen = [value for _, value in step.values("eval/loss")]
    ends = (step.result.get(f"eval_loss_{moment}") for moment in ("before", "after"))
    before, after = ([] if end is None else [end] for end in ends)
    seen = before + seen + after
    if len(seen) < 2:
        return None
    text = f"Held-out loss {seen[0]:.4f} → {seen[-1]:.4f}"
    if seen[-1] > min(seen) + 0.05 * abs(seen[0] - min(seen)) + 1e-6:
        return Finding(DOUBT, "overfitted", f"{text}, at its best {min(seen):.4f}.")
    return Finding(GOOD if seen[-1] < seen[0] else BAD, "held-out loss", f"{text}.")


def of_step(step: Step) -> tuple[Finding, list[Finding]]:
    """The step in one line, and all that is to be said of it, the worst first."""
    found: list[Finding | None] = [state_of(step), of_skipped(step)]
    if step.kind == "ppo":
        given, now = replayed(step)
        worse = gold_fell(step, now)
        found += [of_variety(step, worse), of_stops(step), of_gold(step, now)]
        found += [of_score(step, worse)]
        found += [of_kl(step), of_length(step), of_self_check(step)]
        told = {TELLS[f.name] for f in found if f and f.name in TELLS}
        found += of_warnings(step, given, now, told)
    elif step.kind == "preference":
        given, now = replayed(step)
        found += [of_reward_model(step), of_loss(step), of_self_check(step), of_stops(step)]
        found += [of_gold(step, now)] if gold_of(step) else []
        told = {TELLS[f.name] for f in found if f and f.name in TELLS}
        found += of_warnings(step, given, now, told)
    elif step.kind == "reward":
        found.append(of_reward_model(step))
    else:
        found.append(of_loss(step))
    findings = sorted(filter(None, found), key=lambda f: LEVELS.index(f.level))
    return headline(step, findings), findings


def headline(step: Step, findings: list[Finding]) -> Finding:
    """Of a level: what is wrong, else what became better and what to look at."""
    named = {level: [f.name for f in findings if f.level == level] for level in LEVELS}
    if named[BAD]:
        return Finding(BAD, ", ".join(named[BAD]), "")
    level = DOUBT if named[DOUBT] else GOOD
    if not named[GOOD]:
        level = level if named[DOUBT] else NOTE
    better = [name for name in named[GOOD] if name.endswith("rose")]
    parts = [", ".join(better) or "nothing is wrong"] if named[GOOD] else []
    parts += [] if named[GOOD] or named[DOUBT] else ["nothing to judge yet"]
    parts += [f"look at: {', '.join(named[DOUBT])}"] if named[DOUBT] else []
    parts += ["not over yet"] if not step.result else []
    return Finding(level, "; ".join(parts), "")
