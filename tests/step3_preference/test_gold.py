"""What is measured of the policy's own answers; test_main.py runs it whole, on any ranks."""

import json
from types import SimpleNamespace

import pytest

from step3_preference import gold, logprobs
from utils.data.comparisons import COMPARISONS
from utils.data.loading import DataSettings
from utils.data.prompts import PROMPTS, Prompt
from utils.data.rows import BadRows
from utils.data.splits import train_and_held_out


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Two sums, answered "5" and "no idea", the second one cut."""
    held = object.__new__(gold.HeldOutAnswers)
    row = {"task": "sum", "inputs": [2, 3]}
    held.prompts = [Prompt(({"role": "user", "content": f"{n}?"},), "", row, [n]) for n in (7, 8)]
    told = []
    report = SimpleNamespace(table=lambda name, rows: told.append((name, rows)))
    held.run = SimpleNamespace(device="cpu", facts={}, report=report)
    held.config = SimpleNamespace(
        micro_batch_size=2, micro_batch_tokens=0, output_dir=str(tmp_path)
    )
    texts = {(1, 0): "5", (2, 3, 4): "no idea"}
    decode = lambda ids, **_: [texts[tuple(one)] for one in ids]  # noqa: E731
    held.tokenizer = SimpleNamespace(batch_decode=decode)
    held.actor, held.judge, held.reader, held.verified = None, None, None, True
    monkeypatch.setattr(gold.toy_tasks, "verify", lambda row, text: float(text == "5"))
    held.sampled = lambda: [([1, 0], True), ([2, 3, 4], False)]

    def of_policy(_, rows, *__):
        assert [(r.answers, r.begins) for r in rows] == [([[7, 1, 0]], [1]), ([[8, 2, 3, 4]], [1])]
        return [[-1.0], [-2.0]]

    monkeypatch.setattr(logprobs, "of_all", of_policy)
    monkeypatch.setattr(logprobs, "by_reference", lambda *_: {"": [[-1.5], [-3.0]]})
    return held, told


def test_measures_of_known_answers(own, tmp_path):
    held, told = own
    assert held.measure("before") == {
        "eval/kl_k1": (0.5 + 1.0) / 2,
        "eval/response_length": 2.5,
        "eval/eos_share": 0.5,
        "eval/verifier": 0.5,
    }
    held.measure("after")
    kept = json.loads((tmp_path / "samples.json").read_text())
    assert list(kept) == ["before", "after"] and kept["before"][1] == {
        "prompt": [{"role": "user", "content": "8?"}],
        "answer": "no idea",
        "finished": False,
        "tokens": 3,
        "verifier": 0.0,
    }
    assert told[0][0] == "answers" and told[0][1][0]["prompt"] == "user: 7?"
    assert len(told) == 2, "a tracker gets each evaluation's"


def test_what_it_answers_was_held_out_of_the_comparisons(tmp_path):
    """As run_all.sh gives both: comparisons of some of the prompts, in another order."""
    files = {name: tmp_path / f"{name}.jsonl" for name in ("prompts", "comparisons")}
    asked = [{"prompt": f"What is {n}?"} for n in range(300)]
    compared = [row | {"responses": ["a", "b"], "scores": [1, 0]} for row in asked[250:40:-1] * 2]
    for name, rows in (("prompts", asked), ("comparisons", compared)):
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))

    def split(kind, name, step) -> list[set[str]]:
        settings = DataSettings(str(tmp_path), eval_fraction=0.1, seed=3)
        bad = BadRows()
        views = train_and_held_out(kind, [str(files[name])], None, settings, step, bad)
        return [{view.item(i).prompt[-1]["content"] for i in range(len(view))} for view in views]

    trained, _ = split(COMPARISONS, "comparisons", 2)
    _, answered = split(PROMPTS, "prompts", 3)
    assert len(answered) > 10 and len(trained) > 150
    assert not trained & answered and answered & {row["prompt"] for row in compared}
