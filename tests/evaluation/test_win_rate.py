"""Checkpoints against each other: judges, tables and files, by answers whose quality is known."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation import answers, judges, prompt_eval, win_rate
from evaluation.answers import Answer
from evaluation.questions import Question
from evaluation.win_rate import WinRateConfig
from tests.helpers import evaluated_models
from tests.helpers.evaluated_models import problems_of
from tests.utils.rewards import test_judge
from utils.confidence import interval_by_prompt
from utils.data import toy_tasks
from utils.data.rows import DataError

policy, serve = evaluated_models.policy, test_judge.serve
SUM = {"family": "sum", "prompt": "What is 2 + 3?", "answers": ["5"], "members": "", "count": 0}


def answered(name: str, texts, questions) -> list[list[Answer]]:
    return [
        [Answer(name, 1, (*q.context, user(q.turns[0]), assistant(text)), len(text), True)]
        for q, text in zip(questions, texts, strict=True)
    ]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def of_sums(*right: float, prompts: int = 60):
    """Questions whose answer is 5, and checkpoints a, b, … right on these shares of them."""
    generator = np.random.default_rng(0)
    questions = [Question((), (f"{n}: 2 + 3?",), f"file:{n}", SUM) for n in range(prompts)]
    results = {}
    for name, share in zip("abcdef", right, strict=False):
        texts = np.where(generator.random(prompts) < share, "5", "no idea")
        results[name] = answered(name, texts.tolist(), questions)
    return questions, results


def configured(judge="verifier", **settings) -> WinRateConfig:
    return WinRateConfig(checkpoints=["a", "b"], judge=judge, dtype="fp32", **settings)


def judged(config, questions, results):
    games = win_rate.games_of(results)
    points, told = judges.JUDGES[config.judge](config, questions, games)
    return win_rate.summarised(config, results, games, points, told), games, points


def test_the_verifiers_table_by_counting():
    questions, results = of_sums(0.3, 0.6, 0.9)
    assert toy_tasks.verify(SUM, "5") == 1 and toy_tasks.is_task(SUM)
    summary, _, _ = judged(configured(), questions, results)
    right = {
        name: np.array([g[0].answer == "5" for g in groups], float)
        for name, groups in results.items()
    }
    assert [(p["first"], p["second"]) for p in summary["pairs"]] == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]
    for pair in summary["pairs"]:
        gap = right[pair["second"]] - right[pair["first"]]
        assert pair["win"][0] == (gap > 0).mean() and pair["loss"][0] == (gap < 0).mean()
        assert pair["tie"][0] == (gap == 0).mean() and pair["games"] == 60
        points = (1 + np.sign(gap)) / 2
        expected = [points.mean(), *interval_by_prompt(points, np.arange(60))]
        assert pair["win_rate"] == pytest.approx(expected)
        assert pair["better"] == (pair["second"] if expected[1] > 0.5 else None)
    assert summary["pairs"][1]["better"] == "c"
    for name, row in summary["checkpoints"].items():
        assert row["score"][0] == right[name].mean() and row["score"][1] <= row["score"][0]
    elo = [row["elo"][0] for row in summary["checkpoints"].values()]
    assert elo[0] == 1000 < elo[1] < elo[2] and summary["not_judged"] == 0
    text = win_rate.as_text(summary)
    assert "better: c" in text and "0 left out" in text


def test_a_model_against_itself_is_not_told_apart():
    questions, results = of_sums(0.6, 0.6)
    results["b"] = answered("b", [g[0].answer for g in results["a"]], questions)
    (pair,) = judged(configured(), questions, results)[0]["pairs"]
    assert pair["better"] is None and pair["tie"][0] == 1 and pair["win_rate"][0] == 0.5
    assert pair["length_controlled"][0] == pytest.approx(0.5)


def test_functions_judge_with_a_margin(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def brief(prompts, responses, rows):\n    return [-len(r) * row['weight'] for r, row in "
        "zip(responses, rows)]\n"
    )
    questions = [Question((), ("q",), "f:1", {"weight": 1}), Question((), ("r",), "f:2", {})]
    questions[1] = Question((), ("r",), "f:2", {"weight": -1})
    results = {
        "a": answered("a", ["xx", "xx"], questions),
        "b": answered("b", ["xxxxx", "xxxxx"], questions),
    }
    how = dict(reward_function=[f"{tmp_path}/mine.py:brief"])
    summary, _, points = judged(configured("reward_function", **how), questions, results)
    assert points == [0.0, 1.0] and summary["checkpoints"]["a"]["score"][0] == 0
    assert judged(configured("reward_function", tie_margin=3.0, **how), questions, results)[2] == [
        0.5,
        0.5,
    ]


def test_a_score_that_is_no_number_makes_nobody_win(monkeypatch):
    """No comparison with it holds, so that the other answer, or the first one, would have won."""
    questions, results = of_sums(0.0, 1.0, prompts=3)
    scores = iter([math.nan, 1.0, 2.0, 3.0, math.inf, 2.5])
    reader = SimpleNamespace(refusal=lambda _: None, encode=lambda *_: [1], tokenizer=None)
    monkeypatch.setattr(prompt_eval.Reader, "load", lambda *_: reader)
    monkeypatch.setattr(prompt_eval.scalar_model, "load", lambda *_, **__: torch.nn.Identity())
    monkeypatch.setattr(
        prompt_eval.scorer, "score_groups", lambda *args: [[next(scores)] for _ in args[1]]
    )
    config = configured("reward_model", reward_model="rm")
    summary, _, points = judged(config, questions, results)
    assert points == [None, 1.0, None] and summary["not_judged"] == 2
    assert "no score, the reward model gives nan" in win_rate.as_text(summary)
    # Answers are scored game by game: a has nan, 2 and inf, b 1, 3 and 2.5.
    first, second = (row.get("score") for row in summary["checkpoints"].values())
    assert second[0] == pytest.approx(6.5 / 3) and 1 <= second[1] < second[0] < second[2] <= 3
    assert first is None, "one prompt has no interval"


def test_the_interval_of_mean_scores_is_that_of_any_numbers():
    """Not of shares: few prompts, or equal scores, of −70 have no root that Wilson's takes."""
    generator = np.random.default_rng(0)
    scores = generator.normal(-70, 8, 200)
    value, low, high = win_rate.mean(scores, np.arange(200))
    error = scores.std() / math.sqrt(200)
    assert value == pytest.approx(scores.mean())
    assert [value - low, high - value] == pytest.approx([1.96 * error] * 2, rel=0.1)
    assert win_rate.mean([-70.0] * 5, range(5)) == [-70.0] * 3


