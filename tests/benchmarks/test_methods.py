"""benchmarks/methods.py, learning.py and engines.py: flags that work, what is measured, best of n;
not the runs of minutes."""

import itertools
import json
import math
import random
import resource
import statistics
import sys

import pytest
import torch

from benchmarks import engines, learning, methods
from step1_sft.config import SFTConfig
from step2_reward.collect import CollectConfig
from step3_ppo.config import PPOConfig
from step3_preference.config import PreferenceConfig
from utils.settings import command_line

CONFIGS = {
    "step1_sft/main.py": SFTConfig,
    "step2_reward/collect.py": CollectConfig,
    "step3_ppo/main.py": PPOConfig,
    "step3_preference/main.py": PreferenceConfig,
}


@pytest.fixture
def started(monkeypatch):
    """Programs with their settings, parsed instead of run."""
    calls = []

    def take(program, *flags, done):
        config = command_line.build(CONFIGS[program], list(map(str, flags)), world_size=1)
        calls.append((program, config))
        if program == "step2_reward/collect.py":
            done.parent.mkdir(parents=True, exist_ok=True)
            figures = {"prompts": min(config.num_prompts, 2934)}
            done.with_suffix(".result.json").write_text(json.dumps(figures))

    monkeypatch.setattr(learning, "run", take)
    monkeypatch.setattr(methods, "run", take)
    return calls


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_has_flags_that_work_and_as_many_samples(name, started, tmp_path):
    for folder in ("step1_sft", "step2_reward"):
        (tmp_path / folder).mkdir()
    train, flags = methods.METHODS[name]
    train(methods.Run(tmp_path, tmp_path / name, 7, 12_800), flags)
    (*_, (program, last)) = started
    assert last.seed == 7 and last.output_dir == str(tmp_path / name)
    assert last.model_name_or_path == str(tmp_path / "step1_sft")
    if program == "step3_ppo/main.py":
        assert last.max_steps * last.rollout_size() == 12_800 and last.algorithm == name
    elif len(started) == 2:
        collect = started[0][1]
        assert collect.num_prompts * collect.answers_per_prompt == 12_800
        assert collect.labeller == "reward_model" and collect.policy.endswith("step1_sft")
        learned = last.sft_data if name == "best_of_n" else last.preference_data
        assert learned == [collect.output_file]
    else:
        assert last.loss == name
        assert last.preference_data == [str(tmp_path / "data/comparisons_1.jsonl")]


@pytest.mark.parametrize("name", learning.VARIANTS)
def test_every_variant_of_ppo_has_flags_that_work(name, started, tmp_path):
    learning.ppo(tmp_path, tmp_path, tmp_path, tmp_path / "out", 1, learning.VARIANTS[name])
    assert started[0][1].rollout_size() == 128


