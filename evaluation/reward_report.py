"""The report card of a reward model on held-out comparisons: where it is right, how sure it is,
what it pays for, and its worst mistakes in full.

python evaluation/reward_report.py --config output/step2_reward/config.yaml \\
    --reward_model output/step2_reward

The settings are those of step 2, so that its config.yaml names the data and what is held out of it.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import torch

from evaluation import checkpoints, prompt_eval, reward_card
from evaluation.methods import named
from evaluation.questions import Question
from step2_reward.config import RewardConfig
from utils import whole_files
from utils.data import chat_template, comparisons, sources, tables
from utils.data import prompts as prompt_data
from utils.data.comparisons import Comparison, Ranked
from utils.data.loading import DataSettings, load_items
from utils.data.rows import DataError
from utils.distributed import program, zero
from utils.models import scalar_model, scorer
from utils.models.loading import Loading
from utils.models.scorer import Reader
from utils.settings import command_line
from utils.settings.fields import setting
from utils.settings.run_config import columns_of

CATEGORIES = ("subset", "category", "family", "source")  # RewardBench's first


@dataclass
class RewardReportConfig(RewardConfig):
    model_name_or_path: str = setting("", "not read: see --reward_model")
    reward_model: str = setting("", "folder or hub name of the reward model", needed=True)
    preference_data: list[str] = setting(
        [], "the data of step 2, of which what it holds out is scored: files, folders, hub names"
    )
    held_out_data: list[str] = setting(
        [], "comparisons that nothing was trained on, as RewardBench: all are scored, and only they"
    )
    second_reward_model: str = setting("", "another one, whose choices are compared with it")
    policies: list[str] = setting(
        [],
        "NAME=FOLDER of policies whose answers to the held-out prompts are scored too",
        check=named,
    )
    max_new_tokens: int = setting(128, "tokens of such an answer at most", at_least=1)
    category: str = setting(
        "", f"column of the data that names a category; empty: the first of {', '.join(CATEGORIES)}"
    )
    worst: int = setting(10, "pairs that are shown in full, the most wrong ones")

    def contradictions(self, world_size: int) -> Iterator[str]:
        yield from super().contradictions(world_size)
        if world_size > 1:
            yield f"{world_size} ranks; start one process"
        if not (self.preference_data or self.held_out_data):
            yield "no comparisons; set --preference_data or --held_out_data"
        for name in ("reward_model", "second_reward_model"):
            if path := getattr(self, name):
                problems = checkpoints.folder_problems(path, "reward_model")
                yield from (p.replace("reward_model", name) for p in problems)


def load_model(config, path: str):
    """(reader, model on its device) of a reward model."""
    reader = Reader.load(path, config.trust_remote_code, date=config.date)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = zero.resolve_dtype(config.dtype, device)
    model = scalar_model.load(config.pick(Loading), path, dtype=dtype, tokenizer=reader.tokenizer)
    return reader, model.to(device).eval(), device


def scores_of(config, model, device, groups) -> list[list[float]]:
    scores = scorer.score_groups(
        model, groups, device, config.micro_batch_size, config.micro_batch_tokens
    )
    every = [score for group in scores for score in group]
    if without := len(every) - sum(map(math.isfinite, every)):
        raise SystemExit(
            f"a reward model gives {without} of {len(every)} answers no finite score; set --dtype "
            "fp32, or look at its weights"
        )
    return scores


def as_text_reads(reader: Reader, rows: list[Comparison]) -> list[list[list[int]]]:
    """The ids of every answer as a reward model with another tokenizer reads them. Raises DataError
    for prompts that its template refuses."""
    if refused := [f"{row.where}: {why}" for row in rows if (why := reader.refusal(row.prompt))]:
        raise DataError(refused, title="comparisons that cannot be scored:")
    return [
        [
            reader.encode(row.prompt, text, done)
            for text, done in zip(row.responses, row.finished, strict=True)
        ]
        for row in rows
    ]


def answers_of_policies(config, rows, reader, model, device) -> dict[str, list[float]]:
    """Scores of each policy's sampled answers to the prompts of `rows`, one to a prompt."""
    once = list({str(row.prompt): row for row in rows}.values())
    asked = [Question(r.prompt[:-1], (r.prompt[-1]["content"],), r.where) for r in once]
    scores = {}
    for name, folder in named(config.policies).items():
        how = prompt_eval.PromptEvalConfig(
            checkpoints=[folder],
            strategy="sample",
            show_answers=False,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
        )
        groups, _ = prompt_eval.answer_all(how, folder, asked)
        ids = [[reader.encode(a.conversation[:-1], a.answer, a.finished)] for (a,) in groups]
        scores[name] = [score for (score,) in scores_of(config, model, device, ids)]
    return scores


