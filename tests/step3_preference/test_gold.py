"""What is measured of the policy's own answers; test_main.py runs it whole, on any ranks."""

import json
from types import SimpleNamespace

import pytest

from step3_preference import gold, logprobs
from utils.data.prompts import Prompt


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
