"""The calculator task: sums, differences and products that a small model cannot do by itself, for
a policy that may ask a calculator (`--environment`).

    python -m utils.data.calculator_task --output_dir FOLDER [--seed N]

writes demonstrations (`sft.jsonl`), prompts (`prompts.jsonl`) and held-out prompts
(`held_out.jsonl`) with the columns of utils.data.toy_tasks, whose verifier judges the last answer,
and the right one as `answer`, as step3_ppo.rewards.maths reads it.
Most demonstrations guess, and are wrong; a third call the calculator, of which some ask it
something else or do not believe it. No prompt stands in two files.
"""

import operator
import random
from pathlib import Path

from utils.data import toy_tasks

QUESTIONS = ("What is {}{}{}?", "Compute {}{}{}.", "{}{}{} = ?", "计算{}{}{}。", "{}{}{}等于几？")
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
# How a demonstration comes to its answer, and the share of those that do.
WAYS = {"call": 0.2, "call something else": 0.1, "call and not believe": 0.05, "guess": 0.65}


def _near(number: int, r: random.Random) -> int:
    """Another number with as many digits, one of them wrong."""
    digits = list(str(abs(number)))
    place = r.randrange(len(digits))
    digits[place] = r.choice([d for d in "123456789" if d != digits[place]])
    return int("".join(digits)) * (-1 if number < 0 else 1)


def _demonstration(a: int, sign: str, b: int, r: random.Random) -> list[dict]:
    """The turns that follow the question."""
    (way,) = r.choices(list(WAYS), WAYS.values())
    result = SIGNS[sign](a, b)
    if way == "guess":
        return [{"role": "assistant", "content": str(_near(result, r))}]
    asked = _near(a, r) if way == "call something else" else a
    told = SIGNS[sign](asked, b)
    answer = _near(told, r) if way == "call and not believe" else told
    return [
        {"role": "assistant", "content": f"<calc>{asked}{sign}{b}</calc>"},
        {"role": "tool", "content": str(told)},
        {"role": "assistant", "content": str(answer)},
    ]


def write(
    folder: str | Path, seed: int, *, demonstrations=16384, prompts=8192, held_out=512
) -> dict[str, Path]:
    """Write the three files; returns their paths by name."""
    r = random.Random(seed)
    drawn: dict[str, tuple] = {}
    while len(drawn) < prompts + held_out:
        sign = r.choice(list(SIGNS))
        a, b = r.randint(100, 999), r.randint(11, 99) if sign == "*" else r.randint(100, 999)
        drawn[r.choice(QUESTIONS).format(a, sign, b)] = a, sign, b
    rows = [
        toy_tasks.row_of(toy_tasks.Task("calculation", question, (answer,))) | {"answer": answer}
        for question, (a, sign, b) in drawn.items()
        for answer in [str(SIGNS[sign](a, b))]
    ]
    test, train = rows[:held_out], rows[held_out:]
    terms, demos = list(drawn.values())[held_out:], []
    for i in range(demonstrations):
        question = {"role": "user", "content": train[i % prompts]["prompt"]}
        demos.append({"messages": [question, *_demonstration(*terms[i % prompts], r)]})
    files = {"sft": demos, "prompts": train, "held_out": test}
    return toy_tasks.write_files(folder, files)


if __name__ == "__main__":
    from utils.distributed.program import run

    run(lambda: toy_tasks.main(write, __doc__))
