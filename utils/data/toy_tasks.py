"""The embedded task: small instructions in English and Chinese whose answers a program verifies.

    python -m utils.data.toy_tasks --output_dir FOLDER [--seed N]

writes demonstrations (`sft.jsonl`, about half of them bad on purpose: cut short, off topic, wrong
or rude, so that feedback has something to teach), prompts for collecting comparisons and for PPO
(`prompts.jsonl`) and held-out prompts (`held_out.jsonl`). No prompt stands in two files.
"""

import json
import random
from collections.abc import Callable, Iterable
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


# Questions by family; of some families one list in English and one in Chinese.
SUMS = ("What is {} + {}?", "Add {} and {}.", "{} + {} = ?", "{}加{}等于几？", "计算{}+{}。")
SPELLING = ("Spell the word {}.", "How do you spell {}?", "请拼写{}。")
SORTING = ("Sort these numbers: {}", "Put in order: {}", "从小到大排列：{}")
LISTS = ("Name {} {}.", "List {} {}.", "Give me {} {}, please.")
LISTS_ZH = ("说出{}种{}。", "请列出{}种{}。")
COMPARISONS = (
    ("Which is larger, {} or {}?", max),
    ("哪个更大：{}还是{}？", max),
    ("Which is smaller, {} or {}?", min),
)
GREETINGS = ("Say {1} to {0}.", "Please say {1} to {0}.")
GREETINGS_ZH = ("对{}说{}。", "请对{}说{}。")
KINDS_OF = ("Is {} a {} or a {}?", "{}: {} or {}?")
KINDS_OF_ZH = ("{}是{}还是{}？", "{}属于{}还是{}？")
REPETITION = ("Repeat {} {} times.", "Say {} {} times.")
LETTERS = ("What is the {0} letter of {1}?", "{2} letter of {1}?")


def _sums(r: random.Random) -> Task:
    a, b = r.randint(0, 9), r.randint(0, 9)
    return Task("sum", r.choice(SUMS).format(a, b), (str(a + b),))


def _spelling(r: random.Random) -> Task:
    word = r.choice(WORDS)
    return Task("spelling", r.choice(SPELLING).format(word), (" ".join(word),))


def _sorting(r: random.Random) -> Task:
    numbers = r.sample(range(10), 3)
    question = r.choice(SORTING).format(" ".join(map(str, numbers)))
    return Task("sorting", question, (" ".join(map(str, sorted(numbers))),))


def _lists(r: random.Random) -> Task:
    name = r.choice(list(LEXICON))
    count = r.choice((2, 3, 4))
    english = name.isascii()
    word = (" two three four" if english else " 两 三 四").split(" ")[count - 1]
    question = r.choice(LISTS if english else LISTS_ZH).format(word, name)
    return Task("list", question, members=name, count=count)


def _comparison(r: random.Random) -> Task:
    a, b = r.sample(range(21), 2)
    question, pick = r.choice(COMPARISONS)
    return Task("comparison", question.format(a, b), (str(pick(a, b)),))


def _greeting(r: random.Random) -> Task:
    name = r.choice(NAMES + NAMES_ZH)
    english = name.isascii()
    hello = r.choice(("hello", "goodbye", "thank you") if english else ("你好", "再见", "谢谢"))
    question = r.choice(GREETINGS if english else GREETINGS_ZH).format(name, hello)
    answer = f"{hello.capitalize()}, {name}!" if english else f"{hello}，{name}！"
    return Task("greeting", question, (answer,))


def _classification(r: random.Random) -> Task:
    kinds = r.choice((KINDS, KINDS_ZH))
    right, other = r.sample(list(kinds), 2)
    first, second = r.sample((right, other), 2)
    word = r.choice(kinds[right])
    question = r.choice(KINDS_OF if word.isascii() else KINDS_OF_ZH)
    return Task("classification", question.format(word, first, second), (right,))


def _repetition(r: random.Random) -> Task:
    count = r.choice((2, 3, 4))
    if r.random() < 0.6:
        word = r.choice(WORDS)
        return Task(
            "repetition", r.choice(REPETITION).format(word, count), (" ".join([word] * count),)
        )
    word = r.choice(WORDS_ZH)
    return Task("repetition", f"把{word}重复{count}遍。", (word * count,))


def _first_letter(r: random.Random) -> Task:
    word = r.choice(WORDS)
    end = r.choice(("first", "last"))
    question = r.choice(LETTERS).format(end, word, end.capitalize())
    return Task("letter", question, (word[0 if end == "first" else -1],))


FAMILIES: dict[str, Callable[[random.Random], Task]] = {
    "sum": _sums,
    "spelling": _spelling,
    "sorting": _sorting,
    "list": _lists,
    "comparison": _comparison,
    "greeting": _greeting,
    "classification": _classification,
    "repetition": _repetition,
    "letter": _first_letter,
}


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
        other = right_answer(FAMILIES[task.family](r), r)
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
    row = {"prompt": task.prompt, "family": task.family, "answers": list(task.answers)}
    return row | {"members": task.members, "count": task.count}


def draw_tasks(count: int, seed: int) -> list[Task]:
    """`count` tasks with different prompts, families in turn while they have new prompts."""
    r, makers = random.Random(seed), list(FAMILIES.values())
    seen: dict[str, Task] = {}
    misses = 0
    while len(seen) < count:
        task = makers[r.randrange(len(makers))](r)
        if task.prompt in seen:
            misses += 1
            if misses > 200 * count:
                raise ValueError(f"only {len(seen)} different prompts exist, {count} wanted")
            continue
        seen[task.prompt] = task
    return list(seen.values())


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
    tasks = draw_tasks(prompts + held_out, seed)
    r = random.Random(seed + 1)
    # Families with few prompts run dry first, so the drawing order is not even: shuffle it.
    r.shuffle(tasks)
    test, train = tasks[:held_out], tasks[held_out:]
    demos = []
    for i in range(demonstrations):
        task = train[i % len(train)]
        answer = bad_answer if r.random() < bad_share else right_answer
        demos.append({"instruction": task.prompt, "input": "", "output": answer(task, r)})
    files = {"sft": demos, "prompts": map(row_of, train), "held_out": map(row_of, test)}
    return write_files(folder, files)


def write_files(folder: str | Path, files: dict[str, Iterable[dict]]) -> dict[str, Path]:
    """Rows by the name of their file → FOLDER/NAME.jsonl; returns the paths by name."""
    paths = {name: Path(folder) / f"{name}.jsonl" for name in files}
    for name, rows in files.items():
        with whole_files.writing(paths[name]) as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return paths


def main(write=write, about: str = __doc__) -> None:
    """Writes a task's files where the command line says."""
    import argparse

    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    for name, path in write(arguments.output_dir, arguments.seed).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    from utils.distributed.program import run

    run(main)
