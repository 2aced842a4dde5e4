"""The self-check of step 3: each planted fault is named by the check that is there for it."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from step3_ppo.checks import self_check
from step3_ppo.checks.probe import AFTER, AT_START, BEFORE
from tests.helpers.families import FAMILIES, write
from tests.helpers.jobs import ppo, reward
from tests.helpers.running import ROOT, built_once, run_ranks
from tests.helpers.small_models import config_of
from utils.data import chat_template

ANYTIME = BEFORE | AFTER
CHECKS = ANYTIME | AT_START
GENERATOR, PADDING = "generator equals model", "padding changes nothing"
DROPOUT, POLICY, KL = "dropout is off", "rollouts are on-policy", "KL 0 at the start"
SAMPLES, APART = "samples follow the policy", "ranks and rows draw apart"
STOP, LANGUAGE, REWARD, DATA = "stop token", "same language", "reward model", "data"
STEPPED, GRADIENTS = "generator equals the stepped model", "gradients"
AVERAGE, MOVE, REFERENCE = "average", "weights move", "reference at the temperature"
SCORES, ROLLOUT = "scores belong to their answers", "scores of the rollout"
ADVANTAGES = "advantages reach their tokens"
# fault: (the check that must name it, others that may: the fault breaks what they ask for too)
FAULTS = {
    "positions_shifted_while_decoding": (GENERATOR, {GENERATOR}),
    "mask_ignored": (PADDING, {POLICY, REFERENCE, SCORES}),
    "dropout_in_the_actor": (DROPOUT, {POLICY, GENERATOR, PADDING}),
    "dropout_in_the_critic": (DROPOUT, {POLICY, PADDING}),
    "pad_is_eos": (STOP, set()),
    "eos_outside_the_mask": (STOP, set()),
    "score_one_token_early": (STOP, set()),
    "cut_answers_called_finished": (STOP, set()),
    "other_stop_id_in_the_config": (STOP, set()),
    "prompts_without_assistant_header": (LANGUAGE, set()),
    "average_never_updated": (AVERAGE, set()),
    "average_is_a_copy": (AVERAGE, set()),
    "greedy_sampling": (SAMPLES, {APART}),
    "top_k_sampling": (SAMPLES, set()),
    "sampling_colder_than_scored": (SAMPLES, set()),
    "sampling_hotter_than_scored": (SAMPLES, set()),
    "rows_share_noise": (APART, {SAMPLES}),
    "reference_differs": (KL, set()),
    "values_read_one_token_late": (POLICY, set()),
    "layer_frozen_in_the_actor": (GRADIENTS, set()),
    "reference_takes_gradients": (GRADIENTS, set()),
    "reference_shares_the_actors_weights": (GRADIENTS, set()),
    "reward_model_shares_the_critics_weights": (GRADIENTS, {ROLLOUT}),
    "reward_head_negated": (REWARD, set()),
    "scores_of_the_row_before": (SCORES, set()),
    "scores_rolled_once_collected": (ROLLOUT, set()),
    "shaped_scores_of_the_row_before": (ADVANTAGES, set()),
    "rewards_of_the_row_before": (ADVANTAGES, set()),
    "advantages_of_the_token_before": (ADVANTAGES, set()),
    "advantages_of_the_row_before": (ADVANTAGES, set()),
    "actor_at_rate_0": (MOVE, set()),
    "critic_at_rate_0": (MOVE, set()),
}
FAULTS_OF_ZERO3 = {
    "stale_generator": (STEPPED, set()),
    "damaged_generator": (GENERATOR, {POLICY, KL, SAMPLES}),
    "average_thrown_away": (AVERAGE, set()),
}


@pytest.fixture(scope="session")
def house(tiny, chain, tmp_path_factory):
    """An SFT model, and a reward model that tells a good answer from a bad one of the same length
    in every held-out pair."""

    def build(folder):
        (folder / "sft").symlink_to(chain / "sft")
        with open(folder / "pairs.jsonl", "w") as file:
            for line in (tiny / "data/prompts.jsonl").read_text().splitlines():
                pair = {"responses": ["yes", "not"], "scores": [1.0, 0.0]}
                file.write(json.dumps({"prompt": json.loads(line)["prompt"]} | pair) + "\n")
        pairs = ("--preference_data", folder / "pairs.jsonl", "--max_steps", 15)
        run_ranks([reward(tiny, folder / "sft", folder / "reward", *pairs)], 1)
        assert json.loads((folder / "reward/result.json").read_text())["accuracy_low"] > 0.8

    return built_once(tmp_path_factory, "house", build)


@pytest.fixture(scope="session")
def families(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    tokenizer = chat_template.load_tokenizer(str(tiny / "base_model"))
    return {family: write(folder / family, family, tokenizer) for family in FAMILIES}


def planted(tiny, house, out, faults, *flags):
    """The job of one --check_only run with `faults` planted; house: folder of sft/ and reward/."""
    out.mkdir(parents=True, exist_ok=True)
    program, argv = ppo(tiny, house / "sft", house / "reward", out, "--check_only", "true", *flags)
    return ("tests/helpers/planted_faults.py", [faults, out / "outcome.json", program, *argv])


def outcome(out):
    """(how the run ended: {"stopped", "kind", "said"}, {check: (verdict, what it says)})"""
    found = json.loads((out / "outcome.json").read_text())
    lines = re.findall(r"^  (passed|DOUBT|FAULT)  ([\w -]+): (.*)", found["said"], re.MULTILINE)
    return found, {name: (verdict, text) for verdict, name, text in lines}


def assert_each_is_named(tiny, house, folder, faults, ranks, *flags):
    jobs = [planted(tiny, house, folder / name, name, *flags) for name in faults]
    run_ranks(jobs, ranks)
    wrong = []
    for name, (expected, allowed) in faults.items():
        found, said = outcome(folder / name)
        blamed = {check for check, (verdict, _) in said.items() if verdict == "FAULT"}
        if expected not in blamed or not blamed <= {expected} | allowed:
            wrong.append(
                f"{name}: {expected!r} should have named it, {blamed} did\n{found['said']}"
            )
        elif found["kind"] != "StopRun" or any(c not in found["stopped"] for c in blamed):
            wrong.append(f"{name}: ended as {found['kind']}: {found['stopped']}")
        elif any((folder / name / saved).exists() for saved in ("actor", "critic", "actor_ema")):
            wrong.append(f"{name}: something was saved")
        print(f"{name}: {found['stopped']}\n")
    assert not wrong, "\n\n".join(wrong)


def test_the_check_that_is_there_for_a_fault_names_it(tiny, house, tmp_path):
    data = ("--preference_data", house / "pairs.jsonl")
    assert_each_is_named(tiny, house, tmp_path, FAULTS, 1, *data)


def test_faults_of_zero3_are_named(tiny, house, tmp_path):
    assert_each_is_named(tiny, house, tmp_path, FAULTS_OF_ZERO3, 1, "--zero_stage", 3)


@pytest.mark.slow
def test_a_stale_vllm_server_is_named(tiny, house, tmp_path):
    faults = {"stale_server": (STEPPED, set())}
    flags = ("--rollout_engine", "vllm", "--vllm_python", sys.executable)
    assert_each_is_named(tiny, house, tmp_path, faults, 1, *flags)


def test_faults_of_other_scorers_and_references_are_named(tiny, house, tmp_path):
    """The reference is the SFT model by another name, so that it need not equal the actor."""
    shutil.copytree(house / "sft", tmp_path / "reference")
    faults = {
        "function_scores_of_the_row_before": (SCORES, set()),
        "reference_at_another_temperature": (REFERENCE, set()),
    }
    function = ("--reward_function", "step3_ppo.rewards.shipped:length_target")
    flags = ("--reference_model", tmp_path / "reference", "--max_eval_rows", 4, *function)
    assert_each_is_named(tiny, house, tmp_path, faults, 1, *flags)


def test_faults_of_adapters_are_named(tiny, house, tmp_path):
    faults = {
        "adapter_left_on_in_the_reference": (GRADIENTS, set()),
        "merge_not_undone": (GRADIENTS, set()),
    }
    flags = ("--lora_rank", 4, "--max_eval_rows", 4)
    assert_each_is_named(tiny, house, tmp_path, faults, 1, *flags)


def test_ranks_that_share_their_noise_are_named(tiny, house, tmp_path):
    assert_each_is_named(tiny, house, tmp_path, {"ranks_share_noise": (APART, set())}, 2)


def stopped_after(step, tiny, house, out, *flags):
    """The job of a run that gets SIGTERM after a step, and is not --check_only."""
    program, argv = ppo(tiny, house / "sft", house / "reward", out, *flags)
    return "tests/helpers/stop_at.py", [ROOT / program, step, "SIGTERM", *argv]


FAULTS_AFTER_RESUMING = {
    "none": None,
    "generator_of_the_models_as_loaded": GENERATOR,
    "stale_generator": STEPPED,
    "dropout_in_the_critic": DROPOUT,
    "greedy_sampling": SAMPLES,
    "average_never_updated": AVERAGE,
    "average_is_a_copy": AVERAGE,
    "reference_takes_gradients": GRADIENTS,
}


@pytest.mark.parametrize(
    "faults",
    [
        ["none", "generator_of_the_models_as_loaded", "average_never_updated"],
        pytest.param(list(FAULTS_AFTER_RESUMING), marks=pytest.mark.slow),
    ],
    ids=["three", "all"],
)
def test_a_resumed_run_is_checked_but_for_what_only_untrained_weights_have(
    tiny, house, tmp_path, faults
):
    """Each fault is there from the resumption on: the run before it was sound. By the last rollout
    the average is further behind the weights than they still move."""
    flags = ("--zero_stage", 3, "--max_eval_rows", 4, "--max_steps", 6)
    run_ranks([stopped_after(5, tiny, house, tmp_path / "run", *flags)], 1)
    jobs = []
    for name in faults:
        shutil.copytree(tmp_path / "run", tmp_path / name)
        goes_on = ("--check_only", "false", "--resume", "auto")
        jobs.append(planted(tiny, house, tmp_path / name, name, *flags, *goes_on))
    run_ranks(jobs, 1)
    for name in faults:
        expected = FAULTS_AFTER_RESUMING[name]
        found, said = outcome(tmp_path / name)
        blamed = {check for check, (verdict, _) in said.items() if verdict == "FAULT"}
        left_out = f"(left out, true of untrained weights alone: {KL}):"
        told = f"self-check, resumed at rollout 6 {left_out}"
        assert found["said"].count(told) == 1, found["said"]
        if expected is None:
            assert found["stopped"] is None and set(said) == set(ANYTIME), found["said"]
            assert {verdict for verdict, _ in said.values()} <= {"passed"}, found["said"]
        else:
            assert expected in blamed and found["kind"] == "StopRun", f"{name}: {found['said']}"
            assert f"- {expected}: " in found["stopped"]
            assert not (tmp_path / name / "actor").exists()


def test_what_one_rank_sees_stops_all(tiny, house, tmp_path):
    """None is left in a collective, waiting for the one that has stopped."""
    faults = {"generator_damaged_on_one_rank": (GENERATOR, {POLICY, KL, SAMPLES})}
    flags = ("--zero_stage", 3, "--max_eval_rows", 4)
    assert_each_is_named(tiny, house, tmp_path, faults, 2, *flags)


def test_faults_that_a_llama_cannot_have_are_named(tiny, families, tmp_path):
    """Its rotary positions are relative, so that it would not mind pads that are counted, and its
    dropout is an attribute. GPT-2 learns a vector for each position and has nn.Dropout."""
    faults = {
        "positions_count_pads": (PADDING, {POLICY, REFERENCE}),
        "dropout_in_the_actor": (DROPOUT, {POLICY, GENERATOR, PADDING}),
    }
    assert_each_is_named(tiny, families["GPT2"], tmp_path, faults, 1)


# What is sound, or may be.


@pytest.mark.parametrize(
    "names, flags",
    [
        (["Mistral", "Gemma", "GPT2", "Bloom"], ()),
        (["Mistral", "GPT2"], ("--zero_stage", 3)),
        (["Qwen2"], ("--dtype", "bf16", "--max_response_length", 4)),
        pytest.param(FAMILIES, (), marks=pytest.mark.slow),
        pytest.param(FAMILIES, ("--zero_stage", 3), marks=pytest.mark.slow),
        pytest.param(FAMILIES, ("--dtype", "bf16"), marks=pytest.mark.slow),
    ],
    ids=["fp32", "ZeRO-3", "bf16", "all fp32", "all ZeRO-3", "all bf16"],
)
def test_sound_families_pass(tiny, families, tmp_path, names, flags):
    """With rates of dropout in every config."""
    flags = ("--max_eval_rows", 4, *flags)
    jobs = [planted(tiny, families[f], tmp_path / f, "none", *flags) for f in names]
    run_ranks(jobs, 1)
    wrong = []
    for family in names:
        found, said = outcome(tmp_path / family)
        verdicts = {name: verdict for name, (verdict, _) in said.items()}
        if found["stopped"] or verdicts != dict.fromkeys(CHECKS, "passed"):
            wrong.append(f"{family}: {found['stopped']}\n{found['said']}")
    assert not wrong, "\n\n".join(wrong)


ALGORITHMS = {
    "a2c": ("--algorithm", "a2c"),
    "reinforce": ("--algorithm", "reinforce", "--zero_stage", 3, "--packing", "on"),
    "sequences": ("--action_level", "sequence", "--dual_clip", 3),
    "scores": ("--score_normalisation", "running", "--score_clip", 0.5, "--whiten_rewards"),
}


def test_every_algorithm_passes(tiny, house, tmp_path):
    whole = ("--max_eval_rows", 4, "--global_batch_size", 16, "--ppo_epochs", 1)
    jobs = [planted(tiny, house, tmp_path / n, "none", *whole, *f) for n, f in ALGORITHMS.items()]
    run_ranks(jobs, 1)
    for name in ALGORITHMS:
        found, said = outcome(tmp_path / name)
        assert {n: verdict for n, (verdict, _) in said.items()} == dict.fromkeys(CHECKS, "passed")
        assert "rolled by one row: " in said[SCORES][1], found["said"]


def test_doubts_are_told_and_the_run_goes_on(tiny, house, tmp_path):
    unmeasured = tmp_path / "unmeasured"
    shutil.copytree(house / "reward", unmeasured)
    (unmeasured / "result.json").unlink()
    pairs = ("--preference_data", house / "pairs.jsonl")
    jobs = [
        planted(tiny, house, tmp_path / "chance", "reward_head_zero", *pairs),
        planted(tiny, house, tmp_path / "unknown", "none", "--reward_model", unmeasured),
    ]
    run_ranks(jobs, 1)
    for name, words in (("chance", "no better than chance"), ("unknown", "no result.json")):
        found, said = outcome(tmp_path / name)
        verdict, text = said.pop(REWARD)
        assert verdict == "DOUBT" and words in text
        assert found["stopped"] is None and {v for v, _ in said.values()} == {"passed"}
        assert set(said) | {REWARD} == set(CHECKS), "the second part was not reached"


# What follows from a fault.


def test_warn_goes_on_off_is_silent_and_on_names_all_at_once(tiny, house, tmp_path):
    faults, named = "reference_differs+other_stop_id_in_the_config", {KL, STOP}
    trains = ("--check_only", "false", "--max_steps", 1)
    jobs = [
        planted(tiny, house, tmp_path / "on", faults, "--check_only", "false"),
        planted(tiny, house, tmp_path / "warn", faults, "--self_check", "warn", *trains),
        planted(tiny, house, tmp_path / "off", faults, "--self_check", "off", *trains),
    ]
    run_ranks(jobs, 1)
    found, said = outcome(tmp_path / "on")
    assert found["kind"] == "StopRun" and "2 faults" in found["stopped"]
    assert all(f"- {name}: " in found["stopped"] for name in named)
    assert not (tmp_path / "on/actor").exists() and not (tmp_path / "on/result.json").exists()
    found, said = outcome(tmp_path / "warn")
    assert {name for name, (verdict, _) in said.items() if verdict == "FAULT"} == named
    assert set(said) == set(CHECKS) and found["stopped"] is None
    found, said = outcome(tmp_path / "off")
    assert found["stopped"] is None and not said and "self-check" not in found["said"]
    for name in ("warn", "off"):
        assert (tmp_path / name / "actor/model.safetensors").exists()


def test_a_fault_ends_the_process_with_an_error(tiny, house, tmp_path):
    """Nothing is planted here: the test split holds what is trained on."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        shutil.copy(tiny / "data/prompts.jsonl", data / f"{split}.jsonl")
    out = tmp_path / "out"
    program, argv = ppo(tiny, house / "sft", house / "reward", out, "--prompt_data", data)
    done = subprocess.run(
        [sys.executable, ROOT / program, *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: the self-check found 1 fault" in done.stderr and "- data: " in done.stderr
    assert "8 of them in both" in done.stderr and "Traceback" not in done.stderr
    assert not any((out / name).exists() for name in ("actor", "critic", "result.json"))


def test_a_critic_or_reference_of_another_template_is_refused(tiny, house, tmp_path):
    """By its flag, before anything is built."""
    jobs = []
    for flag, kind in (("critic_model", "reward"), ("reference_model", "sft")):
        other = tmp_path / kind
        shutil.copytree(house / kind, other)
        template = other / "chat_template.jinja"
        template.write_text(template.read_text().replace("user", "human") + " ")
        jobs.append(planted(tiny, house, tmp_path / flag, "none", f"--{flag}", other))
    run_ranks(jobs, 1)
    for flag in ("critic_model", "reference_model"):
        found, _ = outcome(tmp_path / flag)
        assert found["kind"] == "SystemExit" and f"{flag}=" in found["stopped"]
        assert "differ in chat template" in found["stopped"]
        assert "self-check" not in found["said"]


def test_an_error_that_is_no_verdict_says_in_which_check_it_came(capfd):
    """It ends the run as it would anywhere, --self_check warn or not."""

    def breaks(given):
        raise ZeroDivisionError("by nothing")

    config, device = config_of(self_check="warn", dtype="fp32"), torch.device("cpu")
    check = self_check.SelfCheck(None, [], [], config, device, print)
    with pytest.raises(ZeroDivisionError, match="by nothing"):
        check._run(
            {"sound": lambda given: "as it is", "odd": breaks}, None, "before the first step"
        )
    told = capfd.readouterr().err
    assert told == "self-check, before the first step: 'odd' broke off on rank 0, no verdict:\n"
