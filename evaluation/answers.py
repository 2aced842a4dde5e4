"""Answers of checkpoints: what one is, the file of them, and the files of other programs."""

import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from evaluation.questions import Question
from utils import whole_files
from utils.data.rows import DataError

FIELDS = ("checkpoint", "turn", "answer", "tokens", "finished")


@dataclass
class Answer:
    checkpoint: str
    turn: int  # from 1
    conversation: tuple[dict, ...]  # all turns, this answer's text last
    tokens: int  # the stop token included
    finished: bool  # ended with the stop token
    score: float | None = None

    @property
    def answer(self) -> str:
        return self.conversation[-1]["content"]


Results = dict[str, list[list[Answer]]]  # checkpoint → the answers to each question, by turn


def write(path: Path, asked: list[Question], results: Results, scored: bool) -> None:
    """JSON Lines, one for each prompt, checkpoint and turn."""
    with whole_files.writing(path) as file:
        for i, question in enumerate(asked):
            for answer in (a for groups in results.values() for a in groups[i]):
                record = {"prompt": question.turns[answer.turn - 1], "where": question.where}
                record |= {name: getattr(answer, name) for name in FIELDS}
                record |= {"score": answer.score} if scored else {}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_to_rank(path: Path, results: Results) -> None:
    """What evaluation/annotate.py shows to people: rows of prompt and responses, the different
    answers to one conversation, but for empty ones, which step 2's reader of rankings refuses. Who
    gave them is not said."""
    talks: dict[str, list[str]] = {}
    for groups in results.values():
        for answer in (a for group in groups for a in group):
            said = talks.setdefault(json.dumps(answer.conversation[:-1]), [])
            text = answer.answer.strip()  # as evaluation/win_rate.py finds it again
            if text and text not in said:
                said.append(text)
    with whole_files.writing(path) as file:
        for talk, said in talks.items():
            if len(said) > 1:
                row = {"prompt": json.loads(talk), "responses": said}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


# What each record of the file holds that is read again.
KINDS = {"checkpoint": str, "where": str, "turn": int, "prompt": str}
KINDS |= {"answer": str, "tokens": int, "finished": bool}


def records_of(path: str) -> dict[tuple, dict]:
    """(checkpoint, where, turn, prompt) → what the file says of it. DataError with every line that
    `write` cannot have written."""
    found, problems = {}, []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: not JSON: {error}")
            continue
        if not isinstance(record, dict):
            problems.append(f"{path}:{number}: not a JSON object")
            continue
        wrong = [
            f"{name} is {record.get(name)!r:.40}, not {kind.__name__}" if name in record else name
            for name, kind in KINDS.items()
            if type(record.get(name)) is not kind
        ]
        if wrong:
            problems.append(f"{path}:{number}: without {', '.join(wrong)}")
        else:
            found[tuple(record[name] for name in list(KINDS)[:4])] = record
    if problems:
        raise DataError(problems, title="no answers.jsonl of prompt_eval.py:")
    return found


def read(path: str, asked: list[Question], checkpoints: list[str]) -> Results:
    """What `write` has written, the answers of these checkpoints to these questions. Raises
    DataError with those that are not there."""
    found = records_of(path)
    results: Results = {}
    missing = []
    for checkpoint in checkpoints:
        groups = results[checkpoint] = []
        for question in asked:
            talk, group = question.context, []
            for turn, text in enumerate(question.turns, 1):
                record = found.get((checkpoint, question.where, turn, text))
                if record is None:
                    missing.append(f"{checkpoint}, turn {turn} of {question.where}")
                    continue
                answer = {"role": "assistant", "content": record["answer"]}
                talk = (*talk, {"role": "user", "content": text}, answer)
                group.append(Answer(checkpoint, turn, talk, record["tokens"], record["finished"]))
            groups.append(group)
    if missing:
        raise DataError(missing, title=f"{path} holds no answer of")
    return results


def model_name(checkpoint: str) -> str:
    """A checkpoint's name where it may hold no slash."""
    return re.sub(r"[^\w.-]+", "__", checkpoint.strip("/.")) or "model"


def not_for_alpaca_eval(question: Question) -> str:
    """Why AlpacaEval cannot read answers to a question; empty where it can."""
    return "it asks single questions" if question.context or len(question.turns) > 1 else ""


def for_alpaca_eval(folder: Path, asked: list[Question], results: Results) -> None:
    """MODEL.json for `alpaca_eval --model_outputs`: a list of instruction, output and generator."""
    for checkpoint, groups in results.items():
        rows = [
            {"instruction": q.turns[0], "output": a.answer, "generator": model_name(checkpoint)}
            | {"dataset": str(q.row.get("dataset", ""))}
            for q, (a,) in zip(asked, groups, strict=True)
        ]
        text = json.dumps(rows, ensure_ascii=False, indent=2)
        whole_files.write_text(folder / f"{model_name(checkpoint)}.json", text + "\n")


def not_for_mt_bench(question: Question) -> str:
    return "" if isinstance(question.row.get("question_id"), int) else "it has no question_id"


def for_mt_bench(folder: Path, asked: list[Question], results: Results) -> None:
    """MODEL.jsonl as FastChat's gen_model_answer.py leaves in model_answer/: question_id, model_id
    and the turns of one choice."""
    for checkpoint, groups in results.items():
        with whole_files.writing(folder / f"{model_name(checkpoint)}.jsonl") as file:
            for question, group in zip(asked, groups, strict=True):
                turns = [a.answer for a in group]
                record = {"question_id": question.row["question_id"]}
                record["answer_id"] = hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:22]
                record["model_id"] = model_name(checkpoint)
                record |= {"choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


# The flags that write other programs' files: what they cannot read, and what writes them.
FORMATS = {
    "alpaca_eval_output": (not_for_alpaca_eval, for_alpaca_eval),
    "mt_bench_output": (not_for_mt_bench, for_mt_bench),
}


def refuse_unreadable(asked: list[Question], wanted: list[str]) -> None:
    """Before a checkpoint has answered in vain: raises DataError for questions that the program
    of a flag in `wanted` cannot read."""
    problems = [
        f"{question.where}: {why}, which --{flag} needs; name other --prompts"
        for flag in wanted
        for question in asked
        if (why := FORMATS[flag][0](question))
    ]
    if problems:
        raise DataError(problems, title="prompts that cannot be written:")
