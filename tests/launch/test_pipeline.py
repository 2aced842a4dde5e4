"""Which programs run_all.sh starts for methods and rounds, on what; nothing is started."""

import dataclasses
from pathlib import Path

import pytest

import run_all
from evaluation.methods import MethodsConfig
from pipeline import ALL, FAMILIES, METHODS, OF_STEP_3, Plan, paths_made
from step2_reward.collect import CollectConfig
from step3_ppo.algorithm import ALGORITHMS
from step3_ppo.config import PPOConfig
from step3_preference.config import PreferenceConfig
from step3_preference.losses import LOSSES
from utils.settings import command_line, files

REAL = ["scratch", "--sft_data", "s.jsonl", "--preference_data", "p.jsonl"]
BY_FUNCTION = ["--labeller", "reward_function", "--collect.reward_function", "f.py:g"]

BY_JUDGE = ["--labeller", "judge", "--collect.judge_url", "http://localhost:1/v1"]
BY_JUDGE += ["--collect.judge_name", "m"]


def stages(*words) -> list:
    return run_all.Job([*map(str, words), "--output_dir", "out"]).all_stages()


def of(found, script: str) -> list[dict]:
    """The flags of a program's starts, as text."""
    shown = {Path: str, list: lambda x: " ".join(map(str, x))}
    return [
        {n: shown.get(type(v), str)(v).replace("out/", "") for n, v in s.flags.items()}
        | {"method": s.method}
        for s in found
        if s.script == script
    ]


def test_every_algorithm_and_loss_is_a_method_that_reads_what_there_is():
    of_step = {step: {m.name for m in METHODS.values() if m.step == step} for step in ("ppo",)}
    assert set(ALGORITHMS) <= of_step["ppo"]
    for name, entry in ALGORITHMS.items():
        families = METHODS[name].families
        assert ("critic_free" in families, "groups" in families) == (not entry.critic, entry.groups)
    losses = {m.name: m for m in METHODS.values() if m.step == "preference"}
    assert set(LOSSES) == set(losses)
    for name, entry in LOSSES.items():
        assert ("no_reference" in losses[name].families) == (not entry.reads_reference), name
    assert set(ALL) <= set(METHODS)
    sections = {section for m in METHODS.values() for n in (1, 2) for section in m.sections(n)}
    assert sections <= {*files.SECTIONS, *METHODS, *FAMILIES}
    assert not {*METHODS, *FAMILIES} & set(files.SECTIONS) - {"ppo"}