@pytest.mark.parametrize("name", engines.SETTINGS)
def test_every_engine_has_flags_that_work(name, started, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PYTHON", sys.executable)
    learning.ppo(tmp_path, tmp_path, tmp_path, tmp_path / "out", 1, engines.SETTINGS[name])
    (_, config) = started[0]
    assert config.rollout_engine == ("native" if name == "native" else "vllm")
    assert config.rollout_ahead == (name == "one ahead") and config.max_steps == 25


def test_engines_are_compared_seed_by_seed():
    def runs(*verifiers):
        rest = {"seconds": 2.0, "engine_gap": 3e-7}
        return {seed: {"verifier": v} | rest for seed, v in enumerate(verifiers)}

    found = {"native": runs(0.5, 0.7, 0.9), "vllm": runs(0.53, 0.71, 0.91)}
    sft, native, vllm = engines.rows_of(found, [0.4, 0.5])
    assert sft["verifier"] == "0.450 ± 0.071" and "minus the first" not in native
    # Differences 0.03, 0.01, 0.01: their standard error is 0.0115 ÷ √3.
    assert vllm["minus the first"] == "+0.017 ± 0.013" and vllm["engine_gap at most"] == "3e-07"


def test_more_samples_than_prompts_give_are_refused(started, tmp_path):
    train, flags = methods.METHODS["best_of_n"]
    with pytest.raises(SystemExit, match="8 answers to each of 2934 prompts"):
        train(methods.Run(tmp_path, tmp_path / "x", 1, 25_600), flags)


def test_what_a_program_took_is_kept_and_added_up(tmp_path):
    work = tmp_path / "work.py"
    work.write_text(
        "import sys, pathlib\n"
        "x = bytearray(200 * 2**20)\n"
        "x[::4096] = b'1' * len(x[::4096])\n"
        "sum(i for i in range(3_000_000))\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    done, cost = tmp_path / "out/result.json", tmp_path / "out/work_cost.json"
    with pytest.raises(SystemExit, match="exit code 3; see .*work_log.txt"):
        learning.run(str(work), 3, done=done)
    first = json.loads(cost.read_text())
    # A process begins with the memory that the one which starts it has had: here pytest's.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 200 * 2**20 < first["memory"] < own + 2**30
    assert 0.05 < first["seconds"] < 30
    learning.run(str(work), 0, done=done)
    second = json.loads(cost.read_text())
    assert second["seconds"] > first["seconds"] + 0.05
    done.write_text("{}")
    learning.run(str(work), 1, done=done)  # it is there: not run again
    assert json.loads(cost.read_text()) == second


# Best of n.


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_choices_of_n(n):
    draw = random.Random(n)
    scores = [draw.random() for _ in range(5)]
    values = [draw.random() for _ in range(5)]
    chosen = [max(some, key=lambda i: scores[i]) for some in itertools.combinations(range(5), n)]
    expected = statistics.mean(values[i] for i in chosen)
    assert methods.of_the_best(scores, values, n) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_kl_of_best_of_n_is_that_of_the_highest_of_n_draws(n):
    """Of m equally likely answers the i-th from below is chosen with (i/m)ⁿ − ((i−1)/m)ⁿ."""
    m = 20_000
    chances = [(i / m) ** n - ((i - 1) / m) ** n for i in range(1, m + 1)]
    exact = sum(p * math.log(p * m) for p in chances if p > 0)
    assert methods.kl_of_best(n) == pytest.approx(exact, abs=1e-3)
    assert exact <= methods.kl_of_best(n) + 1e-9


# What is measured of a model.


@pytest.fixture
def base(chain, tiny, tmp_path):
    """The tests' small models where learning.build_base would put its own; three prompts."""
    lines = (tiny / "data/held_out.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/held_out.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, folder in (("step1_sft", "sft"), ("step2_reward", "reward")):
        (tmp_path / name).symlink_to(chain / folder)
    return tmp_path


def test_kl_and_tokens_of_a_model_are_those_of_its_own_answers(base, tiny, monkeypatch):
    """Against a loop over the answers, one at a time, by the models' logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seen = {}
    generate = methods.sampling.generate

    def keep(model, ids, mask, **how):
        seen.update(ids=ids, mask=mask.bool(), answers=generate(model, ids, mask, **how))
        return seen["answers"]

    monkeypatch.setattr(methods.sampling, "generate", keep)
    assert methods.judged(base / "step1_sft", base, 2, 1).kl == pytest.approx(0.0, abs=1e-6)
    found = methods.judged(tiny / "base_model", base, 2, 1)
    stop = AutoTokenizer.from_pretrained(base / "step1_sft").eos_token_id
    models = [
        AutoModelForCausalLM.from_pretrained(folder)
        for folder in (tiny / "base_model", base / "step1_sft")
    ]
    differences, lengths = [], []
    for ids, mask, answer in zip(seen["ids"], seen["mask"], seen["answers"].tolist(), strict=True):
        answer = answer[: answer.index(stop) + 1] if stop in answer else answer
        prompt = ids[mask].tolist()
        with torch.no_grad():
            both = [
                m(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
                for m in models
            ]
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        p, q = (sum(x[i, a].item() for i, a in zip(places, answer, strict=True)) for x in both)
        differences.append(p - q)
        lengths.append(len(answer))
    assert len(set(lengths)) > 1 or lengths[0] == methods.ANSWER_TOKENS
    assert found.kl == pytest.approx(statistics.mean(differences), rel=1e-4)
    assert found.tokens == pytest.approx(statistics.mean(lengths))
    assert [len(group) for group in (*found.verdicts, *found.scores)] == [2] * 6


# The table.


def finished(folder, verifier: float, seconds: float, evaluations=()) -> None:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    measures = {"verifier": verifier, "score": 2.0, "kl": 0.5, "tokens": 4.0}
    (folder / "measured.json").write_text(json.dumps(measures))
    for name in ("collect", "main"):
        cost = {"seconds": seconds / 2, "memory": 3e8 if name == "main" else 1e8}
        (folder / f"{name}_cost.json").write_text(json.dumps(cost))
    if evaluations:
        (folder / "actor").mkdir()
        rows = [{"step": 0, "eval/verifier": 0.3, "eval/kl": 0.0}]
        rows += [{"step": i, "seconds": 1.0} | e for i, e in enumerate(evaluations, 1)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_the_report_of_what_is_there(tmp_path, monkeypatch, capsys):
    """Two seeds of PPO, one of DPO; at PPO's seconds DPO is not yet there."""
    of_half = {"eval/verifier": 0.5, "eval/kl": 0.2}
    of_end = {"eval/verifier": 0.9, "eval/kl": 0.4}
    for seed, end in ((1, 0.6), (2, 0.8)):
        base = tmp_path / f"seed{seed}"
        finished(base / "ppo", end, 40.0, [{}, of_half, {}, of_end])
        (base / "sft.json").write_text(json.dumps({"verifier": 0.4}))
        points = [{"kl": methods.kl_of_best(n), "verifier": 0.4} for n in methods.BEST_OF]
        (base / "best_of_n.json").write_text(json.dumps(points))
    finished(tmp_path / "seed2/dpo", 0.75, 41.0)
    command = ["methods.py", "--output_dir", str(tmp_path), "--report_only", "--seeds", "1", "2"]
    monkeypatch.setattr(sys, "argv", command)
    methods.main()
    text = capsys.readouterr().out
    assert text == (tmp_path / "methods.md").read_text(encoding="utf-8")
    assert "SFT 0.400 ± 0.000" in text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert rows["ppo"] == (
        "| ppo | 2 | 0.700 ± 0.141 | 0.600 | 2.000 ± 0.000 | 0.500 ± 0.000 | 4.0 | 40 | 300 | "
        "0.700 ± 0.141 |"
    )
    assert rows["dpo"].startswith("| dpo | 1 | 0.750 | 0.750") and rows["dpo"].endswith("| 0.400 |")
    assert rows["the best of 4, untrained"].endswith("| 0.400 | | ≤ 0.64 | | | | |")
    assert (tmp_path / "methods.png").stat().st_size > 10_000
    numbers = json.loads((tmp_path / "methods.json").read_text(encoding="utf-8"))
    curve = numbers["methods"]["ppo"]["1"]["curve"]
    # The last evaluation's few prompts make way for all.
    assert [(p["seconds"], p["verifier"]) for p in curve] == [(0, 0.3), (20, 0.5), (40, 0.6)]
    monkeypatch.setattr(sys, "argv", [*command, "--samples", "256"])
    with pytest.raises(SystemExit, match="begun with --samples 12800"):
        methods.main()


def test_a_curve_over_seeds_is_the_mean_at_each_point():
    one = [{"kl": 0.0, "verifier": 0.4}, {"kl": 1.0, "verifier": 0.7}]
    two = [{"kl": 0.0, "verifier": 0.2}, {"kl": 2.0, "verifier": 0.8}]
    found = methods.over_seeds([one, two])
    assert found == [{"kl": 0.0, "verifier": pytest.approx(0.3)}, {"kl": 1.5, "verifier": 0.75}]
    with pytest.raises(ValueError, match="shorter"):
        methods.over_seeds([one, two[:1]])
