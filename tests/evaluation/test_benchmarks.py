"""Skills by counting, and lm-evaluation-harness where it is installed."""

import json

import numpy as np
import pytest

from evaluation import benchmarks
from evaluation.answers import Answer
from evaluation.benchmarks import BenchmarksConfig
from evaluation.questions import Question
from tests.helpers import evaluated_models
from tests.helpers.evaluated_models import problems_of
from utils.confidence import interval_by_prompt

policy = evaluated_models.policy


def answered(right: dict[str, list[bool]], skills: list[str]):
    """Questions of these skills whose answer is 5, and who is right on which."""
    rows = [
        {"family": skill, "prompt": f"q{n}", "answers": ["5"], "members": "", "count": 0}
        for n, skill in enumerate(skills)
    ]
    asked = [Question((), (r["prompt"],), f"f:{n}", r) for n, r in enumerate(rows)]
    results = {
        name: [
            [Answer(name, 1, ({"role": "assistant", "content": "5" if ok else "no"},), 1, True)]
            for ok in each
        ]
        for name, each in right.items()
    }
    return asked, results


def test_each_skill_is_counted_and_its_change_is_paired():
    skills = ["sum"] * 30 + ["list"] * 30 + ["letter"] * 30
    sft = [n % 2 == 0 for n in range(90)]
    ppo = [True] * 30 + [n % 4 == 0 for n in range(30)] + sft[60:]
    asked, results = answered({"sft": sft, "ppo\x1b": ppo}, skills)
    found = benchmarks.by_skill(asked, results)
    assert list(found) == ["letter", "list", "sum", "all"]
    assert [found[s]["checkpoints"]["sft"][0] for s in found] == [0.5] * 4
    assert found["sum"]["checkpoints"]["ppo\x1b"][0] == 1.0 and found["all"]["prompts"] == 90
    gap = np.array(ppo, float) - np.array(sft, float)
    low, high = interval_by_prompt((1 + gap[30:60]) / 2, np.arange(30, 60))
    assert found["list"]["changes"]["ppo\x1b"] == pytest.approx(
        [gap[30:60].mean(), 2 * low - 1, 2 * high - 1]
    )
    lines = {line.split()[0]: line for line in benchmarks.skill_table(found).splitlines()}
    assert lines["sum"].endswith("gained") and lines["list"].endswith("forgot")
    assert not lines["letter"].endswith(("gained", "forgot")) and "ppo\\x1b" in lines["skill"]


def test_a_skill_that_does_not_change_is_not_called_changed():
    asked, results = answered({"a": [True] * 40, "b": [True] * 40}, ["sum"] * 40)
    changed = benchmarks.by_skill(asked, results)["sum"]["changes"]["b"]
    assert changed[0] == 0 and changed[1] < 0 < changed[2]


def test_what_is_missing_is_said(policy, monkeypatch):
    monkeypatch.setattr(benchmarks.importlib.util, "find_spec", lambda name: None)
    flags = ["--checkpoints", policy]
    assert "nothing to measure; set --prompts" in problems_of(*flags, of=BenchmarksConfig)
    judged = problems_of(*flags, "--reward_model", policy, of=BenchmarksConfig)
    assert "reward_model is not read here; leave out --reward_model" in judged
    message = problems_of(*flags, "--lm_eval_tasks", "hellaswag", of=BenchmarksConfig)
    assert "not installed: pip install -r requirements-eval.txt" in message


def test_the_harness_measures_what_its_task_says(policy, tmp_path, monkeypatch, capsys):
    """A task of local files: which of two endings is likelier, by transformers' own sums."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness: requirements-eval.txt")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [
        {"q": f"The quick brown fox {n}", "a": [" jumps", " sleeps on"], "gold": n % 2}
        for n in range(8)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "endings.yaml").write_text(
        "task: endings\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: '{{a}}'\ndoc_to_target: gold\n"
        "target_delimiter: ''\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    flags = ["--checkpoints", policy, "--lm_eval_tasks", str(tmp_path / "endings.yaml")]
    flags += ["--dtype", "fp32", "--output_dir", str(tmp_path / "out"), "--batch_size", "1"]
    monkeypatch.setattr("sys.argv", ["benchmarks.py", *flags])
    benchmarks.main()
    found = json.loads((tmp_path / "out/benchmarks.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy)
    right = []
    for row in rows:
        sums = []
        for ending in row["a"]:
            whole = tokenizer(row["q"] + ending).input_ids
            begins = len(tokenizer(row["q"]).input_ids)
            with torch.no_grad():
                logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(logprobs[t - 1, whole[t]].item() for t in range(begins, len(whole))))
        right.append(int(np.argmax(sums)) == row["gold"])
    assert found["lm_eval"][policy]["endings"]["acc,none"] == np.mean(right)
    assert "endings" in capsys.readouterr().out