def test_people_decide_by_majority_and_what_they_did_not_rank_is_left_out(tmp_path):
    questions, results = of_sums(0.0, 1.0, prompts=4)
    prompts = [q.turns[0] for q in questions]
    rows = [
        {"prompt": prompts[0], "responses": ["5 ", "no idea", "x"], "ranks": [1, 2, 3]},
        {"prompt": prompts[0], "responses": ["5", "no idea"], "ranks": [1, 2]},
        {"prompt": prompts[0], "responses": ["5", "no idea"], "ranks": [2, 1]},
        {"prompt": prompts[1], "responses": ["no idea", "5"], "ranks": [1, 2]},
        {"prompt": prompts[2], "responses": ["no idea", "5"], "ranks": [1, 1]},
        {"prompt": prompts[3], "responses": ["no idea", "another"], "ranks": [1, 2]},
    ]
    file = tmp_path / "ranked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configured("people", rankings=[str(file)])
    summary, _, points = judged(config, questions, results)
    assert points == [1.0, 0.0, 0.5, None]
    assert summary["not_judged"] == 1 and summary["rankings"] == 6
    assert "1 left out" in win_rate.as_text(summary)
    file.write_text('{"prompt": "p", "responses": ["a", "b"], "ranks": ["x", 1]}\n')
    with pytest.raises(DataError, match="cannot be used"):
        judged(config, questions, results)


