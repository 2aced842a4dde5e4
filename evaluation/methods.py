"""Policies side by side: what verifier and reward model think of their answers to held-out prompts,
how far they are from the first policy, how long they answer, and whether they stop.

deepspeed evaluation/methods.py --policies sft=FOLDER dpo=FOLDER --judge_model REWARD_MODEL \
    --prompt_data DATA --output_file methods.json
"""

import dataclasses
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import torch

from evaluation import run_folder
from step2_reward.collect import CollectConfig, sample_answers
from step3_ppo import samples
from utils import whole_files
from utils.checkpoints import resuming
from utils.data import batches, chat_template, splits, tables, toy_tasks
from utils.data import prompts as prompt_data
from utils.data.loading import DataSettings
from utils.distributed import process_group, program, zero
from utils.models import language_model, scalar_model, scorer
from utils.models.loading import Loading
from utils.models.scorer import Reader
from utils.report import standard_error, table
from utils.run import join
from utils.settings import command_line
from utils.settings.fields import setting
from utils.settings.run_config import RunConfig


def named(policies: list[str]) -> dict[str, str]:
    """NAME=FOLDER … → {name: folder}. ValueError for what is no such list."""
    pairs = [policy.partition("=") for policy in policies]
    found = {name: folder for name, _, folder in pairs}
    if len(found) < len(pairs) or not all((*found, *found.values())):
        raise ValueError("not NAME=FOLDER, each name once")
    return found


@dataclass
class MethodsConfig(CollectConfig):
    """Answers are sampled as collect.py does, one to a prompt; what only ranks them is not read."""

    policies: list[str] = setting(
        [], "NAME=FOLDER of each; all are compared with the first", needed=True, check=named
    )
    held_out_data: list[str] = setting(
        [], "prompts that nothing was trained on; empty: those that step 3 holds out of prompt_data"
    )
    judge_model: str = setting("", "folder of the reward model that scores all of them")

    def contradictions(self, world_size: int) -> Iterator[str]:
        yield from RunConfig.contradictions(self, world_size)
        if bool(self.prompt_data) == bool(self.held_out_data):
            yield "one of prompt_data and held_out_data names the prompts; set either"


def load_prompts(config, tokenizer, reader: Reader | None) -> list[prompt_data.Prompt]:
    """Held-out prompts with tokens, which the reward model's template can render too."""
    settings = config.pick(DataSettings)
    bad = settings.bad_rows()
    if config.held_out_data:
        prompts = prompt_data.load_prompts(config.held_out_data, bad=bad)
    else:
        kind, names = prompt_data.PROMPTS, config.prompt_data
        _, held = splits.train_and_held_out(kind, names, None, settings, 3, bad)
        prompts = [held.item(i) for i in range(len(held))]
    readers = (reader,) if reader else ()
    encode = prompt_data.Encode(tokenizer, config.max_prompt_length, config.long_prompts, readers)
    prompts, counts = tables.encode_all(prompts, encode, bad)
    bad.finish("held-out prompts")
    process_group.say(counts.line("held-out prompts"))
    if not prompts:
        raise SystemExit("no held-out prompt is left; raise --max_prompt_length")
    return prompts


@torch.no_grad()
def log_probabilities(model, prompts, answers, config, device) -> list[list[float]]:
    """log p(answer | prompt) at the sampling temperature, in nats a token, on every rank.

    answers: token ids, through the stop token where there is one.
    """
    lengths = [len(p.ids) + len(ids) for p, ids in zip(prompts, answers, strict=True)]
    found = {}
    for chosen in batches.share(range(len(prompts)), lengths, config.micro_batch_size):
        if not chosen:
            continue  # the other ranks have a row more, and nothing waits for them
        rows = [[*prompts[i].ids, *answers[i]] for i in chosen]
        wanted = [[False] * len(prompts[i].ids) + [True] * len(answers[i]) for i in chosen]
        mask = batches.pad([[True] * len(row) for row in rows], False)
        ids, wanted = batches.pad(rows, 0).to(device), batches.pad(wanted, False)
        logprobs, _ = language_model.wanted_logprobs(
            model, ids, mask, wanted, temperature=config.temperature
        )
        parts = logprobs.double().split(wanted.sum(1).tolist())
        found |= {i: part.tolist() for i, part in zip(chosen, parts, strict=True)}
    everywhere = process_group.gather_objects(found)
    found = {i: value for part in everywhere for i, value in part.items()}
    return [found[i] for i in range(len(prompts))]


def each_prompts(config, device) -> dict[str, dict[str, list[float]]]:
    """{policy: {measure: a value for each held-out prompt}}"""
    policies, how = named(config.policies), config.pick(Loading)
    dtype, first = zero.resolve_dtype(config.dtype, device), next(iter(policies.values()))
    tokenizer = chat_template.load_tokenizer(first, config.trust_remote_code, config.date)
    reader = judge = None
    if config.judge_model:
        reader = Reader.load(config.judge_model, config.trust_remote_code, date=config.date)
        judge = scalar_model.load(how, reader.name, dtype=dtype, tokenizer=reader.tokenizer)
        judge = judge.to(device).eval()
    prompts = load_prompts(config, tokenizer, reader)
    sampling = dataclasses.replace(config, answers_per_prompt=1)
    reference = language_model.load(how, first, dtype=dtype).to(device).eval()
    found, before = {}, []
    for name, folder in policies.items():
        own = chat_template.load_tokenizer(folder, config.trust_remote_code, config.date)
        if differ := scorer.differences(tokenizer, own):
            raise SystemExit(f"{folder} and {first} differ in {', '.join(differ)}; leave one out")
        model = language_model.load(how, folder, dtype=dtype).eval()
        encoded = [prompt.ids for prompt in prompts]
        answers = [one for (one,) in sample_answers(sampling, encoded, tokenizer, model, device)]
        ids = [answer.ids for answer in answers]
        own, other = (
            log_probabilities(each, prompts, ids, config, device) for each in (model, reference)
        )
        asked = list(zip(prompts, answers, strict=True))
        moved = [
            [p - q for p, q in zip(*both, strict=True)] for both in zip(own, other, strict=True)
        ]
        values = {"kl": list(map(sum, moved))}
        values["response_length"] = [float(len(answer.ids)) for answer in answers]
        values["eos_share"] = [float(answer.finished) for answer in answers]
        if judge is not None:
            rows = [[reader.encode(p.messages, a.text, a.finished)] for p, a in asked]
            scores = scorer.score_groups(judge, rows, device, config.micro_batch_size)
            values["score"] = [score for (score,) in scores]
        if all(toy_tasks.is_task(p.row) for p in prompts):
            values["verifier"] = [float(toy_tasks.verify(p.row, a.text)) for p, a in asked]
        found[name] = values
        rows = shown_answers(asked, values)
        before = before or rows
        keep_for_page(Path(folder), tokenizer, before, rows, asked, moved, values)
        process_group.say(f"{name}: {len(prompts)} answers, score {_mean(values.get('score'))}")
    return found