def test_a_section_of_no_method_is_refused(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("methods:\n  gpro:\n    kl_coef: 0.2\n")
    with pytest.raises(SystemExit):
        run_all.Job(["tiny", "--config", str(file), "--output_dir", "out"])
    assert "methods.gpro is no method; there are " in capsys.readouterr().err


def test_flags_of_sampling_go_to_step_3_alone():
    words = ["--rollout_engine", "vllm", "--vllm_python", "bin/python", "--method", "grpo", "dpo"]
    job = run_all.Job(["tiny", *words, "--output_dir", "out"])
    given = {"--rollout_engine", "--vllm_python"}
    step_3 = {s.script for s in job.all_stages() if given & set(job.words_for(s))}
    assert step_3 == {"step3_ppo/main.py"}
    assert set(OF_STEP_3) <= {f.name for f in dataclasses.fields(PPOConfig)}


def test_methods_share_sft_and_reward_model_and_are_compared():
    found = stages("tiny", "--method", "grpo", "dpo", "simpo", "best_of_n", "--rounds", 1)
    assert [(s.method, s.sections[-1]) for s in found] == [
        ("", "sft"),
        ("", "collect"),
        ("", "reward"),
        ("grpo", "grpo"),
        ("dpo", "dpo"),
        ("simpo", "simpo"),
        ("best_of_n", "collect"),
        ("best_of_n", "best_of_n"),
        ("", "collect"),
    ]
    (ppo,) = of(found, "step3_ppo/main.py")
    assert ppo["algorithm"] == "grpo" and ppo["reward_model"] == "step2_reward"
    dpo, simpo = of(found, "step3_preference/main.py")
    assert dpo["reference_model"] == "step1_sft" and "reference_model" not in simpo
    assert dpo["preference_data"] == "data/comparisons_1.jsonl"
    assert {s["prompt_data"] for s in (dpo, simpo)} == {"data/prompts.jsonl"}, "for the verifier"
    _, best = of(found, "step1_sft/main.py")
    assert best["sft_data"] == "data/best_1.jsonl" and best["output_dir"] == "step3_best_of_n"
    assert best["model_name_or_path"] == "step1_sft", "from the policy, not from the base model"
    (compared,) = of(found, "evaluation/methods.py")
    assert compared["policies"].split() == [
        "sft=step1_sft",
        "grpo=step3_grpo/actor",
        "dpo=step3_dpo",
        "simpo=step3_simpo",
        "best_of_n=step3_best_of_n",
    ]
    assert compared["held_out_data"] == "data/held_out.jsonl" and "prompt_data" not in compared


def test_functions_alone_need_no_comparisons_and_no_reward_model():
    found = stages("calculator", "--method", "grpo", "ppo")
    assert [s.sections[0] for s in found] == ["sft", "ppo", "ppo"]
    for flags in of(found, "step3_ppo/main.py"):
        assert flags["prompt_data"] == "data/prompts.jsonl"
        assert not flags.keys() & {"reward_model", "preference_data"}
    own = ["scratch", "--sft_data", "s.jsonl", "--prompt_data", "p.jsonl"]
    found = stages(*own, "--scored_by", "reward_function", "--method", "rloo")
    (flags,) = of(found, "step3_ppo/main.py")
    assert flags["prompt_data"] == "p.jsonl" and flags["reference_model"] == "step1_sft"
    assert len(found) == 2


def test_ppo_alone_has_the_summary_of_before_and_after():
    assert not of(stages("tiny"), "evaluation/methods.py")


def test_rounds_on_real_data_go_on_from_the_policy_and_its_own_answers():
    found = stages(*REAL, "--method", "dpo", "kto", "--rounds", 3, "--round_prompts", "disjoint")
    asked = of(found, "step2_reward/collect.py")
    assert [(a["method"], a["policy"], a["prompt_part"]) for a in asked] == [
        (m, f"round{n}/step3_{m}", f"{n}/2") for m in ("dpo", "kto") for n in (1, 2)
    ], "round 1 samples nothing, and no part of the prompts is left out for it"
    assert [a["round"] for a in asked] == ["2", "3"] * 2
    for a in asked:
        assert (a["labeller"], a["reward_model"]) == ("reward_model", "round1/step2_reward")
        assert a["prompt_data"] == "p.jsonl"
    dpo = [s for s in of(found, "step3_preference/main.py") if s["loss"] == "dpo"]
    assert [s["model_name_or_path"] for s in dpo] == [
        "step1_sft",
        "round1/step3_dpo",
        "round2/step3_dpo",
    ]
    assert [s["output_dir"] for s in dpo] == ["round1/step3_dpo", "round2/step3_dpo", "step3_dpo"]
    assert {s["reference_model"] for s in dpo} == {"step1_sft"}
    files = ["p.jsonl", "data/comparisons_2_dpo.jsonl", "data/comparisons_3_dpo.jsonl"]
    assert [s["preference_data"].split() for s in dpo] == [files[:1], files[:2], files]
    assert not any("prompt_data" in s for s in dpo), "nobody would judge the answers"
    assert len(of(found, "step2_reward/main.py")) == 1, "one reward model for all rounds"
    (compared,) = of(found, "evaluation/methods.py")
    assert compared["prompt_data"] == "p.jsonl"


@pytest.mark.parametrize("share, weights", [(1, None), (0, None), (0.5, "0.5 0.5 1.0")])
def test_older_rounds_are_replayed_by_their_share(share, weights):
    found = stages(*REAL, "--method", "dpo", "--rounds", 3, "--replay_share", share)
    last = of(found, "step3_preference/main.py")[-1]
    newest = "data/comparisons_3_dpo.jsonl"
    both = last["preference_data"].split()
    assert both == [newest] if share == 0 else len(both) == 3 and both[-1] == newest
    assert last.get("data_weights") == weights
    first = of(found, "step3_preference/main.py")[0]
    assert first["preference_data"] == "p.jsonl" and "data_weights" not in first


def test_each_method_of_rollouts_has_reward_models_of_its_own_in_later_rounds():
    found = stages("tiny", "--method", "ppo", "rloo", "--rounds", 2)
    made = [s["output_dir"] for s in of(found, "step2_reward/main.py")]
    assert made == ["round1/step2_reward", "step2_reward", "step2_reward_rloo"]
    used = [(s["algorithm"], s["reward_model"]) for s in of(found, "step3_ppo/main.py")]
    assert used == [
        ("ppo", "round1/step2_reward"),
        ("ppo", "step2_reward"),
        ("rloo", "round1/step2_reward"),
        ("rloo", "step2_reward_rloo"),
    ]
    outputs = [s.flags.get("output_file", s.flags.get("output_dir")) for s in found]
    assert len(set(outputs)) == len(outputs), "two stages write to one place"


def test_settings_reach_the_stages_that_read_their_section():
    words = (
        "--preference.epochs 2 --dpo.beta 0.2 --kto.beta 0.3 --later_preference.epochs 1".split()
    )
    job = run_all.Job(["tiny", "--method", "dpo", "kto", "ppo", "--output_dir", "out", *words])

    def given(stage) -> tuple:
        """(config files with their sections, the last value of each flag)"""
        words = job.words_for(stage)
        values = {w[2:]: v for w, v in zip(words, words[1:], strict=False) if w.startswith("--")}
        return Path(values["config"]).name, values.get("epochs"), values.get("beta")

    found = [given(s) for s in job.plan.stages() if s.method and s.sections[0] != "collect"]
    assert found == [
        ("tiny.yaml:methods.dpo", "2", "0.2"),
        ("tiny.yaml:methods.dpo:later_preference", "1", "0.2"),
        ("tiny.yaml:methods.kto", "2", "0.3"),
        ("tiny.yaml:methods.kto:later_preference", "1", "0.3"),
        ("tiny.yaml", None, None),
        ("tiny.yaml", None, None),  # the reward model
        ("tiny.yaml:later_ppo", None, None),
    ]


def configs_of(*words) -> list[tuple[str, object]]:
    """(script, its settings) of each stage that collects, compares or trains on preferences."""
    classes = {
        "step2_reward/collect.py": CollectConfig,
        "step3_preference/main.py": PreferenceConfig,
        "evaluation/methods.py": MethodsConfig,
    }
    job = run_all.Job([*words, "--output_dir", "out"])
    return [
        (s.script, command_line.build(classes[s.script], job.words_for(s), 1))
        for s in job.all_stages()
        if s.script in classes
    ]


@pytest.mark.parametrize("by", [BY_FUNCTION, BY_JUDGE], ids=lambda by: by[1])
def test_a_labellers_settings_suit_every_stage_that_reads_them(by):
    found = configs_of(*REAL, *by, "--method", "best_of_n", "--rounds", "2")
    assert [c.labeller for _, c in found] == [by[1]] * 3


@pytest.mark.parametrize("recipe", ["tiny", "scratch", "qwen2.5-0.5b", "7b-zero3"])
def test_no_round_holds_out_what_an_earlier_one_trained_on(recipe):
    """Nor a single prompt of the new answers: collect.py has left out what its own share is."""
    data = [] if recipe == "tiny" else REAL[1:]
    shares = {}
    for script, config in configs_of(recipe, *data, "--method", "dpo", "--rounds", "2"):
        shares.setdefault(script, set()).add(config.eval_fraction)
    (collected,), (trained,) = (
        shares[script] for script in ("step2_reward/collect.py", "step3_preference/main.py")
    )
    assert trained > collected


@pytest.mark.parametrize(
    "words, message",
    [
        (["tiny", "--dpo.beta", 1], "--dpo.beta: no step of this run reads dpo"),
        ([*REAL, "--collect.num_prompts", 9], "no step of this run reads collect"),
        (["tiny", "--method", "dpo", "nope"], "no method is called nope; there are all, or"),
        (["tiny", "--method", "dpo", "dpo"], "a method stands there twice"),
        ([*REAL, "--rounds", 2], "which the old one cannot label"),
        ([*REAL, "--labeller", "verifier"], "judges the embedded task only"),
        ([*REAL, "--labeller", "reward_function"], "ranks new answers, and rounds=1"),
        (["calculator", "--method", "grpo", "dpo"], "and dpo learn from collected answers"),
        (["calculator", "--rounds", 2], "for which rounds=2 is; leave out --rounds"),
        (["calculator", "--replay_share", 0.5], "leave out --replay_share"),
        (["calculator", "--round_prompts", "disjoint"], "leave out --round_prompts"),
        (
            ["scratch", "--sft_data", "a", "--scored_by", "reward_function"],
            "this recipe needs --prompt_data",
        ),
        (["tiny", "--rounds", 1, "--replay_share", 0.5], "replay_share=0.5 is read only with"),
        (["tiny", "--replay_share", 1.5], "must be at most 1"),
        (["scratch", "--sft_data", "a"], "this recipe needs --preference_data"),
    ],
)
def test_what_a_run_would_pass_over_is_refused(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        stages(*words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("rounds", [1, 2])
def test_overwrite_takes_what_methods_made_and_leaves_a_users_data(tmp_path, rounds):
    words = [*REAL, *BY_FUNCTION, "--rounds", str(rounds), "--method", *METHODS]
    job = run_all.Job([*words, "--output_dir", str(tmp_path)])
    (tmp_path / "data").mkdir()
    flags = [stage.flags for stage in job.all_stages()]
    made = {Path(given.get("output_file", given.get("output_dir"))) for given in flags}
    # Of what stands in the folder of a round, that folder.
    made = {p.parent if p.parent.name.startswith("round") else p for p in made}
    names = "data/own.jsonl step3_notes round round2_notes".split()
    mine = {tmp_path, *(tmp_path / name for name in names)}
    found = set(paths_made(tmp_path, embedded=False))
    for path in (made | mine) - found - {tmp_path}:
        path.touch()  # those below data/, and rounds, are found once they are there
    found = set(paths_made(tmp_path, embedded=False))
    assert made <= found and not mine & found and tmp_path / "data" not in found
    assert isinstance(job.plan, Plan) and tmp_path / "data" in paths_made(tmp_path, embedded=True)
