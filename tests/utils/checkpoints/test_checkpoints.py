"""A run that was stopped and taken up again ends as one that was not, bit for bit."""

import random
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch

from tests.helpers.jobs import ppo, reward, sft
from tests.helpers.running import ROOT, run_ranks
from tests.helpers.running import metrics_of as values_of
from tests.helpers.same_end import assert_same_end, metrics_of
from utils.checkpoints import engine_state, manifest
from utils.seeding import seed_everything

# Draws by every generator: a check that drew one number, or left one drawn, would be seen.
NOISY_REWARD = """import random

import numpy as np
import torch


def score(prompts, responses, rows):
    def noise():
        return random.random() + random.gauss(0, 1) + np.random.rand() + float(torch.rand(1))

    return [0.1 * noise() for _ in responses]
"""


def jobs_of(step: str, tiny, chain):
    """(folder, *flags) → the job of this step, with what has a state of its own turned on."""
    if step == "sft":
        base = chain / "states_the_day"
        shutil.copytree(tiny / "base_model", base, dirs_exist_ok=True)
        template = (tiny / "base_model/chat_template.jinja").read_text()
        (base / "chat_template.jinja").write_text("{{ strftime_now('%d') }}" + template)
        given = ("--model_name_or_path", base, "--eval_every", 2)
        return lambda out, *flags: sft(tiny, out, *given, *flags)
    if step == "reward":
        return lambda out, *flags: reward(tiny, chain / "sft", out, "--eval_every", 2, *flags)
    own = ("--max_steps", 4, "--kl_target", 0.5, "--score_normalisation", "running")
    own += ("--ptx_coef", 1.0, "--ptx_data", tiny / "data/sft.jsonl", "--eval_every", 2)
    own += ("--sample_answers", 0, "--reward_function", chain / "noisy_reward.py:score")
    (chain / "noisy_reward.py").write_text(NOISY_REWARD)
    return lambda out, *flags: ppo(tiny, chain / "sft", chain / "reward", out, *own, *flags)


def stopped(job, step: int, how: str):
    """The job of tests/helpers/stop_at.py that stops `job` after a step."""
    program, argv = job
    return "tests/helpers/stop_at.py", [ROOT / program, step, how, *argv]


def another_day(job, days: int):
    """tests/helpers/another_day.py: no rank sees the day that the run began on."""
    program, argv = job
    return "tests/helpers/another_day.py", [days, ROOT / program, *argv]


def whole_and_stopped(job, out, stage: int, ends=("asked", "crashed")) -> list:
    """The jobs of an uninterrupted run, one that gets SIGTERM, and one that crashes between two
    checkpoints; the last two are taken up again, on later days."""
    flags = ("--zero_stage", stage)
    saving = (*flags, "--save_every", 2)
    jobs = [job(out / "whole", *flags)]
    if "asked" in ends:
        jobs += [stopped(job(out / "asked", *flags), 3, "SIGTERM")]
        jobs += [another_day(job(out / "asked", *flags, "--resume", "auto"), 1)]
    if "crashed" in ends:
        jobs += [stopped(job(out / "crashed", *saving), 3, "crash")]
        jobs += [another_day(job(out / "crashed", *saving, "--resume", "auto"), 2)]
    return jobs


def assert_all_alike(out, ends=("asked", "crashed")) -> None:
    for end in ends:
        assert_same_end(out / end, out / "whole")
        steps = sorted(p.name for p in (out / end / "checkpoints").iterdir())
        # One for the signal and none that nobody asked for; or the last two.
        assert steps == ["step-000003"] if end == "asked" else len(steps) == 2


CHOSEN = {"sft": (2, ["asked", "crashed"]), "reward": (3, ["crashed"]), "ppo": (0, ["crashed"])}


@pytest.fixture(scope="module")
def chosen(tiny, chain, tmp_path_factory):
    """A few of the slow tests' runs in one start: their folder, and what they printed."""
    out, runs = tmp_path_factory.mktemp("chosen"), []
    for step, (stage, ends) in CHOSEN.items():
        runs += whole_and_stopped(jobs_of(step, tiny, chain), out / step, stage, ends)
    layouts = ("tests/helpers/state_checks.py", [tiny / "base_model", out / "layouts", 2, 10])
    full = ("tests/helpers/full_disk_checks.py", [out / "full"])
    said = run_ranks([*runs, layouts, full], 2)
    assert said.count("self-check, resumed at rollout 3") == 1
    # By the whole run and by the one that crashed: not again once it is resumed.
    assert said.count("old log-probabilities from the") == 2
    return out, said


@pytest.mark.parametrize("step", CHOSEN)
def test_a_step_ends_as_if_it_had_not_been_stopped(chosen, step):
    assert_all_alike(chosen[0] / step, CHOSEN[step][1])
    crashed = chosen[0] / step / "crashed"
    assert f"resumed from {manifest.folder_of(crashed, 2)}, after 2 steps" in chosen[1]
    written = [s for s in chosen[1].splitlines() if s.startswith(f"checkpoint {crashed}/")]
    # At steps 2, then 4 and, where there is one, 6: the last is sealed at the end of the run.
    assert len(written) > 1 and all(s.endswith("written in the background") for s in written)


