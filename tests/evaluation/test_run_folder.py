"""What a run has written is found in its order, also while it is being written."""

import json

import pytest

from evaluation import html_report, run_folder
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from tests.helpers import run_folders
from utils.errors import UserError
from utils.settings import command_line


def step(folder, config, metrics=()):
    folder.mkdir(parents=True)
    command_line.save(config, folder, 1)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))


def test_rounds_stand_in_the_order_of_the_run(tmp_path):
    step(tmp_path / "step1_sft", SFTConfig(), [{"step": 1, "seconds": 2.0}])
    for place in (tmp_path / "round1", tmp_path / "round10", tmp_path / "round2", tmp_path):
        step(place / "step2_reward", RewardConfig())
        run_folders.ppo(place / "step3_ppo")
    (tmp_path / "step3_other").mkdir()  # of no step
    run = run_folder.read(tmp_path)
    assert [s.title for s in run.steps] == [
        "step 1: SFT",
        *(
            f"step {what}, round {n}"
            for n in (1, 2, 3, 4)
            for what in ("2: reward model", "3: PPO")
        ),
    ]
    assert [s.folder for s in run.policies()] == [tmp_path / "step3_ppo"]
    assert run.seconds()["step 1: SFT"] == 2.0 and run.seconds()["step 3: PPO, round 1"] == 30.0


def test_the_reward_models_of_several_methods_are_told_apart(tmp_path):
    for name in ("step2_reward", "step2_reward_grpo", "step2_reward_rloo"):
        step(
            tmp_path / name,
            RewardConfig(),
            [{"step": n, "loss": 1.0, "seconds": 3.0} for n in (1, 2)],
        )
    step(tmp_path / "round1/step2_reward", RewardConfig())
    run = run_folder.read(tmp_path)
    assert [s.title for s in run.steps] == [
        "step 2: reward model, round 1",
        "step 2: reward model, round 2",
        "step 2: reward model for GRPO, round 2",
        "step 2: reward model for RLOO, round 2",
    ]
    assert sum(run.seconds().values()) == 18.0, "each one's are counted"
    (group,) = html_report.curves([run])
    for name in ("round 2", "grpo, round 2", "rloo, round 2"):
        assert f">{name}: loss<" in group["figures"][0][1]


def test_a_step_by_itself_and_a_folder_of_none(tmp_path):
    folder = run_folders.ppo(tmp_path / "mine")
    assert [s.title for s in run_folder.read(folder).steps] == ["step 3: PPO"]
    with pytest.raises(UserError, match="no step of a run has written there"):
        run_folder.read(tmp_path / "nowhere")
    assert not run_folder.is_run(tmp_path)


def test_half_a_line_of_metrics_is_not_read(tmp_path):
    folder = run_folders.ppo(tmp_path / "mine", finished=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "sco')
    (one,) = run_folder.read(folder).steps
    assert one.steps_done() == run_folders.ROLLOUTS and one.result == {}
    assert [step for step, _ in one.values("eval/score")] == [0, 4, 8, 12]
    assert one.values("score")[0] == (1, pytest.approx(4 / 12))


def test_settings_of_an_older_version_are_read_without_what_is_gone(tmp_path):
    folder = run_folders.ppo(tmp_path / "mine")
    with open(folder / "config.yaml", "a") as file:
        file.write("a_setting_of_old: 3\n")
    (one,) = run_folder.read(folder).steps
    names = {name for name, *_ in one.changed_settings()}
    assert names == {"output_dir", "model_name_or_path", "max_steps"}


def test_a_method_of_demonstrations_is_named_by_its_folder(tmp_path):
    step(tmp_path / "step3_best_of_n", SFTConfig())
    assert run_folder.read(tmp_path).steps[0].title == "step 3: BEST_OF_N"


def test_a_step_that_was_run_again_by_hand_differs_from_the_recipe(tmp_path):
    asked = {"recipe": "tiny", "configs": [], "flags": {"output_dir": [str(tmp_path)]}}
    (tmp_path / "run.json").write_text(json.dumps(asked))
    recipe = str(run_folder.RECIPES / "tiny.yaml")
    flags = ["--config", f"{recipe}:later_ppo", "--model_name_or_path", f"{tmp_path}/step1_sft"]
    flags += ["--reward_model", f"{tmp_path}/step2_reward", "--output_dir", str(tmp_path)]
    flags += ["--prompt_data", f"{tmp_path}/data/prompts.jsonl", "--seed", "7", "--kl_coef", "0"]
    config = command_line.build(PPOConfig, flags, 1)
    for place in ("round1", "."):
        (tmp_path / place / "step3_ppo").mkdir(parents=True)
        command_line.save(config, tmp_path / place / "step3_ppo", 1)
    run = run_folder.read(tmp_path)
    first, second = (run.differences(step) for step in run.steps)
    assert sorted(second) == [("kl_coef", 0.0, 0.1), ("seed", 7, 42)], "of later_ppo, all else"
    assert sorted(first) == sorted([*second, ("max_steps", 32, 25), ("eval_every", 8, 5)])
    asked["configs"] = ["gone.yaml"]
    (tmp_path / "run.json").write_text(json.dumps(asked))
    names = {name: other for name, _, other in run_folder.read(tmp_path).differences(run.steps[0])}
    assert names["kl_coef"] == PPOConfig().kl_coef, "by the defaults, where no recipe is there"


# Before and after: a reward model's mean, then those of two functions, without weights. `a` gives
# 0 before, so that what is left out where all scores are 0 is tried too.
MODEL, A, B = (1.0, 1.5), (0.0, 4.0), (2.0, 1.0)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"reward_model": "r"}, {}),
        ({"reward_function": ["f.py:a"]}, {}),
        (
            {"reward_model": "r", "reward_function": ["f.py:a"]},
            {"reward model": MODEL, "reward function a": A},
        ),
        (
            {"reward_model": "r", "reward_function": ["f.py:a"], "reward_weights": [0.5]},
            {"reward model": MODEL, "reward function a × 0.5": (0.0, 2.0)},
        ),
        (
            {"reward_function": ["f.py:a", "f.py:b"], "reward_weights": [1.0, -3.0]},
            {"reward function a": A, "reward function b × -3": (-6.0, -3.0)},
        ),
        (
            {"reward_model": "r", "reward_function": ["f.py:a"], "reward_url": "http://x"}
            | {"reward_weights": [0.5, 1.0], "reward_function_coef": 2.0},
            {"reward model": MODEL, "reward function a": A, "reward server × 2": (4.0, 2.0)},
        ),
    ],
)
def test_the_parts_of_a_reward_add_up_to_the_score(tmp_path, settings, expected):
    sources = len(settings.get("reward_function", [])) + ("reward_url" in settings)
    lines = [{"step": 1, "score": 99.0}]
    for n in (0, 1):
        parts = [value[n] for value in expected.values()]
        m = {"step": 2 * n, "eval/score": sum(parts) if parts else 7.0}
        if sources == 1 and parts and parts[-1]:
            m["eval/score_function"] = parts[-1]
        elif sources == 2:
            names = ("a", "url" if "reward_url" in settings else "b")
            m |= {f"eval/score_function/{k}": x[n] for k, x in zip(names, (A, B), strict=True)}
        lines.insert(2 * n, m)
    folder = run_folders.reconfigure(run_folders.ppo(tmp_path / "x"), **settings)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    found = run_folder.read_step(folder).parts()
    assert found == {name: pytest.approx(value) for name, value in expected.items()}
