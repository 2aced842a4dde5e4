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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory


from utils import whole_files
from utils.checkpoints import resuming
from utils.data import (
    batches,
    chat_template,
    comparisons,
    rows,
    splits,
    tables,
    toy_tasks,
)
from utils.data import prompts as prompt_data
from utils.data.loading import DataSettings
from utils.distributed import process_group, program, zero
from utils.generation import sampling as generation
from utils.generation.decoder import Decoder
from utils.models import language_model, scalar_model, scorer
from utils.models.loading import Loading
from utils.models.scorer import Reader
from utils.run import join, output_of
from utils.settings import command_line
from utils.settings.fields import free, setting
from utils.settings.run_config import RunConfig, columns_of


@dataclass
class CollectConfig(RunConfig):
    """Of the settings of every step only those that matter to sampling are read."""

    sections = ("all", "collect")
    weighted = "prompt_data"
    output_dir: str = free("", "folder of bad_rows.jsonl; empty: that of --output_file")
    model_name_or_path: str = setting("", "not read: see --policy")
    policy: str = setting("", "folder or hub name of the model to sample from")
    prompt_data: list[str] = setting([], "prompts: files, folders or hub names")
    num_prompts: int = setting(0, "how many prompts, a seeded choice; 0: all")
    answers_per_prompt: int = setting(
        4, "K, answers sampled a prompt (InstructGPT: 4 to 9)", at_least=2, at_most=64
    )
    max_prompt_length: int = setting(512, "tokens (see --long_prompts)", at_least=1)
    max_response_length: int = setting(512, "tokens sampled at most", at_least=1)
    temperature: float = setting(1.0, "sampling temperature", above=0)
    labeller: str = setting(
        "verifier",
        "who ranks: a program, a reward model, a file of human "
        "rankings, or none (write the answers for people to rank)",
        choices=("verifier", "reward_model", "file", "none"),
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
    rankings: str = setting(
        "", "rows of prompt, responses, and ranks or scores", only_with="labeller=file"
    )
    output_file: str = setting("", "where the comparisons go, JSON Lines", needed=True)

    @classmethod
    def completed(cls, values: dict) -> dict:
        folder = str(Path(values.get("output_file", "")).parent)
        return values | {"output_dir": values.get("output_dir") or folder}

    def problems(self, world_size: int) -> list[str]:
        problems = super().problems(world_size)
        if self.labeller == "file":
            if not self.rankings:
                problems.append("labeller=file needs --rankings FILE")
        elif not self.policy or not self.prompt_data:
            problems.append(
                f"labeller={self.labeller} samples answers: set --policy, --prompt_data"
            )
        if self.labeller == "reward_model" and not self.reward_model:
            problems.append("labeller=reward_model needs --reward_model FOLDER")
        if self.output_file and os.path.isdir(self.output_file):
            problems.append(f"output_file={self.output_file!r} is a folder; name a file in it")
        return problems

    def batch_problems(self, world_size: int) -> list[str]:
        return []  # nothing is trained, and micro-batches of prompts may differ in size


class Sampled(NamedTuple):
    text: str
    finished: bool  # ended with the stop token, not cut at --max_response_length


def sample_answers(config, encoded, tokenizer, model, device) -> list[list[Sampled]]:
    """K answers to each prompt of `encoded` (id lists), on every rank, in that order."""
    rank, world = process_group.rank(), process_group.world_size()
    k, length = config.answers_per_prompt, config.max_response_length
    noise = generation.uniform_noise(len(encoded) * k, length, config.seed, 0)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    mine = order[rank::world]
    found, decoder = {}, Decoder()
    for start in range(0, len(mine), config.micro_batch_size):
        chosen = mine[start : start + config.micro_batch_size]
        ids, mask = batches.prompt_batch(
            [encoded[i] for i in chosen for _ in range(k)], tokenizer.pad_token_id
        )
        responses = generation.generate(
            model,
            ids.to(device),
            mask.to(device),
            max_new_tokens=length,
            stop_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            temperature=config.temperature,
            noise=noise[[i * k + j for i in chosen for j in range(k)]],
            decoder=decoder,
        )
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        finished = (responses == tokenizer.eos_token_id).any(1).tolist()
        sampled = list(zip(texts, finished, strict=True))
        found |= {i: sampled[n * k : (n + 1) * k] for n, i in enumerate(chosen)}
    everything = {i: t for part in process_group.gather_objects(found) for i, t in part.items()}
    return [[Sampled(*one) for one in everything[i]] for i in range(len(encoded))]


def agreeing_scores(scores: list[list[float]], agreement: float, seed: int) -> list[list[float]]:
    """Scores with noise, so that a share `agreement` of the pairs that differ keep their order.

    A labeller who errs on answers rather than on pairs: the ranking of one prompt stays free of
    cycles, as a person's is. The noise's size is found by bisection on these very answers.
    """
    if agreement >= 1.0:
        return scores
    draw = random.Random(seed)
    noise = [[draw.gauss(0.0, 1.0) for _ in group] for group in scores]

    def noisy(size: float) -> list[list[float]]:
        return [
            [s + size * e for s, e in zip(*pair, strict=True)]
            for pair in zip(scores, noise, strict=True)
        ]

    low, high = 0.0, 1e4 * (max(map(max, scores)) - min(map(min, scores)) + 1e-9)
    for _ in range(60):
        middle = (low + high) / 2
        if share_agreeing(scores, noisy(middle)) > agreement:
            low = middle
        else:
            high = middle
    return noisy(high)


def share_agreeing(truth: list[list[float]], other: list[list[float]]) -> float:
    """Share of the pairs that differ in `truth` which `other` orders the same way."""
    same = pairs = 0
    for t, o in zip(truth, other, strict=True):
        for i in range(len(t)):
            for j in range(i):
                if t[i] != t[j]:
                    pairs += 1
                    same += (t[i] > t[j]) == (o[i] > o[j])
    return same / max(pairs, 1)


def refuse_other_tasks(prompts) -> None:
    if other := [p.where for p in prompts if not toy_tasks.is_task(p.row)]:
        raise SystemExit(
            f"labeller=verifier: {other[0]} is no task of utils/data/toy_tasks.py ({len(other)} in "
            "all), which alone it judges; choose --labeller reward_model, file or none for others"
        )


def label_with_verifier(config, prompts, answers) -> list[list[float]]:
    scores = [
        [toy_tasks.verify(p.row, a.text) for a in group]
        for p, group in zip(prompts, answers, strict=True)
    ]
    labelled = agreeing_scores(scores, config.agreement, config.seed)
    if process_group.is_main():
        share = share_agreeing(scores, labelled)
        mean = sum(map(sum, scores)) / sum(map(len, scores))
        print(
            f"verifier: mean score {mean:.3f}; labels agree with it on {share:.1%} of the pairs "
            "that differ",
            flush=True,
        )
    return labelled


def label_with_reward_model(config, reader, model, prompts, answers, device) -> list[list[float]]:
    """Scores as PPO would give them; `model` is the one that `reader` (Reader) is of."""
    groups = [
        [reader.encode(prompt.messages, *answer) for answer in group]
        for prompt, group in zip(prompts, answers, strict=True)
    ]
    prompts_at_once = max(1, config.micro_batch_size // config.answers_per_prompt)
    return scorer.score_groups(model.to(device), groups, device, prompts_at_once)


def keep_samples(config, prompts, answers) -> Path:
    """Write what was sampled beside the output, as people would be given it, before it is ranked:
    whatever goes wrong then, the hours of sampling are not lost."""
    path = Path(config.output_file).with_suffix(".sampled.jsonl")
    with whole_files.writing(path, "--output_file") as f:
        for prompt, group in zip(prompts, answers, strict=True):
            f.write(json.dumps(row_of(config, prompt, group), ensure_ascii=True) + "\n")
    print(f"{path}: what was sampled, until it is ranked", flush=True)
    return path


def row_of(config, prompt, answers: list[Sampled]) -> dict:
    """A row of comparisons that nobody has ranked, with its provenance."""
    provenance = {
        "policy": config.policy,
        "labeller": config.labeller,
        "seed": config.seed,
        "temperature": config.temperature,
        "agreement": config.agreement,
    }
    return {
        "prompt": list(prompt.messages),
        "responses": [a.text for a in answers],
        "finished": [a.finished for a in answers],
        "provenance": provenance | {"prompt": prompt.where},
    }


def write(config, prompts, answers, labels) -> None:
    """Comparisons with their provenance; answers that say the same count once."""
    kept = ties = 0
    path = Path(config.output_file)
    with whole_files.writing(path, "--output_file") as f:
        for prompt, group, scores in zip(prompts, answers, labels, strict=True):
            # A tiny policy samples control bytes now and then, which no data file should hold.
            unique = {
                a.text: (a, s)
                for a, s in zip(group, scores, strict=True)
                if a.text.strip() and not rows.text_problem(a.text)
            }
            group, scores = zip(*unique.values(), strict=True) if unique else ((), ())
            if len(group) < 2 or (config.labeller != "none" and len(set(scores)) < 2):
                ties += 1
                continue
            kept += 1
            row = row_of(config, prompt, group)
            if config.labeller != "none":
                row["scores"] = scores
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not kept:
            raise SystemExit("no comparison left: raise --temperature or --answers_per_prompt")
        settings = settings_of(config)
        command_line.save(config, settings.parent, process_group.world_size(), name=settings.name)
    print(
        f"{path}: {kept} comparisons; {ties} prompts left out, whose answers were all alike or "
        "equally good",
        flush=True,
    )


def settings_of(config) -> Path:
    """The file beside the comparisons that says how they were made."""
    return Path(config.output_file).with_suffix(".config.yaml")


def import_rankings(config) -> None:
    """People's rankings, checked, in the form step 2 reads, with provenance."""
    bad = rows.BadRows(config.max_bad_rows, f"{config.output_dir}/bad_rows.jsonl")
    columns = columns_of(config.columns)
    found = comparisons.load_comparisons([config.rankings], columns=columns, bad=bad)
    bad.finish(config.rankings)
    prompts = [prompt_data.Prompt(c.prompt, c.where, {}) for c in found]
    answers = [list(map(Sampled, c.responses, c.finished)) for c in found]
    write(config, prompts, answers, [c.scores for c in found])


def load_prompts(config, tokenizer, reader: Reader | None):
    """(prompts that the policy's template and the labeller's, if it has one, can render, Counts)"""
    bad = rows.BadRows(config.max_bad_rows, f"{config.output_dir}/bad_rows.jsonl")
    # What step 3 holds out (same seed, same --eval_fraction) must not teach the reward model.
    train, _ = splits.train_and_held_out(
        prompt_data.PROMPTS, config.prompt_data, None, config.pick(DataSettings), 2, bad
    )
    order = list(range(len(train)))
    random.Random(config.seed).shuffle(order)
    encode = prompt_data.Encode(
        tokenizer, config.max_prompt_length, config.long_prompts, (reader,) if reader else ()
    )
    chosen = (train[i] for i in order[: config.num_prompts or None])
    prompts, counts = tables.encode_all(chosen, encode, bad)
    bad.finish("prompt_data")
    if config.labeller == "verifier":
        refuse_other_tasks(prompts)
    return prompts, counts


def main() -> None:
    config = command_line.parse(CollectConfig, __doc__)
    output_of(config).check_file(Path(config.output_file), settings_of(config))
    device = join(config)
    config.date = resuming.date_of(config.date)
    dtype = zero.resolve_dtype(config.dtype, device)
    started = time.time()
    if config.labeller == "file":
        if process_group.is_main():
            import_rankings(config)
        process_group.shut_down()
        return
    tokenizer = chat_template.load_tokenizer(config.policy, config.trust_remote_code, config.date)
    reader = None
    if config.labeller == "reward_model":
        reader = Reader.load(
            config.reward_model, config.trust_remote_code, config.reward_read_at, config.date
        )
    prompts, counts = load_prompts(config, tokenizer, reader)
    encoded = [prompt.ids for prompt in prompts]
    if process_group.is_main():
        print(counts.line("prompts"), flush=True)
    # Before hours of sampling, on the CPU: a folder that holds no reward model is refused now.
    reward_model = reader and scalar_model.load(
        config.pick(Loading), config.reward_model, dtype=dtype, tokenizer=reader.tokenizer
    )
    model = language_model.load(config.pick(Loading), config.policy, dtype=dtype, zero_stage=0)
    answers = sample_answers(config, encoded, tokenizer, model.to(device).eval(), device)
    tokens = math.fsum(len(a.text) for group in answers for a in group)
    sampled = keep_samples(config, prompts, answers) if process_group.is_main() else None
    if reward_model is not None:
        labels = label_with_reward_model(config, reader, reward_model, prompts, answers, device)
    elif config.labeller == "verifier":
        labels = label_with_verifier(config, prompts, answers)
    else:
        labels = [[0.0] * len(group) for group in answers]
    if process_group.is_main():
        write(config, prompts, answers, labels)
        sampled.unlink()
        print(
            f"{len(prompts)} × {config.answers_per_prompt} answers, {tokens:.0f} characters in "
            f"{time.time() - started:.1f} s",
            flush=True,
        )
    process_group.shut_down()


if __name__ == "__main__":
    program.run(main)