def test_what_people_are_given_to_rank_comes_back_as_a_verdict(tmp_path):
    """Distinct answers only, without names; a person likes the longer one."""
    questions, results = of_sums(0.0, 1.0, prompts=3)
    results["c"] = answered("c", ["5", "no idea", "5"], questions)
    path = tmp_path / "to_rank.jsonl"
    answers.write_to_rank(path, results)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["responses"] for row in rows] == [["no idea", "5"]] * 3
    assert rows[0]["prompt"] == [user(questions[0].turns[0])] and len(rows[0]) == 2
    for row in rows:
        row["ranks"] = [1 + (len(text) < 3) for text in row["responses"]]
        row["annotator"] = "Ann"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary, games, points = judged(configured("people", rankings=[str(path)]), questions, results)
    longer = [(1 + np.sign(len(g.second.answer) - len(g.first.answer))) / 2 for g in games]
    assert points == longer and 0.5 in points and summary["not_judged"] == 0


def test_empty_answers_are_not_ranked_and_spaces_make_no_other_answer(tmp_path):
    """The reader of rankings refuses an empty response, and with it all that people ranked."""
    questions, _ = of_sums(prompts=2)
    texts = {"a": ["", "5 "], "b": ["5", "5"], "c": ["6", " 7"]}
    results = {name: answered(name, of, questions) for name, of in texts.items()}
    path = tmp_path / "to_rank.jsonl"
    answers.write_to_rank(path, results)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["responses"] for row in rows] == [["5", "6"], ["5", "7"]]
    path.write_text("".join(json.dumps(row | {"ranks": [1, 2]}) + "\n" for row in rows))
    summary, _, points = judged(configured("people", rankings=[str(path)]), questions, results)
    assert points == [None, 0.5, None, 0.0, 0.0, 0.0] and summary["not_judged"] == 2


def test_an_endpoint_judges_the_second_against_the_first_and_its_cost_is_counted(serve, tmp_path):
    questions, results = of_sums(0.0, 1.0, prompts=12)
    url, seen = serve(lambda a, b: "[[A]]" if a == "5" else "[[B]]")
    how = dict(judge_url=url, judge_model="m", output_dir=str(tmp_path), judge_prices=[10.0, 100.0])
    summary, _, points = judged(configured("endpoint", **how), questions, results)
    assert points == [1.0] * 12 and len(seen) == 24
    assert summary["orders_agree"] == 1 and summary["asked_now"] == 24
    assert summary["cost"] == pytest.approx((2400 * 10 + 24 * 7 * 100) / 1e6)
    again, _, _ = judged(configured("endpoint", **how), questions, results)
    assert len(seen) == 24 and again["asked_now"] == 0 and again["cost"] == summary["cost"]
    assert "cost 0.0408; 0 replies now" in win_rate.as_text(again)


def test_what_an_endpoint_refuses_is_left_out_and_told(serve, tmp_path):
    questions, results = of_sums(0.0, 1.0, prompts=4)
    results["a"][2][0] = answered("a", ["9" * 500] * 4, questions)[2][0]
    url, _ = serve(lambda a, b: (400, {}) if "9" * 500 in (a, b) else "[[C]]")
    how = dict(judge_url=url, judge_model="m", output_dir=str(tmp_path))
    summary, _, points = judged(configured("endpoint", **how), questions, results)
    assert points == [0.5, 0.5, None, 0.5] and summary["not_judged"] == 1
    assert "2 questions: judge http" in win_rate.as_text(summary)


def test_settings_that_the_judge_does_not_read_are_refused(policy):
    flags = "--judge people --rankings r.jsonl --tie_margin 1 --judge_model m --judge_timeout 3"
    flags += " --judge_parallel 2 --judge_prices 1 2 --judge_options {} --reward_function_timeout 9"
    message = problems_of("--checkpoints", policy, policy, *flags.split(), of=WinRateConfig)
    for name in ("model", "timeout", "parallel", "prices", "options"):
        assert f"judge_{name}=" in message, name
    assert message.count("is read only with --judge endpoint") == 5
    assert "only with --judge reward_function" in message and "judge=people gives none" in message


