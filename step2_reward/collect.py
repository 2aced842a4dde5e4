"""Comparisons from a policy: K sampled answers a prompt, ranked by a labeller, written to disk.

deepspeed step2_reward/collect.py --policy SFT --prompt_data DATA --labeller verifier \
    --output_file comparisons.jsonl
"""

import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

from step2_reward.kept_answers import KEEP, Sampled, rows_of
from step2_reward.labellers import LABELLERS
from utils import whole_files
from utils.checkpoints import resuming
from utils.data import batches, chat_template, comparisons, splits, tables, toy_tasks
from utils.data import prompts as prompt_data
from utils.data.loading import DataSettings
from utils.distributed import process_group, program, zero
from utils.generation import engines
from utils.generation.engine import Request, Sampling, Setup, Untrained, synced
from utils.generation.sampling import uniform_noise
from utils.models import language_model, scalar_model
from utils.models.loading import Loading
from utils.models.scorer import Reader, Scorer
from utils.rewards import judge, sums
from utils.rewards.judge import Judge
from utils.run import join, output_of
from utils.settings import command_line
from utils.settings.fields import check_url, free, setting
from utils.settings.run_config import RunConfig, check_folder, columns_of


def part_of(text: str) -> tuple[float, float]:
    """2/3 → (1/3, 2/3). ValueError for what is no part."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise ValueError("not NUMBER/PARTS with 1 ≤ NUMBER ≤ PARTS, e.g. 2/3")
    return (int(number) - 1) / int(parts), int(number) / int(parts)


@dataclass
class CollectConfig(RunConfig):
    """Of the settings of every step only those that matter to sampling are read."""

    sections = ("all", "collect")
    weighted = "prompt_data"
    trains = False
    output_dir: str = free(
        "", "folder of bad_rows.jsonl; empty: that of --output_file", check=check_folder
    )
    model_name_or_path: str = setting("", "not read: see --policy")
    policy: str = setting("", "folder or hub name of the model to sample from")
    prompt_data: list[str] = setting([], "prompts: files, folders or hub names")
    num_prompts: int = setting(0, "how many prompts, a seeded choice; 0: all")
    prompt_part: str = setting(
        "",
        "2/3: only the second of three disjoint parts of the prompts, e.g. one for each round",
        check=part_of,
    )
    round: int = setting(
        1, "numbers the sampling noise: each round's own, or its answers repeat", at_least=1
    )
    answers_per_prompt: int = setting(
        4, "K, answers sampled a prompt (InstructGPT: 4 to 9)", at_least=2, at_most=64
    )
    max_prompt_length: int = setting(512, "tokens (see --long_prompts)", at_least=1)
    max_response_length: int = setting(512, "tokens sampled at most", at_least=1)
    temperature: float = setting(1.0, "sampling temperature", above=0)
    labeller: str = setting(
        "verifier",
        "what ranks: the embedded task's program, a reward model, functions, a language model as "
        "judge, a file of human rankings, or none (write the answers for people to rank)",
        choices=(*LABELLERS, "file"),
    )
    agreement: float = setting(
        1.0,
        "share of pairs labelled as the verifier would (people: 0.73)",
        above=0.5,
        at_most=1,
        only_with="labeller=verifier",
    )
    reward_model: str = setting(
        "", "folder of the reward model that ranks", only_with="labeller=reward_model"
    )
    reward_read_at: str = setting(
        "auto",
        chat_template.READ_AT_HELP,
        choices=("auto", *chat_template.READ_AT),
        only_with="labeller=reward_model",
    )
    reward_function: list[str] = setting(
        [],
        "package.module:name or FILE.py:name of callables (prompts, responses, rows) → scores",
        only_with="labeller=reward_function",
    )
    reward_weights: list[float] = setting(
        [],
        "what each one's scores are multiplied by (default 1)",
        at_least=-math.inf,
        only_with="labeller=reward_function",
    )
    reward_function_timeout: float = free(
        60.0, "seconds each of them may take for --micro_batch_size prompts; 0: any"
    )
    judge_url: str = setting(
        "",
        "http(s)://…/v1 of an endpoint that speaks OpenAI's protocol; its token is read from the "
        f"environment variable {judge.TOKEN}",
        check=check_url,
        only_with="labeller=judge",
    )
    judge_name: str = setting(
        "", "the model that it shall use, by its name there", only_with="labeller=judge"
    )
    judge_timeout: float = free(120.0, "seconds a verdict, with all tries; 0: any")
    judge_parallel: int = free(8, "verdicts asked for at once", at_least=1)
    rankings: str = setting(
        "", "rows of prompt, responses, and ranks or scores", only_with="labeller=file"
    )
    keep: str = setting(
        "ranking",
        "ranking: all answers with their scores, for step 2; best: each prompt's best whole answer "
        "as a demonstration for step 1 (best-of-n, RAFT)",
        choices=tuple(KEEP),
    )
    output_file: str = setting("", "where they go, JSON Lines", needed=True)

    @classmethod
    def completed(cls, values: dict) -> dict:
        folder = str(Path(values.get("output_file", "")).parent)
        return values | {"output_dir": values.get("output_dir") or folder}

    def contradictions(self, world_size: int) -> Iterator[str]:
        yield from super().contradictions(world_size)
        sampled = ["policy", "prompt_data"]
        needed = {"file": ["rankings"], "reward_model": [*sampled, "reward_model"]}
        needed["reward_function"] = [*sampled, "reward_function"]
        needed["judge"] = [*sampled, "judge_url", "judge_name"]
        for name in needed.get(self.labeller, sampled):
            if not getattr(self, name):
                yield f"labeller={self.labeller} needs --{name}, which is empty"
        if self.reward_weights and len(self.reward_weights) != len(self.reward_function):
            yield (
                f"reward_weights={self.reward_weights} has {len(self.reward_weights)} numbers for "
                f"{len(self.reward_function)} of --reward_function; give --reward_weights one each"
            )
        if self.keep == "best" and self.labeller == "none":
            yield "keep=best needs scores and labeller=none gives none; set --labeller"
        if self.output_file and os.path.isdir(self.output_file):
            yield f"output_file={self.output_file!r} is a folder; name a file in it"


def sample_answers(config, encoded, tokenizer, model, device) -> list[list[Sampled]]:
    """K answers to each prompt of `encoded` (id lists), on every rank, in that order."""
    k, length = config.answers_per_prompt, config.max_response_length
    stop_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    noise = uniform_noise(len(encoded) * k, length, config.seed, config.round - 1)
    sampling = Sampling(length, stop_id, pad_id, config.temperature)
    policy = Untrained(model.to(device))
    mine, sampled = batches.dealt(list(map(len, encoded))), {}
    setup = Setup(policy, tokenizer, decode="auto")
    with synced(engines.build("native", setup), policy) as engine:
        for start in range(0, len(mine), config.micro_batch_size):
            chosen = mine[start : start + config.micro_batch_size]
            rows = [i * k + j for i in chosen for j in range(k)]
            prompts = batches.prompt_batch([encoded[row // k] for row in rows], pad_id)
            samples = engine.generate(Request(*prompts, noise[rows]), sampling)
            texts = tokenizer.batch_decode(samples.response_ids, skip_special_tokens=True)
            finished = [reason == "stop" for reason in samples.finish_reasons]
            kept = zip(samples.response_ids, samples.response_mask, strict=True)
            ids = [tuple(row[mask].tolist()) for row, mask in kept]
            answers = list(map(Sampled, texts, finished, ids))
            sampled |= {i: answers[n * k : (n + 1) * k] for n, i in enumerate(chosen)}
    everything = {
        i: found for part in process_group.gather_objects(sampled) for i, found in part.items()
    }
    return [everything[i] for i in range(len(encoded))]


def write_sampled(path: Path, lines: list[dict]) -> None:
    """In ASCII: a policy may sample what UTF-8 cannot hold, such as half a surrogate pair."""
    with whole_files.writing(path, "--output_file") as file:
        file.writelines(json.dumps(row) + "\n" for row in lines)


def write(config, lines: list[dict], labels: list[list[float]] | None, seconds: float = 0) -> None:
    """What is kept; beside it the settings that it was made with, and figures (.result.json)."""
    path, (form, what, why_not) = Path(config.output_file), KEEP[config.keep]
    every = zip(lines, labels or [None] * len(lines), strict=True)
    kept = [row for pair in every if (row := form(*pair))]
    if not kept:
        raise SystemExit(f"no {what} left: raise --temperature or --answers_per_prompt")
    finished = [mark for row in lines for mark in row["finished"]]
    figures = {"prompts": len(lines), "kept": len(kept), "seconds": seconds}
    figures["finished_share"] = sum(finished) / len(finished)
    if labels:
        figures["score"] = sum(map(sum, labels)) / sum(map(len, labels))
        figures["best_score"] = sum(map(max, labels)) / len(labels)
    settings = settings_of(config)
    with whole_files.writing(path, "--output_file") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        command_line.save(config, settings.parent, process_group.world_size(), name=settings.name)
        whole_files.write_text(path.with_suffix(".result.json"), json.dumps(figures, indent=2))
    process_group.say(
        f"{path}: {len(kept)} {what}; {len(lines) - len(kept)} prompts left out, {why_not}"
    )
    if labels:
        process_group.say(
            f"mean score {figures['score']:.3f}, of each prompt's best {figures['best_score']:.3f}"
        )


def settings_of(config) -> Path:
    """The file beside the comparisons that says how they were made."""
    return Path(config.output_file).with_suffix(".config.yaml")


def import_rankings(config) -> None:
    """People's rankings, checked, in the form step 2 reads, with provenance."""
    bad, columns = config.pick(DataSettings).bad_rows(), columns_of(config.columns)
    read = comparisons.load_comparisons([config.rankings], columns=columns, bad=bad)
    bad.finish(config.rankings)
    prompts = [prompt_data.Prompt(c.prompt, c.where, {}) for c in read]
    answers = [list(map(Sampled, c.responses, c.finished)) for c in read]
    write(config, rows_of(config, prompts, answers), [list(c.scores) for c in read])


