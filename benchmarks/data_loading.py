"""How fast, and in how much memory, step 1 reads, tokenises and finds again a large data set.

    python benchmarks/data_loading.py                    # a million rows of 500 tokens: 10 minutes
    python benchmarks/data_loading.py --rows 50000       # a minute

Writes a JSON Lines file of prompts and answers, words drawn as in a language (few often, many
seldom), and trains a tokenizer on a part of it. Then, each in a process of its own: the tokenizer
alone on the same texts, one process a core (the floor of any first start); step 1's data
where nothing is kept yet; the same again. Rows a second of wall clock, and with the cores to itself
(of the seconds it had of them: for a machine with other work). Most memory of the process, mapped
pages included, when the data is there and when a hundred batches were taken; and what of it is its
own at the end: the mapped file is shared by all ranks, and gives way to whoever needs memory.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

VOCABULARY = 32_000


def write_rows(path: Path, rows: int, tokens: int) -> None:
    """Rows of about `tokens` tokens, a quarter of them the prompt's."""
    draw = random.Random(1)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(60_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    pool = draw.choices(words, weights, k=5_000_000)
    length = int(tokens / 1.35)  # words; the tokenizer makes some of them two tokens
    with open(path, "w") as file:
        for number in range(rows):
            start = draw.randrange(len(pool) - length)
            text = pool[start : start + length]
            row = {
                "prompt": f"{number} {' '.join(text[: length // 4])}",
                "response": " ".join(text[length // 4 :]),
            }
            file.write(json.dumps(row) + "\n")


def make_tokenizer(folder: Path, path: Path) -> None:
    """A byte-level BPE as GPT-2, Llama-3 and Qwen have one, trained on the first rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from utils.data import chat_template

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    with open(path) as file:
        texts = [json.loads(line)["response"] for line, _ in zip(file, range(5000), strict=False)]
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    chat_template.set_up(wrapped)
    wrapped.save_pretrained(folder)


def alone(folder: Path, path: Path) -> dict:
    """The tokenizer's own speed: two texts a row, in batches, from one process a core."""
    from utils.data import chat_template

    tokenizer = chat_template.load_tokenizer(str(folder))
    cores = sorted(os.sched_getaffinity(0))
    most = 20_000  # rows of each process
    with open(path) as file:
        lines = [json.loads(line) for line, _ in zip(file, range(most), strict=False)]
    begun = time.monotonic()
    children = []
    for _ in cores:
        child = os.fork()
        if not child:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            for at in range(0, len(lines), 500):
                texts = [
                    t for row in lines[at : at + 500] for t in (row["prompt"], row["response"])
                ]
                tokenizer(texts, add_special_tokens=False)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return speeds(len(lines) * len(cores), begun, resource.RUSAGE_CHILDREN)


def speeds(rows: int, begun: float, *processes: int) -> dict:
    """Of wall clock since `begun`, and of the seconds that these processes had of a core."""
    used = [resource.getrusage(which) for which in processes]
    busy = sum(each.ru_utime + each.ru_stime for each in used)
    seconds, cores = time.monotonic() - begun, len(os.sched_getaffinity(0))
    return {
        "seconds": seconds,
        "core_seconds": busy,
        "rows_per_second": rows / seconds,
        "rows_per_second_undisturbed": rows * cores / busy,
    }


def loading(folder: Path, path: Path, cache: Path, tokens: int) -> dict:
    """Step 1's data, as step 1 loads it, and a hundred batches of it."""
    begun = time.monotonic()
    from step1_sft.config import SFTConfig
    from utils.data import batches, chat_template, demonstrations
    from utils.data import cache as cache_files
    from utils.data.loading import DataSettings

    reading, once = [], cache_files.once

    def watched(*given) -> None:
        once(*given)
        reading.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    cache_files.once = watched

    config = SFTConfig(
        sft_data=[str(path)],
        output_dir=str(folder),
        data_cache=str(cache),
        max_length=2 * tokens,
        eval_fraction=0.01,
    )
    tokenizer = chat_template.load_tokenizer(str(folder))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    settings = config.pick(DataSettings)
    examples, held = demonstrations.load(
        config.sft_data, tokenizer, settings, config.max_length, config.long_answers, print
    )
    rows = len(examples) + len(held)
    facts = speeds(rows, begun, resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    facts["most_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for step in range(100):
        chosen = batches.rows_of_step(step, 64, len(examples), 0)
        batches.supervised_batch([examples[i] for i in chosen], 0)
    with open("/proc/self/smaps_rollup") as file:
        own = next(int(line.split()[1]) for line in file if line.startswith("Anonymous:"))
    return facts | {
        "most_MB_while_reading": reading[0] if reading else facts["most_MB"],
        "rows": rows,
        "tokens_per_row": sum(len(examples[i].ids) for i in range(200)) / 200,
        "most_MB_of_imports": before,
        "most_MB_after_100_batches": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "own_MB": own / 1024,
    }


def measured(what: str, arguments) -> dict:
    command = [sys.executable, __file__, "--only", what, "--rows", str(arguments.rows)]
    command += ["--tokens", str(arguments.tokens), "--folder", str(arguments.folder)]
    begun = time.monotonic()
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    facts = json.loads(found.splitlines()[-1]) | {"process_seconds": time.monotonic() - begun}
    print(what, json.dumps({name: round(value, 1) for name, value in facts.items()}), flush=True)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--folder", type=Path, default=Path("output/data_loading"))
    parser.add_argument("--only", choices=("alone", "first", "second"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder, cache = arguments.folder, arguments.folder / "cache"
    path = folder / f"{arguments.rows}x{arguments.tokens}.jsonl"
    if arguments.only == "alone":
        print(json.dumps(alone(folder, path)))
        return
    if arguments.only:
        print(json.dumps(loading(folder, path, cache, arguments.tokens)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(path, arguments.rows, arguments.tokens)
    make_tokenizer(folder, path)
    shutil.rmtree(cache, ignore_errors=True)
    print(f"{path}: {path.stat().st_size / 1e9:.2f} GB, {len(os.sched_getaffinity(0))} cores")
    floor, first = measured("alone", arguments), measured("first", arguments)
    measured("second", arguments)
    ratio = first["rows_per_second_undisturbed"] / floor["rows_per_second_undisturbed"]
    print(f"first start: {ratio:.2f} of the tokenizer's own speed")
    shutil.rmtree(cache, ignore_errors=True)  # few rows are not cached
    path.unlink()


if __name__ == "__main__":
    main()