def test_a_layout_reads_what_another_wrote(chosen):
    """ZeRO-2 in fp32 → ZeRO-3, and offloaded ZeRO-2 in bf16 → ZeRO-3 with all offloaded."""
    assert chosen[1].count("held: ") == 2 * 2


def test_a_full_disk_of_one_rank_costs_the_checkpoint_of_all(chosen):
    told = "checkpoint at step 2 could not be written: rank 1: [Errno 28] No space left on device"
    assert chosen[1].count(told) == 1 and chosen[1].count("went on after a full disk") == 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("step", ["sft", "reward", "ppo"])
def test_every_stage_ends_as_if_it_had_not_been_stopped(tiny, chain, tmp_path, step, ranks):
    stages, job = (0, 1, 2, 3), jobs_of(step, tiny, chain)
    runs = [whole_and_stopped(job, tmp_path / str(stage), stage) for stage in stages]
    run_ranks(sum(runs, []), ranks, timeout=900)
    for stage in stages:
        assert_all_alike(tmp_path / str(stage))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_layout_reads_what_another_wrote(tiny, tmp_path, ranks):
    output = run_ranks(
        [("tests/helpers/state_checks.py", [tiny / "base_model", tmp_path])], ranks, 900
    )
    assert output.count("held: ") == ranks * 12


@pytest.mark.slow
def test_other_ranks_and_another_stage_go_on_with_a_run(tiny, chain, tmp_path):
    """Stopped on two ranks under ZeRO-2, taken up by one rank under ZeRO-3: the same path, up to
    rounding."""
    for step in ("sft", "reward", "ppo"):
        job, out = jobs_of(step, tiny, chain), tmp_path / step
        stage2, stage3 = ("--zero_stage", 2), ("--zero_stage", 3)
        first = stopped(job(out / "moved", *stage2), 3, "SIGUSR1")
        run_ranks([job(out / "whole", *stage2), first], 2)
        said = run_ranks([job(out / "moved", *stage3, "--resume", "auto")], 1)
        assert "ranks: 2 → 1: the same path up to rounding" in said
        for name in ("loss", "grad_norm", "actor_grad_norm", "critic_grad_norm", "kl"):
            expected = values_of(out / "whole", name)
            assert values_of(out / "moved", name) == pytest.approx(expected, rel=2e-3, abs=1e-4)


def test_every_generator_goes_on_where_it_was(tmp_path):
    def draw():
        pair = random.random(), random.gauss(0, 1), float(np.random.randn()), np.random.rand()
        return *pair, torch.rand(1).item(), torch.randn(1).item()

    seed_everything(5, deterministic=False)
    first = [draw() for _ in range(4)]
    seed_everything(5, deterministic=False)
    assert [draw() for _ in range(4)] == first, "one seed, one sequence"
    seed_everything(6, deterministic=False)
    others = [draw() for _ in range(3)]
    assert all(
        a != b for x, y in zip(first, others, strict=False) for a, b in zip(x, y, strict=True)
    )
    state = engine_state.random_state()
    manifest.write_tensors(tmp_path / "r.safetensors", state)
    expected = [draw() for _ in range(4)]
    reader = manifest.Reader(tmp_path, ["r.safetensors"])
    engine_state.restore_random(reader, saved_ranks=1)
    assert [draw() for _ in range(4)] == expected


@pytest.mark.slow
def test_one_seed_gives_the_same_bits_in_another_process(tiny, chain, tmp_path):
    """ZeRO-0 and 3, one and two ranks: metrics and weights of PPO, which samples and has an EMA."""
    for ranks in (1, 2):
        outs = [tmp_path / f"{name}{ranks}" for name in ("first", "second")]
        for out in outs:
            job = jobs_of("ppo", tiny, chain)
            run_ranks([job(out / str(s), "--zero_stage", s) for s in (0, 3)], ranks)
        for stage in ("0", "3"):
            assert_same_end(outs[1] / stage, outs[0] / stage)


@pytest.mark.slow
def test_run_all_stops_when_asked_and_goes_on(tmp_path):
    out = tmp_path / "out"
    command = ["bash", ROOT / "run_all.sh", "--output_dir", out, "--rounds", "1"]
    command += ["--sft.max_steps", "150", "--collect.num_prompts", "200"]
    command += ["--reward.max_steps", "8", "--ppo.max_steps", "2", "--ppo.max_eval_rows", "16"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics, patience = out / "step1_sft/metrics.jsonl", time.monotonic() + 600
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 20:
        assert time.monotonic() < patience and process.poll() is None
        time.sleep(0.1)
    process.terminate()
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 75 and "the same command goes on" in said, said
    said = subprocess.run(command, capture_output=True, text=True, timeout=1800).stdout
    assert "resumed from" in said and "=== evaluation took" in said, said
    steps = [line["step"] for line in metrics_of(out / "step1_sft")]
    assert steps == list(range(1, 151))
    said = subprocess.run(command, capture_output=True, text=True, timeout=900).stdout
    assert said.count("is finished: nothing to do") == 4, said
    assert "=== finished before" in said and "verifier, 512 held-out prompts" in said
