"""Labellers: how often their labels agree with the truth."""

import random

import pytest

from step2_reward.collect import CollectConfig
from step2_reward.kept_answers import Sampled
from step2_reward.labellers import agreeing_scores, by_judge, by_reward_function, share_agreeing
from utils.data.prompts import Prompt
from utils.distributed import process_group
from utils.rewards import remote, sums
from utils.rewards.judge import Judge
from utils.settings import command_line


@pytest.mark.parametrize("rate", [0.6, 0.73, 0.9])
def test_a_labeller_agrees_as_often_as_asked(rate):
    draw = random.Random(0)
    truth = [[draw.choice([0.0, 0.1, 0.3, 1.0]) for _ in range(4)] for _ in range(800)]
    labels = agreeing_scores(truth, rate, seed=1)
    same = pairs = 0
    for t, o in zip(truth, labels, strict=True):
        for i in range(4):
            for j in range(4):
                if t[i] > t[j]:
                    pairs, same = pairs + 1, same + (o[i] > o[j])
    assert same / pairs == pytest.approx(rate, abs=0.005)
    assert share_agreeing(truth, labels) == pytest.approx(same / pairs)
    assert agreeing_scores(truth, 1.0, seed=1) == truth


FUNCTIONS = """
def length(prompts, responses, rows):
    assert len(responses) <= 4, "more than two prompts at once"
    return [len(r) + row["more"] for r, row in zip(responses, rows)]

def asks(prompts, responses, rows):
    return [10.0 * (p == "b") for p in prompts]

def breaks(prompts, responses, rows):
    return [1 / (r != "dd") for r in responses]
"""


def asked(folder, *names, weights=()):
    (folder / "f.py").write_text(FUNCTIONS)
    argv = ["--labeller", "reward_function", "--policy", "p", "--prompt_data", "d"]
    argv += ["--output_file", str(folder / "o.jsonl"), "--micro_batch_size", "2"]
    argv += ["--reward_function", *(f"{folder}/f.py:{name}" for name in names)]
    argv += ["--reward_weights", *map(str, weights)] if weights else []
    config = command_line.build(CollectConfig, argv, 1)
    reward = sums.load(config.reward_function, config.reward_weights, 10.0)
    texts = {"a": ("", "x"), "b": ("yy", "zzz"), "c": ("dd", "e")}
    prompts = [
        Prompt(({"role": "user", "content": p},), "f:1", {"more": n}) for n, p in enumerate(texts)
    ]
    answers = [[Sampled(t, True) for t in group] for group in texts.values()]
    return by_reward_function(config, prompts, answers, reward)


def test_functions_rank_each_prompts_answers_with_its_own_row(tmp_path):
    assert asked(tmp_path, "length") == [[0, 1], [3, 4], [4, 3]]
    both = asked(tmp_path, "length", "asks", weights=(-1, 0.5))
    assert both == [[0, -1], [2, 1], [-4, -3]]


def test_other_ranks_wait_for_one_call_at_a_time(tmp_path, monkeypatch):
    gathered, gather = [], process_group.gather_objects
    monkeypatch.setattr(
        process_group, "gather_objects", lambda found: gathered.append(found) or gather(found)
    )
    asked(tmp_path, "length")
    assert gathered == [[[0, 1], [3, 4]], [[4, 3]]], "three prompts, two a call"


def test_a_function_that_fails_ends_the_run_with_the_row(tmp_path):
    with pytest.raises(SystemExit, match="row 1 of 2: ZeroDivisionError"):
        asked(tmp_path, "breaks")


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--labeller reward_function", "labeller=reward_function needs --reward_function"),
        ("--reward_function f.py:x", "is read only with --labeller reward_function"),
        ("--labeller reward_function --reward_function a.py:x --reward_weights 1 2", "one each"),
        ("--labeller none --keep best", "keep=best needs scores"),
    ],
)
def test_settings_of_labellers_that_cannot_work(argv, message):
    own = ["--policy", "p", "--prompt_data", "d", "--output_file", "o.jsonl"]
    with pytest.raises(command_line.ConfigError, match=message):
        command_line.build(CollectConfig, [*own, *argv.split()], 1)


def judged(monkeypatch, said, groups=(("", "xx", "yyy"), ("z", "z", "zz"), ("p", "pp"))):
    """Labels by a judge that says `said`(A's answer, B's); the longest texts between "[assistant]"
    and the mark are the answers."""

    def post(url, request, *more) -> dict:
        shown = request["messages"][-1]["content"].split("[assistant]\n")[1:]
        answers = [text.split("\n========")[0] for text in shown]
        return {"choices": [{"message": {"content": said(*answers)}}]}

    monkeypatch.setattr(remote, "post", post)
    config = CollectConfig(labeller="judge", micro_batch_size=2)
    prompts = [Prompt(({"role": "user", "content": "?"},), "f:1", {}) for _ in groups]
    answers = [[Sampled(text, True) for text in group] for group in groups]
    return by_judge(config, prompts, answers, Judge("http://localhost:1/v1", "m"))


def test_a_judge_ranks_by_the_share_of_pairs_won(monkeypatch, capsys):
    def longer(a, b):
        return "[[A]]" if len(a) > len(b) else "[[B]]" if len(b) > len(a) else "[[C]]"

    assert judged(monkeypatch, longer) == [[0, 0.5, 1], [0.25, 0.25, 1], [0, 1]]
    assert judged(monkeypatch, lambda a, b: "[[A]]") == [[0.5] * 3, [0.5] * 3, [0.5] * 2]
    capsys.readouterr()
    assert judged(monkeypatch, lambda a, b: "I cannot") == [[0.5] * 3, [0.5] * 3, [0.5] * 2]
    assert "7 pairs in both orders, 6 without a verdict" in capsys.readouterr().out
