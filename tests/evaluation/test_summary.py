"""The closing table says what each uncertainty is of, and pairs what was asked twice."""

import json
import math

import pytest

from evaluation import summary
from step2_reward import main as step2  # noqa: F401  its metrics
from step3_ppo import main as step3
from tests.helpers import run_folders
from tests.helpers.known_metrics import KnownMetrics
from utils import metrics
from utils.report import standard_error

BEFORE, AFTER = [-6.0, 2.0, 9.0, 3.0], [-5.0, 4.0, 10.0, 5.0]


def by_hand(values) -> float:
    """√(Σ (x − mean)² / (n − 1) / n)"""
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))


def test_standard_error_by_hand_and_of_what_has_none():
    assert standard_error(BEFORE) == pytest.approx(by_hand(BEFORE))
    assert standard_error([3.0]) is None and standard_error([]) is None
    assert standard_error([1.0, math.nan]) is None and standard_error([1.0, math.inf]) is None


@pytest.fixture
def result():
    """result.json of a step 3 whose held-out prompts scored BEFORE and AFTER."""
    metrics = [
        {"eval/score": sum(s) / 4, "eval/kl": kl, "eval/kl_k3": kl, "eval/response_length": 9.0}
        | {"eval/eos_share": 1.0}
        for s, kl in ((BEFORE, 0.0), (AFTER, 0.9))
    ]
    return step3.result_of(*metrics, {"scores_before": BEFORE, "scores_after": AFTER})


def test_the_change_of_the_score_is_paired_by_prompt(result):
    gained = [1.0, 2.0, 1.0, 2.0]
    assert result["score_se_change"] == pytest.approx(by_hand(gained))
    assert result["score_se_before"] == pytest.approx(by_hand(BEFORE))
    assert result["score_se_change"] < 0.1 * result["score_se_before"], "as if unpaired"


