"""A run's health in words: each kind of bad end has its name, a good one none of them."""

import json

import pytest

from evaluation import health, run_folder
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from tests.helpers import run_folders
from utils.settings import command_line


def told(folder):
    (step,) = run_folder.read(folder).steps
    return health.of_step(step)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", run_folders.KINDS)
def test_each_kind_of_end_is_named_in_the_first_line(tmp_path, kind):
    head, findings = told(run_folders.ppo(tmp_path / "x", **run_folders.KINDS[kind]))
    names = {"collapsed", "over-optimised", "never stops"}
    assert {name for name in names if name in head.name} == {kind} & names
    assert head.level == (health.GOOD if kind == "good" else health.BAD)
    said = {health.TELLS[f.name] for f in findings if f.name in health.TELLS}
    assert not said & {f.name.removeprefix("warning: ") for f in findings}, "once is enough"
    levels = [health.LEVELS.index(f.level) for f in findings]
    assert levels == sorted(levels), "the worst stands first"


def test_a_good_run_says_what_rose_with_its_error(tmp_path):
    head, findings = told(run_folders.ppo(tmp_path / "x"))
    assert head.name == "verifier rose, score rose"
    text = {f.name: f.text for f in findings}
    assert text["score rose"] == "Held-out score 0.000 → 4.000 (+4.000 ± 0.200)."
    assert "0.400 → 0.700" in text["verifier rose"]
    assert text["stops"].startswith("100% of the held-out answers end by themselves (before: 95%)")
    assert text["self-check"] == "All 1 checks passed."


@pytest.mark.parametrize("error, level", [(1.9, health.GOOD), (2.1, health.DOUBT)])
def test_a_change_within_two_standard_errors_is_no_rise(tmp_path, error, level):
    folder = run_folders.ppo(tmp_path / "x")
    change(folder / "result.json", score_se_change=error)
    (found,) = [f for f in told(folder)[1] if f.name.startswith("score")]
    assert found.level == level


def test_the_best_checkpoint_of_an_over_optimised_run(tmp_path):
    folder = run_folders.ppo(tmp_path / "x", verifier=(0.3, 0.3))
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[4]["eval/verifier"], lines[12]["eval/verifier"] = 0.8, 0.2
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (found,) = [f for f in told(folder)[1] if f.name == "over-optimised"]
    assert "Best after 4 (0.800)" in found.text


def test_a_policy_that_says_the_same_to_all_has_collapsed_whatever_its_entropy(tmp_path):
    folder = run_folders.ppo(tmp_path / "x")
    same = run_folders.answers(["fish", "fish", "fish", "a dog"], 1.0)
    other = run_folders.answers(["one", "a cat", "fish", "it rains"], 0.0)
    change(folder / "samples.json", after=same, before=other)
    assert "collapsed" in told(folder)[0].name
    change(folder / "samples.json", before=same)  # it has always said so
    assert "collapsed" not in told(folder)[0].name
    assert health.alike(["ab", "ab", "xyz"]) == pytest.approx(1 / 3) and health.alike(["a"]) == 0


def test_warnings_are_those_of_the_run_itself_with_the_rollout(tmp_path):
    folder = run_folders.ppo(tmp_path / "x", kl=(0.0, 24.0))
    (step,) = run_folder.read(folder).steps
    given, now = health.replayed(step)
    assert given["kl above its limit"] == 11 and "24.0 nats" in now["kl above its limit"]
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[12]["kl"] = 1.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    gone = [f.text for f in told(folder)[1] if f.name == "earlier warnings"]
    assert gone == ["Given, and over now: kl above its limit (rollout 11)"]


def test_a_running_step_is_no_fault_and_one_that_broke_off_is(tmp_path):
    folder = run_folders.ppo(tmp_path / "x", finished=False)
    head, _ = told(folder)
    assert head.level == health.GOOD and head.name.endswith("not over yet")
    with open(folder / "log.txt", "a") as file:
        file.write("RuntimeError: [enforce fail] out of memory\n")
    head, findings = told(folder)
    assert head.level == health.BAD and "broke off" in head.name
    assert "12 of 12 rollouts are recorded. RuntimeError" in findings[0].text


