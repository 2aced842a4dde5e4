"""The same twenty dialogues (dialogues.jsonl) written in each format that data sets have.

`FORMATS[name]` is (rows, what they say): written forwards, from dialogues to rows, so that the
readers of utils/data are judged by what went in. `worse` are answers to the last question, the
better first.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Dialogue:
    system: str
    turns: tuple  # (asked, answered) pairs
    worse: tuple

    @property
    def last(self):
        return self.turns[-1]

    @property
    def messages(self):
        """All turns up to the last question."""
        pairs = [("user", "assistant")] * len(self.turns)
        said = [
            {"role": role, "content": text}
            for roles, texts in zip(pairs, self.turns, strict=True)
            for role, text in zip(roles, texts, strict=True)
        ]
        return ([{"role": "system", "content": self.system}] if self.system else []) + said[:-1]

    @property
    def whole(self):
        return [*self.messages, {"role": "assistant", "content": self.last[1]}]


def read_dialogues():
    lines = Path(__file__).with_name("dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        row = json.loads(line)
        yield Dialogue(row["system"], tuple(map(tuple, row["turns"])), tuple(row["worse"]))


FULL = list(read_dialogues())
PLAIN = [replace(d, system="") for d in FULL]
FIRST = [replace(d, turns=d.turns[:1]) for d in FULL]
SINGLE = [replace(d, system="") for d in FIRST]


def renamed(turns, **names):
    return [{"from": names.get(t["role"], t["role"]), "value": t["content"]} for t in turns]


def parts_of(turns):
    """Each text cut in two parts in its middle."""
    return [
        {**t, "content": [{"type": "text", "text": half} for half in halves(t["content"])]}
        for t in turns
    ]


def halves(text):
    return text[: len(text) // 2], text[len(text) // 2 :]


def in_two(turns):
    """The user's paragraphs as turns of their own."""
    return [
        {**turn, "content": text}
        for turn in turns
        for text in (
            turn["content"].split("\n\n", 1) if turn["role"] == "user" else [turn["content"]]
        )
    ]


def hh(dialogue, answer=None):
    text = "".join(f"\n\nHuman: {a}\n\nAssistant: {b}" for a, b in dialogue.turns)
    return text if answer is None else text.removesuffix(dialogue.last[1]) + answer


def belle(dialogue):
    text = "".join(f"Human:{a}\nAssistant:{b}\n" for a, b in dialogue.turns)
    return text.removesuffix(dialogue.last[1] + "\n")


def guanaco(dialogue):
    return "".join(f"### Human: {a}### Assistant: {b}" for a, b in dialogue.turns)


def split_input(dialogue):
    asked, _, extra = dialogue.turns[0][0].partition("\n\n")
    return asked, extra


def tree(dialogue, number):
    """Every question has a worse answer too, and one that was deleted."""
    node = None
    for depth, (asked, answered) in reversed(list(enumerate(dialogue.turns))):
        best = message(f"{number}.{depth}.a", "assistant", answered, 0, [node] if node else [])
        bad = message(f"{number}.{depth}.b", "assistant", dialogue.worse[0], 1)
        gone = message(f"{number}.{depth}.c", "assistant", "deleted", -1) | {"deleted": True}
        node = message(f"{number}.{depth}", "prompter", asked, None, [gone, bad, best])
    return {"message_tree_id": node["message_id"], "tree_state": "ready", "prompt": node}


def message(name, role, text, rank, replies=()):
    said = {"message_id": name, "role": role, "text": text, "rank": rank, "deleted": False}
    return said | {"replies": list(replies)}


def flat(node, parent=None):
    """Children before their parent: the order of rows is nobody's promise."""
    below = [row for reply in node["replies"] for row in flat(reply, node["message_id"])]
    own = {key: value for key, value in node.items() if key != "replies"}
    return [*below, own | {"parent_id": parent, "review_result": True}]


TREES = [tree(d, number) for number, d in enumerate(PLAIN)]


def ranked(d):
    """(answers, how good each is), the best in the middle."""
    return [d.worse[1], d.last[1], d.worse[0]], [1, 3, 2]


def completions(d):
    return [
        {"response": text, "overall_score": score, "model": "m"}
        for text, score in zip(*ranked(d), strict=True)
    ]


def pair(d):
    return {
        "chosen": d.whole,
        "rejected": [*d.messages, {"role": "assistant", "content": d.worse[0]}],
        "score_chosen": 3,
        "score_rejected": 2,
    }


def nectar(d):
    answers = [
        {"answer": text, "rank": 4.0 - score} for text, score in zip(*ranked(d), strict=True)
    ]
    return {"prompt": hh(d, ""), "answers": answers, "num_responses": 3}


def tools(d):
    """A tool is called for the last answer."""
    call = {"function": {"name": "look_up", "arguments": json.dumps({"word": d.last[0]})}}
    return [
        *({**t, "role": "developer"} if t["role"] == "system" else t for t in d.messages),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "found"},
        d.whole[-1],
    ]


def rows(of, make):
    return [make(d) for d in of], of


