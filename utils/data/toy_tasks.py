"""The embedded task: small instructions in English and Chinese whose answers a program verifies.

    python -m utils.data.toy_tasks --output_dir FOLDER [--seed N]

writes demonstrations (`sft.jsonl`, about half of them bad on purpose: cut short, off topic, wrong
or rude, so that feedback has something to teach), prompts for collecting comparisons and for PPO
(`prompts.jsonl`) and held-out prompts (`held_out.jsonl`). No prompt stands in two files.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils import whole_files

WORDS = (
    "cat dog sun moon tree fish bird milk rain snow book door lamp ship star leaf frog bear".split()
)
NAMES = "Tom Ann Bob Eva Sam Lily Max Zoe Ben Ida".split()
NAMES_ZH = "小明 小红 小刚 小丽 老王 老李".split()
WORDS_ZH = "好 水 山 花 月 星 鱼 鸟 书 门".split()
LEXICON = {
    "fruits": "apple pear plum grape lemon peach mango cherry".split(),
    "animals": "cat dog horse cow sheep lion tiger rabbit".split(),
    "colours": "red blue green yellow black white brown pink".split(),
    "水果": "苹果 梨 桃子 葡萄 西瓜 香蕉".split(),
    "动物": "猫 狗 马 牛 羊 老虎".split(),
    "颜色": "红色 蓝色 绿色 黄色 黑色 白色".split(),
}
KINDS = {"animal": LEXICON["animals"], "fruit": LEXICON["fruits"], "colour": LEXICON["colours"]}
KINDS_ZH = {"动物": LEXICON["动物"], "水果": LEXICON["水果"], "颜色": LEXICON["颜色"]}
RUDE = ("you fool", "idiot", "笨蛋", "蠢货")
OFF_TOPIC = ("I like tea.", "The sky is blue.", "我喜欢喝茶。", "今天天气很好。")


@dataclass(frozen=True)
class Task:
    """One instruction. `answers`: every right answer, or, where `members` names a word list,
    any `count` different words of it."""

    family: str
    prompt: str
    answers: tuple[str, ...] = ()
    members: str = ""
    count: int = 0


def _sums(r: random.Random) -> Task:
    a, b = r.randint(0, 9), r.randint(0, 9)
    text = r.choice(
        (
            f"What is {a} + {b}?",
            f"Add {a} and {b}.",
            f"{a} + {b} = ?",
            f"{a}加{b}等于几？",
            f"计算{a}+{b}。",
        )
    )
    return Task("sum", text, (str(a + b),))


def _spelling(r: random.Random) -> Task:
    word = r.choice(WORDS)
    text = r.choice((f"Spell the word {word}.", f"How do you spell {word}?", f"请拼写{word}。"))
    return Task("spelling", text, (" ".join(word),))


def _sorting(r: random.Random) -> Task:
    numbers = r.sample(range(10), 3)
    shown = " ".join(map(str, numbers))
    text = r.choice(
        (f"Sort these numbers: {shown}", f"Put in order: {shown}", f"从小到大排列：{shown}")
    )
    return Task("sorting", text, (" ".join(map(str, sorted(numbers))),))


def _lists(r: random.Random) -> Task:
    name = r.choice(list(LEXICON))
    count = r.choice((2, 3, 4))
    if name.isascii():
        number = {2: "two", 3: "three", 4: "four"}[count]
        text = r.choice(
            (
                f"Name {number} {name}.",
                f"List {number} {name}.",
                f"Give me {number} {name}, please.",
            )
        )
    else:
        number = {2: "两", 3: "三", 4: "四"}[count]
        text = r.choice((f"说出{number}种{name}。", f"请列出{number}种{name}。"))
    return Task("list", text, members=name, count=count)


def _comparison(r: random.Random) -> Task:
    a, b = r.sample(range(21), 2)
    text, pick = r.choice(
        (
            (f"Which is larger, {a} or {b}?", max),
            (f"哪个更大：{a}还是{b}？", max),
            (f"Which is smaller, {a} or {b}?", min),
        )
    )
    return Task("comparison", text, (str(pick(a, b)),))


def _greeting(r: random.Random) -> Task:
    name = r.choice(NAMES + NAMES_ZH)
    if name.isascii():
        hello = r.choice(("hello", "goodbye", "thank you"))
        text = r.choice((f"Say {hello} to {name}.", f"Please say {hello} to {name}."))
        return Task("greeting", text, (f"{hello.capitalize()}, {name}!",))
    hello = r.choice(("你好", "再见", "谢谢"))
    return Task(
        "greeting",
        r.choice((f"对{name}说{hello}。", f"请对{name}说{hello}。")),
        (f"{hello}，{name}！",),
    )


def _classification(r: random.Random) -> Task:
    kinds = r.choice((KINDS, KINDS_ZH))
    right, other = r.sample(list(kinds), 2)
    first, second = r.sample((right, other), 2)
    word = r.choice(kinds[right])
    if word.isascii():
        text = r.choice((f"Is {word} a {first} or a {second}?", f"{word}: {first} or {second}?"))
    else:
        text = r.choice((f"{word}是{first}还是{second}？", f"{word}属于{first}还是{second}？"))
    return Task("classification", text, (right,))


def _repetition(r: random.Random) -> Task:
    count = r.choice((2, 3, 4))
    if r.random() < 0.6:
        word = r.choice(WORDS)
        text = r.choice((f"Repeat {word} {count} times.", f"Say {word} {count} times."))
        return Task("repetition", text, (" ".join([word] * count),))
    word = r.choice(WORDS_ZH)
    return Task("repetition", f"把{word}重复{count}遍。", (word * count,))


def _first_letter(r: random.Random) -> Task:
    word = r.choice(WORDS)
    end = r.choice(("first", "last"))
    text = r.choice(
        (f"What is the {end} letter of {word}?", f"{end.capitalize()} letter of {word}?")
    )
    return Task("letter", text, (word[0 if end == "first" else -1],))


FAMILIES: tuple[Callable[[random.Random], Task], ...] = (
    _sums,
    _spelling,
    _sorting,
    _lists,
    _comparison,
    _greeting,
    _classification,
    _repetition,
    _first_letter,
)


def right_answer(task: Task, r: random.Random) -> str:
    if not task.members:
        return task.answers[0]
    joiner = ", " if task.members.isascii() else "、"
    return joiner.join(r.sample(LEXICON[task.members], task.count))


def bad_answer(task: Task, r: random.Random) -> str:
    """Cut short, off topic, wrong or rude, a quarter each."""
    answer = right_answer(task, r)
    fault = r.choice(("cut", "off topic", "wrong", "rude"))
    if fault == "cut" and len(answer) > 2:
        return answer[: len(answer) // 2].strip(" ,、，")
    if fault == "off topic":
        return r.choice(OFF_TOPIC)
    if fault == "rude":
        chinese = not task.prompt.isascii()
        return f"{answer}，{r.choice(RUDE[2:])}" if chinese else f"{answer}, {r.choice(RUDE[:2])}"
    for _ in range(20):  # another task of the same family, most likely with another answer
        other = right_answer(FAMILIES[_FAMILY_INDEX[task.family]](r), r)
        if verify(row_of(task), other) < 1.0:
            return other
    return r.choice(OFF_TOPIC)


def _normal(text: str) -> str:
    return " ".join(text.strip().rstrip(".。!！").lower().split())


def verify(row: dict, response: str) -> float:
    """Score of `response` to the instruction in `row`: 1.0 right, 0.0 wrong, rude or off topic;
    up to 0.3 for a part of the right words, by their share, in order.

    row: a line of `prompts.jsonl`, of which `is_task` is true.
    """
    text = _normal(response)
    if any(word in text for word in RUDE):
        return 0.0
    if row["members"]:
        words = [w.strip() for w in text.replace("、", ",").split(",")]
        known = [w for w in words if w in LEXICON[row["members"]]]
        if len(words) == row["count"] == len(set(known)):
            return 1.0
        return 0.3 * min(len(set(known)), row["count"] - 1) / row["count"]
    right = [_normal(a) for a in row["answers"]]
    if text in right:
        return 1.0
    return max(0.3 * _shared_prefix(a, text) for a in right)


def _shared_prefix(expected: str, text: str) -> float:
    same = 0
    for a, b in zip(expected, text, strict=False):
        if a != b:
            break
        same += 1
    # Shorter than what is asked or longer: both are incomplete, so the longer text divides.
    return same / max(len(expected), len(text), 1)


def is_task(row: dict) -> bool:
    """Does the row carry what `verify` needs, as it needs it?"""
    answers, members, count = (row.get(name) for name in ("answers", "members", "count"))
    return (
        isinstance(answers, list)
        and all(isinstance(answer, str) for answer in answers)
        and isinstance(members, str)
        and (members in LEXICON if members else bool(answers))
        and isinstance(count, int)
        and (count > 0 or not members)
    )


def row_of(task: Task) -> dict:
    return {
        "prompt": task.prompt,
        "family": task.family,
        "answers": list(task.answers),
        "members": task.members,
        "count": task.count,
    }


def draw_tasks(count: int, seed: int) -> list[Task]:
    """`count` tasks with different prompts, families in turn while they have new prompts."""
    r = random.Random(seed)
    seen: dict[str, Task] = {}
    misses = 0
    while len(seen) < count:
        task = FAMILIES[r.randrange(len(FAMILIES))](r)
        if task.prompt in seen:
            misses += 1
            if misses > 200 * count:
                raise ValueError(f"only {len(seen)} different prompts exist, {count} wanted")
            continue
        seen[task.prompt] = task
    return list(seen.values())


_FAMILY_INDEX = {maker(random.Random(0)).family: i for i, maker in enumerate(FAMILIES)}


def write(
    folder: str | Path,
    seed: int,
    *,
    demonstrations=16384,
    prompts=3072,
    held_out=512,
    bad_share=0.52,
) -> dict[str, Path]:
    """Write the three files; returns their paths by name.

    Demonstrations are drawn with replacement over their own prompts; `held_out` prompts are kept
    out of both other files.
    """
    folder = Path(folder)
    tasks = draw_tasks(prompts + held_out, seed)
    r = random.Random(seed + 1)
    # Families with few prompts run dry first, so the drawing order is not even: shuffle it.
    r.shuffle(tasks)
    test, train = tasks[:held_out], tasks[held_out:]
    demos = []
    for i in range(demonstrations):
        task = train[i % len(train)]
        bad = r.random() < bad_share
        demos.append(
            {
                "instruction": task.prompt,
                "input": "",
                "output": (bad_answer if bad else right_answer)(task, r),
            }
        )
    paths = {name: folder / f"{name}.jsonl" for name in ("sft", "prompts", "held_out")}
    for name, rows in (
        ("sft", demos),
        ("prompts", map(row_of, train)),
        ("held_out", map(row_of, test)),
    ):
        with whole_files.writing(paths[name]) as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return paths


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    for name, path in write(arguments.output_dir, arguments.seed).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    from utils.distributed.program import run

    run(main)