def shown_answers(asked, values: dict[str, list[float]]) -> list[dict]:
    """The first answers as samples.json has them. asked: (prompt, answer). values: by measure."""
    rows = []
    for i, (prompt, answer) in enumerate(asked[: samples.ANSWERS]):
        row = {"prompt": list(prompt.messages), "answer": answer.text}
        row |= {"finished": answer.finished, "tokens": len(answer.ids)}
        rows.append(row | {n: values[n][i] for n in ("score", "verifier") if n in values})
    return rows


def keep_for_page(folder: Path, tokenizer, before, after, asked, moved, values) -> None:
    """tokens.json, and samples.json where the step has answered no prompts itself, into the folder
    of a method without rollouts. moved: log p − log q to the first policy of each answer's
    tokens."""
    step = run_folder.read_step(folder)
    if step is None or step.kind == "ppo" or before is after:
        return
    scores = values.get("score") or values["kl"]
    order = sorted(range(len(asked)), key=scores.__getitem__)
    rows = []
    for i in samples.spread(order):
        prompt, answer = asked[i]
        ids = list(answer.ids)[: samples.TOKENS]
        row = {"prompt": list(prompt.messages), "finished": answer.finished}
        row |= {"length": len(answer.ids), "pieces": samples.pieces(tokenizer, ids)}
        row |= {"score": values["score"][i]} if "score" in values else {}
        rows.append(row | {"kl": [round(x, 5) for x in moved[i][: samples.TOKENS]]})
    if not getattr(step.config, "prompt_data", ()):
        samples.write(str(folder), "samples.json", {"before": before, "after": after})
    samples.write(str(folder), "tokens.json", {"step": None, "action_level": "token", "rows": rows})


def _mean(values: list[float] | None) -> str:
    return "none" if values is None else f"{sum(values) / len(values):.3f}"


def summarised(found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Means and their standard errors (…_se); of scores also the change to the first policy's and
    its error, prompt by prompt (…_change, …_change_se)."""
    first, result = next(iter(found.values())), {}
    for name, values in found.items():
        row = result[name] = {"prompts": len(values["kl"])}
        for measure, x in values.items():
            row |= {measure: sum(x) / len(x), f"{measure}_se": standard_error(x)}
        for measure in ("score", "verifier"):
            if measure in values:
                gained = [b - a for a, b in zip(first[measure], values[measure], strict=True)]
                row[f"{measure}_change"] = sum(gained) / len(gained)
                row[f"{measure}_change_se"] = standard_error(gained)
    return result


def measured(value: float, error: float | None, sign: str = "") -> str:
    """A value ± its standard error, which a single prompt does not have."""
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def as_table(
    summary: dict[str, dict[str, float]],
    seconds: dict[str, float],
    scored_by: str = "the reward model of round 1",
) -> str:
    """summary: of `summarised`. seconds: what each method took, beside what all share. scored_by:
    what gives the scores."""
    first = next(iter(summary.values()))
    judges = [name for name in ("verifier", "score") if name in first]
    header = [h for name in judges for h in (name, "change")]
    header += ["KL", "tokens", "stop share", "seconds"]
    rows = []
    for name, row in summary.items():
        cells = []
        for judge in judges:
            cells.append(measured(row[judge], row[f"{judge}_se"]))
            change = row.get(f"{judge}_change"), row.get(f"{judge}_change_se")
            cells.append("" if row is first else measured(*change, "+"))
        cells.append("" if row is first else measured(row["kl"], row.get("kl_se")))
        cells += [f"{row['response_length']:.1f}", f"{row['eos_share']:.3f}"]
        cells.append(f"{seconds[name]:.0f}" if name in seconds else "")
        rows.append((name, *cells))
    legend = (
        f"{first['prompts']} held-out prompts, an answer each. score: by {scored_by}. change, KL "
        "(nats a response): to the first policy. ±: one standard error over the prompts. seconds: "
        "of the stages that are this method's alone."
    )
    return f"{table(rows, ('method', *header))}\n{textwrap.fill(legend, 100)}"


def main() -> None:
    config = command_line.parse(MethodsConfig, __doc__)
    device = join(config)
    config.date = resuming.date_of(config.date)
    summary = summarised(each_prompts(config, device))
    if process_group.is_main():
        text = json.dumps(summary, indent=2, ensure_ascii=False)
        whole_files.write_text(Path(config.output_file), text + "\n")
    process_group.say(as_table(summary, {}))
    process_group.shut_down()


if __name__ == "__main__":
    program.run(main)