def test_the_verifier_is_paired_with_the_sft_policys_answers(tmp_path, monkeypatch):
    said = {"step1_sft": [0.0, 1.0, 0.0, 1.0], "actor": [1.0, 1.0, 0.0, 1.0]}
    for folder in ("step1_sft", "step3_ppo/actor"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(summary, "verdicts", lambda folder, rows, seed: said[folder.name])
    found = summary.verified(tmp_path, [{}] * 4, seed=1)
    assert found["sft"] == 0.5 and found["ppo"] == 0.75 and "ppo_ema" not in found
    assert found["ppo_se_change"] == pytest.approx(by_hand([1.0, 0.0, 0.0, 0.0]))
    assert found["sft_se"] == pytest.approx(by_hand(said["step1_sft"]))


def test_closing_table_says_what_each_number_is(result):
    verifier = {"prompts": 512, "sft": 0.4, "sft_se": 0.02, "ppo": 0.7, "ppo_se": 0.01}
    reward = {"accuracy": 0.9, "accuracy_low": 0.85, "accuracy_high": 0.94, "accuracy_before": 0.5}
    lines = summary.closing_table(
        {
            "sft": {"eval_loss_before": 6.0, "eval_loss_after": 0.7},
            "reward": reward | {"accuracy_longer_answer": 0.3},
            "ppo": result | {"kl": result["kl_after"]},
            "verifier": verifier | {"ppo_se_change": 0.015},
            "seconds": {"sft": 1.0},
        }
    ).splitlines()
    assert lines[0].split() == ["measure", "before", "after", "change"]
    score = next(line for line in lines if line.startswith("PPO score, 4 held-out prompts"))
    before, change = by_hand(BEFORE), by_hand([1.0, 2.0, 1.0, 2.0])
    assert f"2.000 ± {before:.3f}" in score and score.endswith(f"+1.500 ± {change:.3f}")
    verdict = next(line for line in lines if line.startswith("verifier, 512 held-out prompts"))
    cells = [cell.strip() for cell in verdict.split("  ") if cell.strip()]
    assert cells[1:] == ["0.400 ± 0.020", "0.700 ± 0.010", "+0.300 ± 0.015"]
    assert "0.900 (0.850 to 0.940)" in "".join(lines) and "std" not in "".join(lines)
    assert "95 % interval, by prompt. ±: one standard error" in lines[-2]


def test_without_a_reward_model_the_table_shows_what_step_3_measured(result, tmp_path):
    for name, score in (("grpo", 5.0), ("rloo", 3.0)):
        (tmp_path / f"step3_{name}").mkdir()
        own = json.dumps(result | {"score_after": score, "eos_share_after": 0.25})
        (tmp_path / f"step3_{name}/result.json").write_text(own)
    (tmp_path / "step1_sft").mkdir()
    losses = json.dumps({"eval_loss_before": 6.0, "eval_loss_after": 0.7})
    (tmp_path / "step1_sft/result.json").write_text(losses)
    seconds = {"shared": 10.0, "grpo": 2.0}
    found = summary.summarise_without_reward_model(tmp_path, ["grpo", "rloo"], seconds)
    shown, names = summary.closing_table_of_methods(found), ("sft ", "grpo ", "rloo ")
    first, grpo, rloo = (next(x for x in shown.splitlines() if x.startswith(n)) for n in names)
    assert first.split()[1:4] == ["2.000", "±", f"{by_hand(BEFORE):.3f}"] and "1.000" in first
    assert grpo.split()[1:4] == ["5.000", "±", f"{by_hand(AFTER):.3f}"] and "0.250" in grpo
    change = by_hand([1.0, 2.0, 1.0, 2.0])
    assert grpo.split()[4:7] == ["+3.000", "±", f"{change:.3f}"] and "+1.000 ±" in rloo
    assert "share of right answers" in shown and "reward accuracy" not in shown


def test_each_part_of_a_summed_reward_is_in_the_table_and_the_file(tmp_path, monkeypatch):
    score = {"score": (1.0, 4.5), "score_function": (0.5, 3.0)}
    folder = run_folders.ppo(tmp_path / "step3_ppo", **score)
    run_folders.ppo(tmp_path / "step3_grpo")  # by a reward model alone
    run_folders.reconfigure(folder, reward_model="r", reward_function=["f.py:brevity"])
    monkeypatch.setattr(summary, "summarise_methods", lambda *given: {"methods": {}})
    monkeypatch.setattr(summary, "closing_table_of_methods", lambda found: "table\n")
    monkeypatch.setattr(summary, "plot", lambda *given: None)
    words = ["--output_dir", str(tmp_path), "--reward", "r", "--methods", "ppo", "grpo"]
    monkeypatch.setattr("sys.argv", ["summary", *words])
    summary.main()
    found = json.loads((tmp_path / "summary.json").read_text())
    parts = {"reward model": (0.5, 1.5), "reward function brevity": (0.5, 3.0)}
    rows = {name: {"before": a, "after": b} for name, (a, b) in parts.items()}
    assert found["parts"] == {"ppo": rows}
    lines = summary.table_of(found).splitlines()
    assert lines[-2].split() == ["ppo", "reward", "model", "0.500", "1.500", "+1.000"]
    assert lines[-1].split() == ["ppo", "reward", "function", "brevity", "0.500", "3.000", "+2.500"]
    page = (tmp_path / "report.html").read_text()
    assert lines[-1] in page and "Of it: reward model 0.500 → 1.500" in page


def test_other_methods_seconds_are_not_ppos(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(summary, "summarise", lambda *given: told.append(given[-1]) or {})
    monkeypatch.setattr(summary, "closing_table", lambda found: "")
    monkeypatch.setattr(summary, "plot", lambda *given: None)
    words = ["--output_dir", str(tmp_path), "--reward", "r", "--seconds", "shared=9", "ppo=2"]
    monkeypatch.setattr("sys.argv", ["summary", *words, "dpo=700"])
    run_folders.ppo(tmp_path / "step3_ppo")
    summary.main()
    assert told == [11.0]
    assert "verifier rose" in (tmp_path / "report.html").read_text(), "the run's page is made too"


def test_curves_and_results_are_of_metrics_in_the_table(tmp_path, monkeypatch):
    names = ("loss", "score", "eval/score", "eval/verifier", "kl_k1", "kl_k2", "kl_k3")
    steps = [KnownMetrics({"step": n} | dict.fromkeys(names, 0.5)) for n in (1, 2)]
    monkeypatch.setattr(metrics, "TABLE", metrics.TABLE | {"every line": {"step": None}})
    monkeypatch.setattr(summary, "read_metrics", lambda folder: steps)
    summary.plot(tmp_path, tmp_path, {"ppo": tmp_path, "grpo": tmp_path})
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    # result.json says what an evaluation measured before and after.
    read = {*summary.TAKEN["ppo"], *summary.RENAMED["ppo"].values()}
    read -= {"held_out_prompts", "score_se_before", "score_se_after", "score_se_change"}
    metrics.check("eval/" + n.removesuffix("_before").removesuffix("_after") for n in read)
    ends = ("_before", "_after")
    metrics.check(f"eval/{n.removesuffix('_before')}" for n in summary.TAKEN["reward"])
    assert all(n.endswith(ends) for n in read)
