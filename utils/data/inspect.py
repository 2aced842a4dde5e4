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
from collections.abc import Callable, Sequence

from utils.data import chat_template, instructions, preferences, rows, schemas, splits
from utils.data.bad_rows import SHOWN_PROBLEMS
from utils.settings.run_config import columns_of
from utils.terminal import coloured, visible

USES = {
    "demonstration": (instructions.load_conversations, instructions.SFT_SPLITS, "--sft_data"),
    "comparison": (
        preferences.load_comparisons,
        preferences.PREFERENCE_SPLITS,
        "--preference_data",
    ),
    "prompt": (instructions.load_prompts, instructions.PROMPT_SPLITS, "--prompt_data"),
}
LIMITS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
LETTERS_READ = 500  # of a row, to tell its script


def look(name: str, use: str, schema: str, columns: dict) -> tuple[list, str]:
    """(what the loader of a use makes of a data set, lines that say so). Raises DataError."""
    load, split_names, flag = USES[use]
    bad = rows.BadRows(1.0)
    reading = schemas.reading_of(use, schema, columns)
    found = rows.read_rows(name, split_names["train"], rows.BadRows(1.0))
    schema_found, _ = schemas.opened(found, reading, rows.BadRows(1.0))
    recognised = f"{flag}: schema {schema_found}"
    if found:
        recognised += f", by the columns {', '.join(map(repr, found[0].data))}"
    items = load([name], schema=schema, columns=columns, bad=bad)
    lines = [recognised, f"  {bad.seen} rows → {len(items)} {use}s; {len(bad)} bad"]
    lines += [f"    {visible(problem)}" for problem in bad.problems[:SHOWN_PROBLEMS]]
    if len(bad) > SHOWN_PROBLEMS:
        lines.append(f"    … and {len(bad) - SHOWN_PROBLEMS} more")
    return items, "\n".join(lines)


def answers_of(item) -> tuple[str, ...]:
    """The answers that an item holds: a comparison's, a demonstration's last, none of a prompt."""
    if isinstance(item, preferences.Comparison):
        return item.responses
    is_demonstration = isinstance(item, instructions.Conversation)
    return (item.messages[-1]["content"],) if is_demonstration else ()


def turns_of(item) -> list[dict]:
    """All turns, of a comparison those with its best answer."""
    if not isinstance(item, preferences.Comparison):
        return list(item.messages)
    best = item.responses[item.scores.index(max(item.scores))]
    return [*item.prompt, {"role": "assistant", "content": best}]


def measure(items: Sequence, tokenizer) -> tuple[dict[str, list[int]], list[str]]:
    """(lengths of prompts, answers and both, in tokens or characters; what could not be rendered).

    Of a comparison all answers count, and with its prompt the longest one.
    """
    lengths: dict[str, list[int]] = {"prompt": [], "answer": [], "together": []}
    refused = []
    for item in items:
        answers = answers_of(item)
        prompt = list(getattr(item, "prompt", None) or item.messages)
        prompt = prompt[:-1] if isinstance(item, instructions.Conversation) else prompt
        try:
            before = _length(tokenizer, prompt, None)
            after = [_length(tokenizer, prompt, answer) for answer in answers]
        except chat_template.TemplateError as error:
            refused.append(f"{item.where}: {error}")
            continue
        lengths["prompt"].append(before)
        lengths["answer"] += [whole - before for whole in after]
        lengths["together"] += [max(after)] if after else []
    return lengths, refused


def _length(tokenizer, prompt: list[dict], answer: str | None) -> int:
    if tokenizer is None:
        return sum(len(turn["content"]) for turn in prompt) + len(answer or "")
    if answer is None:
        return len(chat_template.encode_prompt(tokenizer, prompt))
    turns = [*prompt, {"role": "assistant", "content": answer}]
    return len(chat_template.encode_conversation(tokenizer, turns).ids)