def test_a_finished_step_that_is_only_doubted_is_not_called_open(tmp_path):
    tmp_path.joinpath("s").mkdir()
    command_line.save(SFTConfig(), tmp_path / "s", 1)
    result = {"eval_loss_before": 0.07, "eval_loss_after": 0.1, "seconds": 60.0}
    (tmp_path / "s/result.json").write_text(json.dumps(result))
    assert told(tmp_path / "s")[0].name == "look at: overfitted"


def test_faults_and_doubts_of_the_self_check(tmp_path):
    folder = run_folders.ppo(tmp_path / "x")
    (folder / "log.txt").write_text("  passed  a: fine\n  DOUBT  data: 3 of them in both\n")
    assert "self-check: doubt" in told(folder)[0].name
    (folder / "log.txt").write_text("  FAULT  stop token: is never learned\n")
    head, findings = told(folder)
    assert "self-check: fault" in head.name and head.level == health.BAD
    (folder / "log.txt").unlink()
    assert "No log.txt" in "".join(f.text for f in told(folder)[1])


@pytest.mark.parametrize("low, level", [(0.71, health.GOOD), (0.69, health.BAD)])
def test_a_reward_model_must_be_better_than_the_longer_answer(tmp_path, low, level):
    (tmp_path / "r").mkdir()
    command_line.save(RewardConfig(), tmp_path / "r", 1)
    result = {"accuracy": 0.75, "accuracy_low": low, "accuracy_high": 0.8, "seconds": 60.0}
    (tmp_path / "r/result.json").write_text(json.dumps(result | {"accuracy_longer_answer": 0.7}))
    assert told(tmp_path / "r")[0].level == level


def scored_by_both(folder, function, **changed):
    """A run whose score is a reward model's, which moves by 1, and a function's."""
    score = {"score": (function[0], 1.0 + function[1]), "score_function": function}
    run_folders.ppo(folder, verifier=(0.6, 0.2), **score, **changed)
    run_folders.reconfigure(folder, reward_model="r", reward_function=["f.py:g"])
    return {f.name: f for f in told(folder)[1]}


@pytest.mark.parametrize("function, most", [((0, 9), "function g"), ((0, 0.5), "model")])
def test_the_part_of_the_reward_that_moved_is_named(tmp_path, function, most):
    found = scored_by_both(tmp_path / "x", function, response_length=(8.0, 4.0))
    text = found["over-optimised"].text
    assert f"The reward {most} made most of the score's change" in text
    assert f"shrink from 8.0 to 4.0 tokens: look at what the reward {most} pays for" in text
    assert "train less" not in text
    parts = f"Of it: reward model 0.000 → 1.000, reward function g 0.000 → {function[1]:.3f}."
    assert parts in found["score rose"].text


def test_nothing_is_green_of_a_policy_whose_answers_became_worse(tmp_path):
    found = scored_by_both(tmp_path / "x", (0, 9))
    assert found["score rose"].level == found["variety"].level == health.NOTE
    assert "train less" in found["over-optimised"].text, "the length tells nothing"


def test_an_empty_answer_that_scores_above_the_others_is_told(tmp_path):
    folder = run_folders.ppo(tmp_path / "x", verifier=(0.6, 0.2))
    for said, told_of in ((["a", "b", ""], True), (["", "b", "c"], False)):  # scores 0, 1, 2
        change(folder / "samples.json", before=[], after=run_folders.answers(said, 0.0))
        (found,) = [f for f in told(folder)[1] if f.name == "over-optimised"]
        assert ("An empty answer scores 2.00, others on average 0.50" in found.text) == told_of


def test_repetitions_are_not_mended_by_longer_answers(tmp_path):
    folder = run_folders.ppo(tmp_path / "x", eos_share=(0.9, 0.1))
    for text, broken in (("bird " * 20, True), ("one two three four five six seven eight", False)):
        change(folder / "samples.json", after=run_folders.answers([text] * 3, 0.0))
        (found,) = [f for f in told(folder)[1] if f.name == "never stops"]
        assert ("look at the reward" in found.text) == broken
        assert ("Raise it" in found.text) != broken