HELLO = {"role": "assistant", "content": "Hello, ask me."}
BYE = {"role": "user", "content": "Bye."}
# name: (rows, the dialogues that they hold)
FORMATS = {
    "chat": rows(FULL, lambda d: {"messages": d.whole}),
    "chat in parts": rows(FULL, lambda d: {"messages": parts_of(d.whole)}),
    "chat with a developer": rows(
        FULL,
        lambda d: {
            "messages": [
                {**t, "role": "developer"} if t["role"] == "system" else t for t in d.whole
            ]
        },
    ),
    "chat, user turns in a row": rows(FULL, lambda d: {"messages": in_two(d.whole)}),
    "sharegpt": rows(
        FULL, lambda d: {"conversations": renamed(d.whole, user="human", assistant="gpt")}
    ),
    "sharegpt with open ends": rows(
        PLAIN,
        lambda d: {"conversations": renamed([HELLO, *d.whole, BYE], user="human", assistant="gpt")},
    ),
    "alpaca": rows(
        FIRST,
        lambda d: {
            **dict(zip(("instruction", "input"), split_input(d), strict=True)),
            "output": d.last[1],
            "system": d.system,
        },
    ),
    "alpaca with history": rows(
        FULL,
        lambda d: {
            "instruction": d.last[0],
            "input": "",
            "output": d.last[1],
            "system": d.system,
            "history": [list(turn) for turn in d.turns[:-1]],
        },
    ),
    "dolly": rows(
        SINGLE,
        lambda d: {
            **dict(zip(("instruction", "context"), split_input(d), strict=True)),
            "response": d.last[1],
            "category": "open_qa",
        },
    ),
    "belle multi-turn": rows(
        PLAIN, lambda d: {"instruction": belle(d), "input": "", "output": d.last[1]}
    ),
    "guanaco": rows(PLAIN, lambda d: {"text": guanaco(d)}),
    "question, answer": rows(SINGLE, lambda d: {"question": d.last[0], "answer": d.last[1]}),
    "openorca": rows(
        FIRST,
        lambda d: {"system_prompt": d.system, "question": d.last[0], "response": d.last[1]},
    ),
    "trl, texts": rows(SINGLE, lambda d: {"prompt": d.last[0], "completion": d.last[1]}),
    "trl, turns": rows(FULL, lambda d: {"prompt": d.messages, "completion": d.whole[-1:]}),
    "kto": (
        [
            {"prompt": d.last[0], "completion": text, "label": label}
            for d in SINGLE
            for text, label in ((d.worse[0], False), (d.last[1], True))
        ],
        SINGLE,
    ),
    "rm-static, response": rows(
        PLAIN, lambda d: {"prompt": hh(d, ""), "response": " " + d.last[1]}
    ),
    "hh": rows(PLAIN, lambda d: {"chosen": hh(d), "rejected": hh(d, d.worse[0])}),
    "rm-static": rows(
        PLAIN,
        lambda d: {
            "prompt": hh(d, "").rstrip(),
            "chosen": " " + d.last[1],
            "rejected": " " + d.worse[0],
        },
    ),
    "ultrafeedback binarized": rows(
        FULL, lambda d: {**pair(d), "prompt": d.turns[0][0], "messages": d.whole}
    ),
    "pairs of turns": rows(FULL, lambda d: pair(d)),
    "pairs of texts": rows(
        FIRST,
        lambda d: {
            "system": d.system,
            "question": d.last[0],
            "chosen": d.last[1],
            "rejected": d.worse[0],
        },
    ),
    "k-wise": rows(
        SINGLE,
        lambda d: {"prompt": d.last[0], "responses": ranked(d)[0], "scores": ranked(d)[1]},
    ),
    "ultrafeedback": rows(
        SINGLE,
        lambda d: {"instruction": d.last[0], "completions": completions(d), "source": "s"},
    ),
    "nectar": rows(PLAIN, nectar),
    "shp": rows(
        SINGLE,
        lambda d: {
            "history": d.last[0],
            "human_ref_A": d.worse[0],
            "human_ref_B": d.last[1],
            "labels": 0,
            "score_A": 2,
            "score_B": 9,
        },
    ),
    "trees": (TREES, PLAIN),
    "trees, flat": ([row for one in TREES for row in flat(one["prompt"])], PLAIN),
    "fastchat questions": rows(
        SINGLE, lambda d: {"question_id": 1, "text": d.last[0], "category": "c"}
    ),
    "mt-bench questions": rows(
        SINGLE, lambda d: {"question_id": 1, "turns": [d.last[0], "And then?"], "category": "c"}
    ),
    "prompts": rows(FULL, lambda d: {"prompt": d.messages}),
    "instructions with context": rows(
        SINGLE, lambda d: dict(zip(("instruction", "context"), split_input(d), strict=True))
    ),
}
PROMPTS_ONLY = tuple(FORMATS)[-4:]
COMPARED = {  # how many answers a row ranks
    "hh": 2,
    "rm-static": 2,
    "ultrafeedback binarized": 2,
    "pairs of turns": 2,
    "pairs of texts": 2,
    "k-wise": 3,
    "ultrafeedback": 3,
    "nectar": 3,
    "shp": 2,
    "trees": 2,
    "trees, flat": 2,
}
