"""What the steps would make of a data set: its schema, counts, lengths, duplicates, languages.

    python -m utils.data.inspect NAME [NAME …] [--tokenizer FOLDER] [--row N]

NAME is what --sft_data, --preference_data and --prompt_data take: a file, a folder, a hub id.
With a tokenizer lengths are tokens, and a row is shown with its supervised tokens in green.
"""

from __future__ import annotations

import argparse
import functools
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from utils.data import chat_template
from utils.data.comparisons import COMPARISONS, Comparison
from utils.data.demonstrations import DEMONSTRATIONS, Conversation
from utils.data.loading import Source, load_items, reading_of
from utils.data.prompts import PROMPTS
from utils.data.rows import SHOWN_PROBLEMS, BadRows, DataError
from utils.data.sources import stream_rows
from utils.data.tables import prompt_of
from utils.settings.run_config import columns_of
from utils.terminal import coloured, visible

KINDS = {
    "--sft_data": DEMONSTRATIONS,
    "--preference_data": COMPARISONS,
    "--prompt_data": PROMPTS,
}
LIMITS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
LETTERS_READ = 500  # of a row, to guess its script


def look(name: str, flag: str, schema: str, columns: dict) -> tuple[list, list[str]]:
    """(the items that a flag's step makes of a data set, lines about them). Raises DataError."""
    kind, bad = KINDS[flag], BadRows(1.0)
    source = Source(name, "train", kind, reading_of(kind.use, schema, columns))
    used, _ = source.open(BadRows(1.0))
    recognised = f"{flag}: schema {used}"
    if first := next(stream_rows(name, source.splits, BadRows(1.0)), None):
        recognised += f", by the columns {', '.join(map(repr, first.data))}"
    items = load_items(kind, [name], schema=schema, columns=columns, bad=bad)
    lines = [recognised, f"  {bad.seen} rows → {len(items)} {kind.use}s; {len(bad)} bad"]
    lines += [f"    {visible(problem)}" for problem in bad.problems[:SHOWN_PROBLEMS]]
    if len(bad) > SHOWN_PROBLEMS:
        lines.append(f"    … and {len(bad) - SHOWN_PROBLEMS} more")
    return items, lines


def answers_of(item) -> tuple[str, ...]:
    """The answers that an item holds: a comparison's, a demonstration's last, none of a prompt."""
    if isinstance(item, Comparison):
        return item.responses
    return (item.messages[-1]["content"],) if isinstance(item, Conversation) else ()


def turns_of(item) -> list[dict]:
    """All turns, of a comparison those with its best answer."""
    if not isinstance(item, Comparison):
        return list(item.messages)
    best = item.responses[item.scores.index(max(item.scores))]
    return [*item.prompt, {"role": "assistant", "content": best}]


def measure(items: Sequence, tokenizer) -> tuple[dict[str, list[int]], list[str]]:
    """(lengths of prompts, answers and both, in tokens or characters; what could not be rendered).

    Of a comparison all answers count, and together with its prompt the longest one.
    """
    lengths: dict[str, list[int]] = {"prompt": [], "answer": [], "together": []}
    refused = []
    for item in items:
        try:
            before = _length(tokenizer, item.prompt, None)
            after = [_length(tokenizer, item.prompt, answer) for answer in answers_of(item)]
        except chat_template.TemplateError as error:
            refused.append(f"{item.where}: {error}")
            continue
        lengths["prompt"].append(before)
        lengths["answer"] += [whole - before for whole in after]
        lengths["together"] += [max(after)] if after else []
    return lengths, refused


def _length(tokenizer, prompt: Sequence[dict], answer: str | None) -> int:
    if tokenizer is None:
        return sum(len(turn["content"]) for turn in prompt) + len(answer or "")
    if answer is None:
        return len(chat_template.encode_prompt(tokenizer, prompt))
    turns = [*prompt, {"role": "assistant", "content": answer}]
    return len(chat_template.encode_conversation(tokenizer, turns).ids)


def percentiles(lengths: dict[str, list[int]], unit: str) -> list[str]:
    """A table of lengths: nearest-rank percentiles."""
    heads = "".join(f"{head:>9}" for head in ("50 %", "90 %", "99 %", "longest"))
    lines = [f"  {'lengths, ' + unit:<22}{heads}"]
    for name, values in lengths.items():
        if values:
            ranks = np.percentile(values, (50, 90, 99, 100), method="inverted_cdf")
            lines.append(f"    {name:<20}" + "".join(f"{int(value):>9}" for value in ranks))
    return lines


