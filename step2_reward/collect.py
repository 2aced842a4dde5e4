"""Comparisons from a policy: K sampled answers a prompt, ranked by a labeller, written to disk.

deepspeed step2_reward/collect.py --policy SFT --prompt_data DATA --labeller verifier \
    --output_file comparisons.jsonl
"""

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

from step2_reward.labellers import LABELLERS, Sampled
from utils import whole_files
from utils.checkpoints import resuming
from utils.data import batches, chat_template, comparisons, rows, splits, tables, toy_tasks
from utils.data import prompts as prompt_data
from utils.data.loading import DataSettings
from utils.distributed import process_group, program, zero
from utils.generation import sampling as generation
from utils.generation.decoder import Decoder
from utils.models import language_model, scalar_model
from utils.models.loading import Loading
from utils.models.scorer import Reader, Scorer
from utils.run import join, output_of
from utils.settings import command_line
from utils.settings.fields import free, setting
from utils.settings.run_config import RunConfig, check_folder, columns_of


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
    answers_per_prompt: int = setting(
        4, "K, answers sampled a prompt (InstructGPT: 4 to 9)", at_least=2, at_most=64
    )
    max_prompt_length: int = setting(512, "tokens (see --long_prompts)", at_least=1)
    max_response_length: int = setting(512, "tokens sampled at most", at_least=1)
    temperature: float = setting(1.0, "sampling temperature", above=0)
    labeller: str = setting(
        "verifier",
        "what ranks: a program, a reward model, a file of human "
        "rankings, or none (write the answers for people to rank)",
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
    rankings: str = setting(
        "", "rows of prompt, responses, and ranks or scores", only_with="labeller=file"
    )
    output_file: str = setting("", "where the comparisons go, JSON Lines", needed=True)

    @classmethod
    def completed(cls, values: dict) -> dict:
        folder = str(Path(values.get("output_file", "")).parent)
        return values | {"output_dir": values.get("output_dir") or folder}

    def contradictions(self, world_size: int) -> Iterator[str]:
        yield from super().contradictions(world_size)
        needed = {"file": ["rankings"], "reward_model": ["policy", "prompt_data", "reward_model"]}
        for name in needed.get(self.labeller, ["policy", "prompt_data"]):
            if not getattr(self, name):
                yield f"labeller={self.labeller} needs --{name}, which is empty"
        if self.output_file and os.path.isdir(self.output_file):
            yield f"output_file={self.output_file!r} is a folder; name a file in it"


def sample_answers(config, encoded, tokenizer, model, device) -> list[list[Sampled]]:
    """K answers to each prompt of `encoded` (id lists), on every rank, in that order."""
    k, length = config.answers_per_prompt, config.max_response_length
    noise = generation.uniform_noise(len(encoded) * k, length, config.seed, 0)
    ranks = process_group.rank(), process_group.world_size()
    lengths = list(map(len, encoded))
    sampled, decoder = {}, Decoder()
    for chosen in batches.deal(range(len(encoded)), lengths, *ranks, config.micro_batch_size):
        if not chosen:
            continue  # the other ranks have a prompt more
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
        answers = list(zip(texts, finished, strict=True))
        sampled |= {i: answers[n * k : (n + 1) * k] for n, i in enumerate(chosen)}
    parts = process_group.gather_objects(sampled)
    everything = {i: answers for part in parts for i, answers in part.items()}
    return [[Sampled(*one) for one in everything[i]] for i in range(len(encoded))]


# Rows of the output.


def rows_of(config, prompts, answers: list[list[Sampled]]) -> list[dict]:
    """Comparisons that nobody has ranked, with their provenance."""
    names = ("policy", "labeller", "seed", "temperature", "agreement")
    provenance = {name: getattr(config, name) for name in names}
    return [
        {
            "prompt": list(prompt.messages),
            "responses": [a.text for a in group],
            "finished": [a.finished for a in group],
            "provenance": provenance | {"prompt": prompt.where},
        }
        for prompt, group in zip(prompts, answers, strict=True)
    ]


def ranked(row: dict, scores: list[float] | None) -> dict | None:
    """A row with its scores, answers that say the same once; None where nothing is to be compared.

    scores: None where people shall rank.
    """
    # A tiny policy samples control bytes now and then, which no data file should hold.
    kept = list(
        {
            text: k
            for k, text in enumerate(row["responses"])
            if text.strip() and not rows.text_problem(text)
        }.values()
    )
    columns = {name: row[name] for name in ("responses", "finished")}
    columns |= {} if scores is None else {"scores": scores}
    columns = {name: [values[k] for k in kept] for name, values in columns.items()}
    if len(kept) < 2 or len(set(columns.get("scores", kept))) < 2:
        return None
    return row | columns


def write_sampled(path: Path, lines: list[dict]) -> None:
    """In ASCII: a policy may sample what UTF-8 cannot hold, such as half a surrogate pair."""
    with whole_files.writing(path, "--output_file") as file:
        file.writelines(json.dumps(row) + "\n" for row in lines)


def write(config, lines: list[dict], labels: list[list[float]] | None) -> None:
    """The comparisons, and beside them the settings that they were made with."""
    path = Path(config.output_file)
    labels = labels or [None] * len(lines)
    kept = [row for pair in zip(lines, labels, strict=True) if (row := ranked(*pair))]
    if not kept:
        raise SystemExit("no comparison left: raise --temperature or --answers_per_prompt")
    settings = settings_of(config)
    with whole_files.writing(path, "--output_file") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        command_line.save(config, settings.parent, process_group.world_size(), name=settings.name)
    process_group.say(
        f"{path}: {len(kept)} comparisons; {len(lines) - len(kept)} prompts left "
        "out, whose answers were all alike or equally good"
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
    prompts = load_prompts(config, tokenizer, reader)
    encoded = [prompt.ids for prompt in prompts]
    if reader is not None:
        # Before hours of sampling: a folder that holds no reward model is refused now.
        model = scalar_model.load(how, reader.name, dtype=dtype, tokenizer=reader.tokenizer)
        reward = Scorer(model, reader, True, device)
    model = language_model.load(how, config.policy, dtype=dtype)
    answers = sample_answers(config, encoded, tokenizer, model.to(device).eval(), device)
    lines = rows_of(config, prompts, answers)
    # As people would be given it: whatever goes wrong now, the hours of sampling are not lost.
    kept = Path(config.output_file).with_suffix(".sampled.jsonl")
    if process_group.is_main():
        write_sampled(kept, lines)
    process_group.say(f"{kept}: what was sampled, until it is ranked")

    labels = LABELLERS[config.labeller](config, prompts, answers, reward)
    if process_group.is_main():
        write(config, lines, labels)
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