def load_prompts(config, tokenizer, reader: Reader | None) -> list[prompt_data.Prompt]:
    """Prompts that the policy's template and the reward model's can render."""
    settings = config.pick(DataSettings)
    bad = settings.bad_rows()
    # What step 3 holds out (same seed, same --eval_fraction) must not teach the reward model.
    train, _ = splits.train_and_held_out(
        prompt_data.PROMPTS, config.prompt_data, None, settings, 2, bad
    )
    if config.prompt_part:
        low, high = part_of(config.prompt_part)
        places = train.places("prompt_part")  # by prompt: one that stands twice is in one part
        train = train.take((low <= places) & (places < high))
    order = list(range(len(train)))
    random.Random(config.seed).shuffle(order)
    encode = prompt_data.Encode(
        tokenizer, config.max_prompt_length, config.long_prompts, (reader,) if reader else ()
    )
    chosen = (train[i] for i in order[: config.num_prompts or None])
    prompts, counts = tables.encode_all(chosen, encode, bad)
    bad.finish("prompt_data")
    process_group.say(counts.line("prompts"))
    other = [p.where for p in prompts if not toy_tasks.is_task(p.row)]
    if config.labeller == "verifier" and other:
        raise SystemExit(
            f"labeller=verifier: {other[0]} is no task of utils/data/toy_tasks.py ({len(other)} in "
            "all), which alone it judges; choose --labeller reward_model, file or none for others"
        )
    return prompts


