"""The prompts of a side-by-side evaluation: built in, lines of text files, or rows of data."""

from dataclasses import dataclass, field
from pathlib import Path

from utils.data import chat_template, files, prompts, rows, sources
from utils.data.turns import text_of

BUILT_IN = (
    "Explain the moon landing to a 6 year old in a few sentences.",
    "Write a short poem about a wise frog.",
    "Why are there leap years?",
    "List three ways to save water at home.",
    "Write a polite email that moves a meeting from Monday to Thursday.",
    "A train travels 180 km in 2.5 hours. What is its average speed? Show your steps.",
    "请用简单的话解释什么是光合作用。",
    "写一首关于秋天的四行短诗。",
    "如何在一个月内养成早起的习惯?请给出三条建议。",
    "把这句话翻译成英文:学而时习之,不亦说乎?",
)


@dataclass(frozen=True)
class Question:
    context: tuple[dict, ...]  # what was said before, a system turn perhaps
    turns: tuple[str, ...]  # what the user says, each after the answer to the one before
    where: str
    row: dict = field(default_factory=dict)  # of the data, where verifiers find their columns


def load(names: list[str], most: int = 0) -> list[Question]:
    """The prompts of all files, folders and hub names, of none the built-in ones; the first `most`
    of them (0: all). Raises DataError with every problem."""
    if not names:
        built_in = [Question((), (text,), f"built-in {n}") for n, text in enumerate(BUILT_IN, 1)]
        return built_in[: most or None]
    bad, questions, problems = rows.BadRows(), [], []
    for name in names:
        is_text = Path(name).is_file() and not name.lower().endswith(files.FILES)
        try:
            questions += _lines(name, bad) if is_text else _rows(name, bad)
        except rows.DataError as error:
            problems += error.problems
    if problems or len(bad):
        every = list(dict.fromkeys([*problems, *bad.problems]))
        raise rows.DataError(every, title="prompts that cannot be used:")
    return questions[: most or None]


def _rows(name: str, bad: rows.BadRows) -> list[Question]:
    questions = []
    role = "eval" if sources.has_split(name, prompts.SPLITS["eval"]) else "train"
    for prompt in prompts.load_prompts([name], split_role=role, bad=bad):
        try:
            turns = _turns(prompt)
            questions.append(Question(prompt.messages[:-1], turns, prompt.where, prompt.row))
        except rows.BadRow as problem:
            bad.add(prompt.where, str(problem), prompt.row)
    return questions


def _turns(prompt: prompts.Prompt) -> tuple[str, ...]:
    """What the user says: all turns of a row of MT-Bench, else one. Raises BadRow."""
    first, turns = prompt.messages[-1]["content"], prompt.row.get("turns")
    if prompt.messages[-1]["role"] != "user":
        raise rows.BadRow("a tool's result stands last, and only what users say is asked here")
    if not isinstance(turns, list) or turns[:1] != [first]:
        return (first,)
    return tuple(text_of(turn, f"turn {n} of turns") for n, turn in enumerate(turns, 1))


def _lines(path: str, bad: rows.BadRows) -> list[Question]:
    questions, before = [], len(bad)
    content = Path(path).read_bytes().removeprefix(files.UTF8_BOM)
    for number, raw in enumerate(content.split(b"\n"), 1):
        where = f"{path}:{number}"
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            bad.add(where, f"not UTF-8: {error.reason} at byte {error.start + 1} of the line")
            continue
        if problem := rows.text_problem(text):
            bad.add(where, f"the line {problem}")
        elif text:
            questions.append(Question((), (text,), where))
    if not questions and len(bad) == before:
        raise rows.DataError(f"{path}: holds no prompts")
    return questions


def refuse_unrendered(questions: list[Question], tokenizers: dict) -> None:
    """Raise DataError that names each prompt which a checkpoint's template refuses, before any
    checkpoint has answered in vain. tokenizers: checkpoint → its tokenizer."""
    problems = []
    for path, tokenizer in tokenizers.items():
        for question in questions:
            turn = {"role": "user", "content": question.turns[0]}
            try:
                chat_template.encode_prompt(tokenizer, (*question.context, turn))
            except chat_template.TemplateError as error:
                problems.append(f"{question.where}: {path}: {error}")
    if problems:
        raise rows.DataError(problems, title="prompts that cannot be answered:")