def percentiles(lengths: dict[str, list[int]], unit: str) -> list[str]:
    """A table of lengths: nearest-rank percentiles."""
    lines = [f"  {'lengths, ' + unit:<22}" + "".join(f"{p:>9}" for p in ("50 %", "90 %", "99 %"))]
    lines[0] += f"{'longest':>9}"
    for name, values in lengths.items():
        if ordered := sorted(values):
            ranks = [ordered[-(-len(ordered) * p // 100) - 1] for p in (50, 90, 99, 100)]
            lines.append(f"    {name:<20}" + "".join(f"{value:>9}" for value in ranks))
    return lines


def cut_by(lengths: dict[str, list[int]]) -> list[str]:
    """Which share each limit would cut, up to the first limit that cuts nothing."""
    flags = {
        "prompt": "--max_prompt_length",
        "answer": "--max_response_length",
        "together": "--max_length",
    }
    flags = {name: flag for name, flag in flags.items() if lengths[name]}
    lines = [f"  {'longer than':<22}" + "".join(f"{flag:>23}" for flag in flags.values())]
    for limit in LIMITS:
        shares = [sum(n > limit for n in lengths[name]) / len(lengths[name]) for name in flags]
        lines.append(f"    {limit:<20}" + "".join(f"{share:>23.1%}" for share in shares))
        if not any(shares):
            break
    return lines


def duplicates(items: Sequence) -> str:
    prompts = Counter(splits.prompt_of(item) for item in items)
    whole = Counter((splits.prompt_of(item), answers_of(item)) for item in items)
    again, same = len(items) - len(prompts), len(items) - len(whole)
    return f"  duplicates: {again} with the prompt of an earlier one, {same} equal to one"


@functools.lru_cache(maxsize=65536)
def _script(character: str) -> str:
    word = unicodedata.name(character, "UNKNOWN").split()[0].split("-")[0]
    return {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}.get(word, word.capitalize())


def script_of(text: str) -> str:
    """The script that most letters of a text are of. Han with Kana among it is Japanese."""
    letters = [c for c in text[: 4 * LETTERS_READ] if c.isalpha()][:LETTERS_READ]
    counts = Counter(map(_script, letters))
    if not counts:
        return "no letters"
    if counts["Kana"] and counts["Kana"] + counts["Han"] > len(letters) / 2:
        return "Japanese"
    return counts.most_common(1)[0][0]


def languages(items: Sequence) -> str:
    """Guessed by script alone, which tells Chinese from English and not English from German."""
    asked = Counter(script_of(splits.prompt_of(item).rpartition("\x1f")[2]) for item in items)
    shares = (f"{script} {count / len(items):.1%}" for script, count in asked.most_common())
    return f"  languages, by the script of the last question: {', '.join(shares)}"


def shown(item, tokenizer) -> str:
    """A row, what is learnt of it in green."""
    turns = turns_of(item)
    if tokenizer is None:
        lines = []
        for turn in turns:
            text = coloured(visible(turn["content"]), turn["role"] == "assistant")
            lines.append(f"{turn['role']}: {text}")
        return "\n".join(lines)
    if turns[-1]["role"] == "assistant":
        return chat_template.show(tokenizer, chat_template.encode_conversation(tokenizer, turns))
    ids = chat_template.encode_prompt(tokenizer, turns)
    return chat_template.show(tokenizer, chat_template.Encoded(ids, [False] * len(ids)))


def report(items: Sequence, tokenizer, say: Callable[[str], None]) -> None:
    """Says what is known of the items of one use."""
    lengths, refused = measure(items, tokenizer)
    lines = percentiles(lengths, "tokens" if tokenizer else "characters")
    if tokenizer and lengths["prompt"]:
        lines += cut_by(lengths)
    lines += [duplicates(items), languages(items)]
    if isinstance(items[0], preferences.Comparison):
        answers = Counter(len(item.responses) for item in items)
        sizes = ", ".join(f"{count} of {k}" for k, count in sorted(answers.items()))
        ties = sum(len(set(item.scores)) == 1 for item in items)
        lines.append(f"  answers a comparison: {sizes}; {ties} are all ties and teach nothing")
    if refused:
        lines.append(f"  the chat template refuses {len(refused)}; the first: {refused[0]}")
    say("\n".join(lines))


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
        print(name)
        unread, row = [], None
        for use in USES:
            try:
                items, lines = look(name, use, a.data_schema, columns)
            except rows.DataError as error:
                unread.append(f"{USES[use][2]}: {error}")
                continue
            print(lines)
            if items and not (use == "prompt" and row):  # its prompts were described
                report(items, tokenizer, print)
                row = row or items
        print("\n".join(f"not for {reason}" for reason in unread), end="\n" if unread else "")
        if len(unread) == len(USES):
            raise SystemExit(f"{name}: no step can read it")
        if row and not 0 <= a.row < len(row):
            raise SystemExit(f"--row {a.row}: there are rows 0 to {len(row) - 1}")
        if row:
            print(f"row {a.row}: {row[a.row].where}\n{shown(row[a.row], tokenizer)}\n")


if __name__ == "__main__":
    main()
