"""The report card: shares by counting, effects that were put in, every pair's text, the program."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from evaluation import reward_card, reward_report
from evaluation.reward_card import FEATURES, Pair
from evaluation.reward_report import RewardReportConfig
from tests.helpers import evaluated_models
from tests.helpers.evaluated_models import blocks_of, problems_of
from utils.confidence import interval_by_prompt
from utils.data.comparisons import Comparison, Ranked
from utils.data.rows import DataError
from utils.models import scorer

policy, reward_model = evaluated_models.policy, evaluated_models.reward_model
NASTY = "```\n<script>x</script>\x1b[2J\u202egnp"


def compared(texts, labels, n: int, prompt: str = "") -> tuple[Comparison, Ranked]:
    prompt = prompt or f"Question {n}?"
    row = Comparison(
        ({"role": "user", "content": prompt},), tuple(texts), tuple(labels), f"file:{n}"
    )
    ids = [list(range(len(text))) for text in texts]
    return row, Ranked(ids, list(labels), [len(text) for text in texts], float(n))


def report_of(compared, scores, categories=None, **more):
    rows, ranked = zip(*compared, strict=True)
    categories = categories or [None] * len(rows)
    return reward_card.report_of(list(rows), list(ranked), scores, categories, **more)


def test_accuracy_is_counted_by_gap_length_and_category():
    """Pairs of gap 1 are right on 8 of 10, those of gap 4 always; category a is the first half."""
    data, scores, categories = [], [], []
    for n in range(40):
        gap = 1.0 if n % 2 else 4.0
        texts = ("x" * (10 + n), "y" * 20)
        data.append(compared(texts, (gap, 0.0), n))
        wrong = n % 2 and n in (1, 11, 21, 31)
        scores.append([-1.0, 2.0] if wrong else [1.0, 0.5])
        categories.append("a" if n < 20 else None)
    report = report_of(data, scores, categories)
    assert report["overall"]["accuracy"] == 36 / 40 and report["overall"]["pairs"] == 40
    assert report["overall"]["accuracy_longer_answer"] == (29 + 0.5) / 40
    by_gap = report["by difference of the labels"]
    assert {name: part["accuracy"][0] for name, part in by_gap.items()} == {
        "1 to 1": 0.8,
        "4 to 4": 1.0,
    }
    (part,) = report["by category"].values()
    right = np.array([n not in (1, 11) for n in range(20)], float)
    assert part["accuracy"] == [18 / 20, *interval_by_prompt(right, np.arange(20))]
    lengths = report["by characters that the better answer is longer"]
    assert list(lengths) == ["-10 to -1", "0 to 9", "10 to 19", "20 to 29"]
    assert all(part["pairs"] == 10 and part["accuracy"][0] == 0.9 for part in lengths.values())


def test_parts_that_read_alike_are_one():
    """0.1 + 0.2 is not 0.3 to the last digit, and a name that stood twice would lose pairs."""
    values = np.repeat([0.3, 0.1 + 0.2, 0.6], [10, 10, 20])
    found = reward_card.by_quantile(values, np.ones(40), np.arange(40))
    assert {name: part["pairs"] for name, part in found.items()} == {
        "0.3 to 0.3": 20,
        "0.6 to 0.6": 20,
    }


def test_scores_that_are_no_numbers_and_prompts_that_are_refused_end_the_report(monkeypatch):
    scores = [[1.0, math.nan], [math.inf, 0.0]]
    monkeypatch.setattr(reward_report.scorer, "score_groups", lambda *_: scores)
    config = SimpleNamespace(micro_batch_size=1, micro_batch_tokens=0)
    with pytest.raises(SystemExit, match="gives 2 of 4 answers no finite score; set --dtype"):
        reward_report.scores_of(config, None, None, [])
    reader = SimpleNamespace(refusal=lambda prompt: "no system turn")
    with pytest.raises(DataError, match="file:3: no system turn"):
        reward_report.as_text_reads(reader, [compared(("a", "b"), (1.0, 0.0), 3)[0]])


def test_calibration_and_scores_and_the_worst_pairs():
    data = [compared((NASTY, "w"), (1.0, 0.0), n) for n in range(4)]
    scores = [[0.0, 3.0], [0.0, 1.0], [2.0, 1.0], [5.0, 0.0]]
    report = report_of(data, scores, worst=5, policies={"sft": [1.0, 2.0, 3.0]})
    assert [pair["margin"] for pair in report["most wrong"]] == [-3.0, -1.0], "right ones are not"
    assert [pair["where"] for pair in report["most wrong"]] == ["file:0", "file:1"]
    claims = [1 / (1 + math.exp(-abs(a - b))) for a, b in scores]
    right = [0.0, 0.0, 1.0, 1.0]
    # In order of their margins; the parts hold one pair each.
    expected = sum(abs(c - r) for c, r in zip(claims, right, strict=True)) / 4
    assert report["calibration"]["expected_error"] == pytest.approx(expected)
    assert report["scores"]["chosen"]["mean"] == 7 / 4
    assert report["scores"]["rejected"]["p50"] == 1.0
    assert report["scores"]["sft"]["answers"] == 3 and report["scores"]["sft"]["p50"] == 2.0
    page = reward_card.as_markdown(report, "a title")
    inside, _ = blocks_of(page)
    assert inside.count(NASTY.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")) == 2
    assert "\x1b" not in page and "\u202e" not in page


def test_what_the_model_pays_for_beyond_the_labels_is_found():
    """Labels go by a list alone, the model's scores by length and a list; the difference of two
    Gumbel variables is logistic."""
    generator, data, scores = np.random.default_rng(0), [], []
    for n in range(400):
        texts, values, marks = [], [], []
        for _ in range(2):
            length, listed = generator.integers(2, 8), generator.random() < 0.5
            lines = ("- a word\n- another\n" if listed else "a word, another one") + "x" * 2**length
            texts.append(lines)
            marks.append(2.0 * listed + generator.gumbel())
            values.append(1.5 * math.log2(1 + len(lines)) + 2.0 * listed + generator.gumbel())
        data.append(compared(texts, marks, n, "What?"))
        scores.append(values)
    # Each a prompt of its own, by its number.
    report = report_of(data, scores)
    found = report["pays for"]
    assert set(found) == {"length, each doubling", "a list"}, "the others stood in no answer"
    length, listed = found.values()
    for who, effect, truth in (
        ("labels", length, 0.0),
        ("labels", listed, 2.0),
        ("model", length, 1.5),
        ("model", listed, 2.0),
    ):
        value, low, high = effect[who]
        # Three standard errors.
        assert abs(value - truth) < 0.75 * (high - low) < 1.0, (who, effect)
    assert length["model"][1] > 1.0 > length["labels"][2]
    text = reward_card.tables_of(report)
    assert "pays for" in text and "always the longer answer" in text


@pytest.mark.parametrize(
    "name, has, lacks",
    [
        ("a list", "So:\n1. one\n2) two", "1. one"),
        ("a list", "- a\n* b", "a - b\nc * d"),
        ("headings, bold or code", "# Title", "C# is"),
        ("headings, bold or code", "a **b**", "2 ** 3"),
        ("a refusal or apology", "I'm sorry, no.", "A sorry sight: I can."),
        ("a refusal or apology", "抱歉，我不知道。", "我知道。"),
        ("politeness", "Thank you!", "Thankless work"),
        ("politeness", "请坐", "坐下"),
    ],
)
def test_what_an_answer_has(name, has, lacks):
    assert FEATURES[name](has, "") == 1 and FEATURES[name](lacks, "") == 0


def test_lengths_and_languages_are_numbers():
    double = FEATURES["length, each doubling"]
    assert double("x" * 31, "") - double("x" * 15, "") == 1
    other = FEATURES["another language than the prompt's"]
    assert other("你好", "Say hello") == 1 and other("你好", "你好吗?") == 0
    assert other("12", "34") == 0


def test_a_ranking_is_all_its_pairs_and_a_second_model_is_compared():
    data = [compared(("a", "b", "c"), (2.0, 1.0, 1.0), n) for n in range(12)]
    rows = [row for row, _ in data]
    assert reward_card.pairs_of(rows[:1]) == [Pair(0, 0, 1), Pair(0, 0, 2)]
    scores = [[1.0, 0.0, 2.0]] * 12
    report = report_of(data, scores, second=[[3.0, 1.0, 1.0]] * 12)
    found = report["agreement"]
    assert found["pairs_alike"][0] == 0.5 and found["second"]["accuracy"][0] == 1.0
    assert found["correlation"] is None, "the second model's margins are all alike"
    assert "orders 0.500" in reward_card.tables_of(report)
    spread = report_of(data, scores, second=[[2.0, 0.0, 4.0]] * 12)["agreement"]
    assert spread["correlation"] == pytest.approx(1.0) and spread["pairs_alike"][0] == 1.0


def reward_bench(file, rows: int = 14) -> None:
    """In RewardBench's columns."""
    lines = [
        {"prompt": f"Q{n}?", "chosen": f"yes {n}", "chosen_model": "m", "rejected": "no " * n}
        | {"rejected_model": "k", "subset": ("refusals", "hep-cpp")[n % 2], "id": n}
        for n in range(1, rows + 1)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_program_reads_reward_bench_and_scores_as_the_model_does(
    policy, reward_model, tmp_path, monkeypatch, capsys
):
    from tests.evaluation.test_prompt_eval import scored_by_transformers

    file, out = tmp_path / "filtered.jsonl", tmp_path / "out"
    reward_bench(file)
    flags = ["--reward_model", reward_model, "--held_out_data", str(file), "--dtype", "fp32"]
    flags += ["--output_dir", str(out), "--second_reward_model", reward_model]
    flags += ["--policies", f"p={policy}", "--max_new_tokens", "4", "--packing", "off"]
    monkeypatch.setattr("sys.argv", ["reward_report.py", *flags])
    reward_report.main()
    report = json.loads((out / "reward_report.json").read_text())
    assert set(report["by category"]) == {"refusals", "hep-cpp"}
    assert report["agreement"]["pairs_alike"][0] == 1.0
    turns = [
        ({"role": "user", "content": f"Q{n}?"}, {"role": "assistant", "content": f"yes {n}"})
        for n in range(1, 15)
    ]
    expected = [scored_by_transformers(reward_model, talk, True) for talk in turns]
    found = [report["scores"]["chosen"][f"p{q}"] for q in reward_card.QUANTILES]
    assert found == pytest.approx(np.percentile(expected, reward_card.QUANTILES), abs=2e-4)
    assert report["scores"]["chosen"]["mean"] == pytest.approx(np.mean(expected), abs=2e-4)
    assert np.ptp(expected) > 0.05 and report["scores"]["p"]["answers"] == 14
    said = capsys.readouterr().out
    assert "14 comparisons; 0 left out" in said and "hep-cpp" in said
    assert (out / "reward_report.png").stat().st_size > 10_000
    assert "RewardBench" not in said
    monkeypatch.setattr("sys.argv", ["reward_report.py", *flags, "--category", "kind"])
    with pytest.raises(SystemExit, match="category='kind' is no column"):
        reward_report.main()


def test_what_step_2_holds_out_is_scored_to_the_same_numbers(
    chain, tiny, tmp_path, monkeypatch, capsys
):
    """By the config.yaml that step 2 has left: result.json's accuracy and interval."""
    folder = chain / "reward"
    flags = ["--config", str(folder / "config.yaml"), "--reward_model", str(folder)]
    monkeypatch.setattr("sys.argv", ["reward_report.py", *flags, "--output_dir", str(tmp_path)])
    reward_report.main()
    overall = json.loads((tmp_path / "reward_report.json").read_text())["overall"]
    result = json.loads((folder / "result.json").read_text())
    for name in ("accuracy", "accuracy_low", "accuracy_high", "accuracy_longer_answer", "pairs"):
        assert overall[name] == pytest.approx(result[name]), name
    assert "always the longer answer" in capsys.readouterr().out


def test_rows_are_cut_to_the_models_positions(reward_model, tmp_path, monkeypatch, capsys):
    file = tmp_path / "filtered.jsonl"
    file.write_text(
        "".join(
            json.dumps({"prompt": f"{n} is " * 2000, "chosen": f"yes {n}", "rejected": "no"}) + "\n"
            for n in range(3)
        )
    )
    flags = ["--reward_model", reward_model, "--held_out_data", str(file), "--dtype", "fp32"]
    flags += ["--output_dir", str(tmp_path), "--max_length", "4096"]
    monkeypatch.setattr("sys.argv", ["reward_report.py", *flags])
    lengths, group_scores = [], scorer.group_scores

    def measured(forward, groups, device):
        lengths.extend(len(ids) for group in groups for ids in group)
        return group_scores(forward, groups, device)

    monkeypatch.setattr(scorer, "group_scores", measured)
    reward_report.main()
    assert "max_length 4096 → 512, the reward model's positions" in capsys.readouterr().out
    assert len(lengths) == 6 and 500 < max(lengths) <= 512


def test_every_problem_is_in_one_message(policy):
    message = problems_of(
        "--reward_model", policy, "--worst", "-1", of=RewardReportConfig, world_size=2
    )
    for part in (
        "2 ranks; start one process",
        "no comparisons; set --preference_data or --held_out_data",
        "is a language model; set --reward_model",
        "worst=-1",
        "output_dir",
    ):
        assert part in message