def cut_by(lengths: dict[str, list[int]]) -> list[str]:
    """Which share each limit would cut, up to the first limit that cuts nothing."""
    flags = ("--max_prompt_length", "--max_response_length", "--max_length")
    columns = [(f, v) for f, v in zip(flags, lengths.values(), strict=True) if v]
    lines = [f"  {'longer than':<22}" + "".join(f"{flag:>23}" for flag, _ in columns)]
    for limit in LIMITS:
        shares = [sum(n > limit for n in values) / len(values) for _, values in columns]
        lines.append(f"    {limit:<20}" + "".join(f"{share:>23.1%}" for share in shares))
        if not any(shares):
            break
    return lines


def duplicates(items: Sequence) -> str:
    prompts = {prompt_of(item) for item in items}
    whole = {(prompt_of(item), answers_of(item)) for item in items}
    again, same = len(items) - len(prompts), len(items) - len(whole)
    return f"  duplicates: {again} with the prompt of an earlier one, {same} equal to one"


@functools.lru_cache(maxsize=65536)
def _script(character: str) -> str:
    word = unicodedata.name(character, "UNKNOWN").split()[0].split("-")[0]
    return {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}.get(word, word.capitalize())


def script_of(text: str) -> str:
    """The script that most letters of a text are of. Han with some Kana is Japanese."""
    letters = [c for c in text[: 4 * LETTERS_READ] if c.isalpha()][:LETTERS_READ]
    counts = Counter(map(_script, letters))
    if not counts:
        return "no letters"
    if counts["Kana"] and counts["Kana"] + counts["Han"] > len(letters) / 2:
        return "Japanese"
    return counts.most_common(1)[0][0]


def languages(items: Sequence) -> str:
    """By script alone, which separates Chinese from English, but not German from English."""
    scripts = Counter(script_of(item.prompt[-1]["content"]) for item in items)
    shares = (f"{script} {count / len(items):.1%}" for script, count in scripts.most_common())
    return f"  languages, by the script of the last question: {', '.join(shares)}"


def shown(item, tokenizer) -> str:
    """A row with what is learnt of it in green."""
    turns = turns_of(item)
    if tokenizer is None:
        texts = [coloured(visible(t["content"]), t["role"] == "assistant") for t in turns]
        return "\n".join(f"{t['role']}: {text}" for t, text in zip(turns, texts, strict=True))
    if turns[-1]["role"] == "assistant":
        return chat_template.show(tokenizer, chat_template.encode_conversation(tokenizer, turns))
    ids = chat_template.encode_prompt(tokenizer, turns)
    return chat_template.show(tokenizer, chat_template.Encoded(ids, [False] * len(ids)))


def describe(items: Sequence, tokenizer) -> list[str]:
    """Lengths, duplicates and languages of the items of one kind."""
    lengths, refused = measure(items, tokenizer)
    lines = percentiles(lengths, "tokens" if tokenizer else "characters")
    if tokenizer and lengths["prompt"]:
        lines += cut_by(lengths)
    lines += [duplicates(items), languages(items)]
    if isinstance(items[0], Comparison):
        answers = Counter(len(item.responses) for item in items)
        sizes = ", ".join(f"{count} of {k}" for k, count in sorted(answers.items()))
        ties = sum(len(set(item.scores)) == 1 for item in items)
        lines.append(f"  answers a comparison: {sizes}; {ties} are all ties and teach nothing")
    if refused:
        lines.append(f"  the chat template refuses {len(refused)}; the first: {refused[0]}")
    return lines


def inspect(name: str, schema: str, columns: dict, tokenizer, row: int) -> None:
    """Prints what each step would make of a data set. Raises SystemExit where none can read it."""
    print(name)
    unread, shown_items = [], None
    for flag, kind in KINDS.items():
        try:
            items, lines = look(name, flag, schema, columns)
        except DataError as error:
            unread.append(f"not for {flag}: {error}")
            continue
        if items and not (kind is PROMPTS and shown_items):  # whose prompts were described
            lines += describe(items, tokenizer)
            shown_items = shown_items or items
        print("\n".join(lines))
    if unread:
        print("\n".join(unread))
    if len(unread) == len(KINDS):
        raise SystemExit(f"{name}: no step can read it")
    if shown_items:
        if not 0 <= row < len(shown_items):
            raise SystemExit(f"--row {row}: there are rows 0 to {len(shown_items) - 1}")
        item = shown_items[row]
        print(f"row {row}: {item.where}\n{shown(item, tokenizer)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="file, folder or hub id")
    parser.add_argument("--tokenizer", help="folder or hub name of a model or its tokenizer")
    parser.add_argument("--row", type=int, default=0, help="which row to show, from 0")
    parser.add_argument("--data_schema", default="auto", help="as in the steps")
    parser.add_argument("--columns", nargs="*", default=[], help="as in the steps")
    a = parser.parse_args()
    try:
        columns = columns_of(a.columns)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    tokenizer = chat_template.load_tokenizer(a.tokenizer) if a.tokenizer else None
    for name in a.names:
        inspect(name, a.data_schema, columns, tokenizer, a.row)


if __name__ == "__main__":
    main()