# Data.


def read(config, kind, bad) -> list:
    """The items of a kind in the rows that may be scored."""
    found = []
    how = dict(schema=config.data_schema, columns=columns_of(config.columns), bad=bad)
    for name in config.held_out_data or config.preference_data:
        role = "eval" if sources.has_split(name, comparisons.SPLITS["eval"]) else "train"
        found += load_items(kind, [name], split_role=role, **how)
    return found


def load(config, tokenizer) -> tuple[list[Ranked], list[Comparison]]:
    """Held-out comparisons as tokens and as text, those whose answers are not all equally good."""
    settings = config.pick(DataSettings)
    if not config.held_out_data:
        names = config.preference_data
        _, held, _ = comparisons.load(names, [], tokenizer, settings, config.max_length, print)
        return list(held), [held.item(i) for i in range(len(held))]
    bad = settings.bad_rows()
    encode = comparisons.Encode(tokenizer, config.max_length, config.long_prompts)
    rows = read(config, comparisons.COMPARISONS, bad)
    both = [(tables.encode_one(row, encode, bad)[0], row) for row in rows]
    kept = [(r, row) for r, row in both if r is not None and len(set(r.labels)) > 1]
    bad.finish("held_out_data")
    print(f"{len(kept)} comparisons; {len(rows) - len(kept)} left out: equally good, or too long")
    if not kept:
        raise SystemExit("no comparison is left; give other --held_out_data, raise --max_length")
    return [r for r, _ in kept], [row for _, row in kept]


def categories_of(config, rows: list[Comparison]) -> list[str | None]:
    """The category of each row by its column in the data, None where there is none."""
    kind = dataclasses.replace(prompt_data.PROMPTS, splits=comparisons.SPLITS)
    data = {p.where: p.row for p in read(config, kind, config.pick(DataSettings).bad_rows())}
    wanted = [config.category] if config.category else CATEGORIES
    found = []
    for row in rows:
        values = (data.get(row.where, {}).get(name) for name in wanted)
        found.append(next((str(value) for value in values if value is not None), None))
    if config.category and not any(found):
        raise SystemExit(f"category={config.category!r} is no column of the data; set --category")
    return found


def main() -> None:
    config = command_line.parse(RewardReportConfig, __doc__)
    program.quiet_libraries()
    tokenizer = chat_template.load_tokenizer(
        config.reward_model, config.trust_remote_code, config.date
    )
    reader, model, device = load_model(config, config.reward_model)
    if reader.max_length < config.max_length:
        print(f"max_length {config.max_length} → {reader.max_length}, the reward model's positions")
        config = dataclasses.replace(config, max_length=reader.max_length)
    ranked, rows = load(config, tokenizer)
    categories = categories_of(config, rows)
    groups = (
        [r.answers for r in ranked] if reader.read_at == "stop" else as_text_reads(reader, rows)
    )
    scores = scores_of(config, model, device, groups)
    policies = answers_of_policies(config, rows, reader, model, device)
    second = None
    if config.second_reward_model:
        reader, model, device = load_model(config, config.second_reward_model)
        second = scores_of(config, model, device, as_text_reads(reader, rows))
    report = reward_card.report_of(rows, ranked, scores, categories, second, policies, config.worst)
    report["reward_model"] = config.reward_model
    folder, title = (
        Path(config.output_dir),
        f"{config.reward_model} on " + ", ".join(config.held_out_data or config.preference_data),
    )
    text = json.dumps(report, indent=2, ensure_ascii=False)
    whole_files.write_text(folder / "reward_report.json", text + "\n")
    whole_files.write_text(folder / "reward_report.md", reward_card.as_markdown(report, title))
    reward_card.plot(report, folder / "reward_report.png")
    print(reward_card.tables_of(report))
    print(f"written: {folder}/reward_report.json, reward_report.md, reward_report.png", flush=True)


if __name__ == "__main__":
    program.run(main)