def collect(config, device) -> None:
    started = time.time()
    dtype = zero.resolve_dtype(config.dtype, device)
    tokenizer = chat_template.load_tokenizer(config.policy, config.trust_remote_code, config.date)
    how, reader, reward = config.pick(Loading), None, None
    if config.reward_model:
        reader = Reader.load(
            config.reward_model, config.trust_remote_code, config.reward_read_at, config.date
        )
    if config.reward_function:
        of_functions = config.reward_weights, config.reward_function_timeout
        reward = sums.load(config.reward_function, *of_functions)
    if config.judge_url:
        # Each verdict is kept: what was paid for once is not asked again.
        kept = Path(config.output_file).with_suffix(".judgements.jsonl")
        how_asked = config.judge_timeout, config.judge_parallel
        reward = Judge(config.judge_url, config.judge_name, *how_asked, kept=kept)
    prompts = load_prompts(config, tokenizer, reader)
    encoded = [prompt.ids for prompt in prompts]
    if reader is not None:
        # Before hours of sampling: a folder that holds no reward model is refused now.
        model = scalar_model.load(how, reader.name, dtype=dtype, tokenizer=reader.tokenizer)
        reward = Scorer(model, reader, True, device)
    model = language_model.load(how, config.policy, dtype=dtype)
    answers = sample_answers(config, encoded, tokenizer, model.eval(), device)
    lines = rows_of(config, prompts, answers)
    # As people would be given it: whatever goes wrong now, the hours of sampling are not lost.
    kept = Path(config.output_file).with_suffix(".sampled.jsonl")
    if process_group.is_main():
        write_sampled(kept, lines)
    process_group.say(f"{kept}: what was sampled, until it is ranked")

    labels = LABELLERS[config.labeller](config, prompts, answers, reward)
    if process_group.is_main():
        write(config, lines, labels, time.time() - started)
        kept.unlink()
    characters = sum(len(a.text) for group in answers for a in group)
    process_group.say(
        f"{len(prompts)} × {config.answers_per_prompt} answers, {characters} characters in "
        f"{time.time() - started:.1f} s"
    )


def main() -> None:
    config = command_line.parse(CollectConfig, __doc__)
    output_of(config).check_file(Path(config.output_file), settings_of(config))
    device = join(config)
    config.date = resuming.date_of(config.date)
    if config.labeller != "file":
        collect(config, device)
    elif process_group.is_main():
        import_rankings(config)
    process_group.shut_down()


if __name__ == "__main__":
    program.run(main)