def test_files_and_tables_show_text_as_text(tmp_path):
    questions, results = of_sums(0.2, 0.9)
    nasty = "out/\u202e$x_1$<b>\x1b[2J"
    results = {"a": results["a"], nasty: answered(nasty, ["5"] * 60, questions)}
    summary, games, points = judged(configured(), questions, results)
    win_rate.write(tmp_path, summary, questions, games, points)
    assert json.loads((tmp_path / "win_rate.json").read_text()) == json.loads(json.dumps(summary))
    assert (tmp_path / "win_rate.png").stat().st_size > 5000
    lines = (tmp_path / "games.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 60 and first["where"] == "file:0" and first["second"] == nasty
    assert [json.loads(x)["points_of_second"] for x in lines] == points
    text = win_rate.as_text(summary)
    assert "\x1b" not in text and "\u202e" not in text and "\\x1b[2J" in text


def test_every_problem_is_in_one_message(tmp_path, policy):
    message = problems_of(
        *f"--checkpoints {policy} --answers no.jsonl --judge endpoint --judge_prices 1".split(),
        *f"--reward_model {policy} --judge_options [1] --tie_margin -1".split(),
        *f"--alpaca_eval_output {tmp_path}".split(),
        of=WinRateConfig,
    )
    for part in (
        "checkpoints names one",
        "needs --judge_url",
        "needs --judge_model",
        "needs --output_dir",
        "two numbers",
        "leave out it or --answers",
        "answers: 'no.jsonl' does not exist",
        "reward_model=",
        "not a JSON object; set --judge_options",
        "tie_margin=-1",
    ):
        assert part in message


def test_the_program_reads_the_answers_it_wrote(policy, tmp_path, monkeypatch, capsys):
    """Greedy answers of a checkpoint and of itself in another folder: ties throughout."""
    other = tmp_path / "same"
    other.symlink_to(policy)
    prompts = tmp_path / "held_out.jsonl"
    rows = [SUM | {"prompt": f"What is {n} + 3?"} for n in range(6)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["win_rate.py", "--checkpoints", policy, str(other), "--prompts", str(prompts)]
    flags += ["--dtype", "fp32", "--max_new_tokens", "5", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", flags)
    win_rate.main()
    first = json.loads((tmp_path / "out/win_rate.json").read_text())
    assert first["pairs"][0]["tie"][0] == 1 and first["pairs"][0]["better"] is None
    said = capsys.readouterr().out
    assert "not told apart" in said and "6 pairs of answers judged by verifier" in said
    answers = str(tmp_path / "out/answers.jsonl")
    monkeypatch.setattr("sys.argv", [*flags, "--answers", answers])
    monkeypatch.setattr(win_rate.prompt_eval, "answer_all", None)
    win_rate.main()
    again = json.loads((tmp_path / "out/win_rate.json").read_text())
    assert again["settings"] == {"answers": answers, "prompts": [str(prompts)]}, "not how to sample"
    assert again | {"settings": first["settings"]} == first
    prompts.write_text(json.dumps(rows[0] | {"prompt": "Another?"}) + "\n")
    with pytest.raises(DataError, match=r"holds no answer of(?s:.*)turn 1 of .*held_out.jsonl:1"):
        win_rate.main()
    prompts.write_text('{"prompt": "No task."}\n')
    with pytest.raises(SystemExit, match="judge=verifier: .*:1 is no task"):
        win_rate.main()


def test_lengths_are_taken_off():
    """b wins only where it is longer, and it mostly is."""
    generator = np.random.default_rng(0)
    questions = [Question((), (str(n),), f"f:{n}", SUM) for n in range(400)]
    longer = generator.normal(60, 60, 400).round().astype(int)
    results = {
        "a": answered("a", ["x" * 300] * 400, questions),
        "b": answered("b", ["x" * (300 + n) for n in longer], questions),
    }
    won = generator.random(400) < 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))
    games = win_rate.games_of(results)
    summary = win_rate.summarised(configured(), results, games, won.astype(float).tolist(), {})
    (pair,) = summary["pairs"]
    assert pair["better"] == "b" and pair["longer_by"] == pytest.approx(longer.mean())
    assert pair["length_controlled"][1] < 0.5 < pair["length_controlled"][2]
    assert not math.isnan(pair["length_controlled"][0])
