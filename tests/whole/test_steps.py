"""Each step's main on a two-layer model: every ZeRO stage and 1 or 2 ranks take the same path."""

import json
import shutil

import pytest
import torch

from tests.helpers.jobs import collect, ppo, reward, sft
from tests.helpers.running import assert_same_path, built_once, metrics_of, run_ranks

# How ZeRO is told apart from nothing: (name, flags).
STAGES = [
    ("zero0", []),
    ("zero1_packed", ["--zero_stage", 1, "--packing", "on"]),
    ("zero2", ["--zero_stage", 2, "--micro_batch_size", 2]),
    ("zero3_packed", ["--zero_stage", 3, "--packing", "on", "--micro_batch_tokens", 150]),
    ("zero2_offload", ["--zero_stage", 2, "--offload", "optimizer"]),
    ("zero3_offload", ["--zero_stage", 3, "--offload", "all"]),
]
STEPS = ("sft", "reward", "ppo")
EVERY_STAGE = [name for name, _ in STAGES]
# The others are walked with -m slow; test_zero.py has the engine under each of them.
FEW = {1: ["zero0", "zero3_packed"], 2: ["zero1_packed", "zero2_offload", "zero3_packed"]}


@pytest.fixture(
    scope="session",
    params=[FEW, pytest.param({1: EVERY_STAGE, 2: EVERY_STAGE}, marks=pytest.mark.slow)],
    ids=["few", "all"],
)
def walked(request, tiny, chain, tmp_path_factory):
    """Every step under the stages on 1 and 2 ranks → {step: folders by "stage, ranks"}. Each has
    beside it NAME.pt of probe_logits.py. All in two starts: a start costs more than such a run."""
    chosen = request.param
    found = {step: {} for step in STEPS}

    def build(root):
        for ranks, names in chosen.items():
            jobs = []
            for name, flags in ((n, flags) for n, flags in STAGES if n in names):
                out = {step: root / f"{step}_{name}_{ranks}" for step in STEPS}
                for program, argv in (
                    sft(tiny, out["sft"], *flags),
                    reward(tiny, chain / "sft", out["reward"], *flags),
                    ppo(tiny, chain / "sft", chain / "reward", out["ppo"], *flags),
                ):
                    probe = f"{argv[argv.index('--output_dir') + 1]}.pt"
                    jobs.append(("tests/helpers/probe_logits.py", [program, probe, *argv]))
            if ranks == 1:
                saved = ["--config", root / "sft_zero0_1/config.yaml"]
                jobs.append(("step1_sft/main.py", [*saved, "--output_dir", root / "again"]))
            run_ranks(jobs, ranks, timeout=1800)

    root = built_once(tmp_path_factory, f"walked{len(chosen[1])}", build)
    for step in STEPS:
        for ranks, names in chosen.items():
            found[step] |= {f"{n}, {ranks} ranks": root / f"{step}_{n}_{ranks}" for n in names}
    return found


def test_sft_takes_one_path_under_every_stage(walked):
    assert_same_path(walked["sft"], ["loss", "grad_norm"])
    losses = metrics_of(walked["sft"]["zero0, 1 ranks"], "loss")
    assert losses[-1] < losses[0] - 0.2


def test_reward_takes_one_path_under_every_stage(walked):
    assert_same_path(walked["reward"], ["loss", "grad_norm"])


def test_ppo_takes_one_path_under_every_stage(walked, chain):
    names = [
        "score",
        "kl",
        "policy_loss",
        "value_loss",
        "actor_grad_norm",
        "critic_grad_norm",
        "response_length",
    ]
    assert_same_path(walked["ppo"], names)
    averages = {
        name: torch.cat([t.flatten() for t in _weights(folder / "actor_ema").values()])
        for name, folder in walked["ppo"].items()
    }
    reference = averages["zero0, 1 ranks"]
    start = torch.cat([t.flatten() for t in _weights(chain / "sft").values()])
    assert (reference - start).abs().max() > 1e-4
    for name, weights in averages.items():
        assert (weights - reference).abs().max() < 2e-4, name


def _weights(folder):
    from safetensors.torch import load_file

    return dict(sorted(load_file(folder / "model.safetensors").items()))


@pytest.mark.parametrize("step", STEPS)
def test_saved_models_load_anywhere_and_say_the_same(walked, step):
    """Plain transformers on the saved folder gives the logits that training had, and the ids."""
    recorded = {}
    for folder in walked[step].values():
        found = torch.load(f"{folder}.pt", weights_only=True)
        assert len(found) == (2 if step == "ppo" else 1)
        recorded |= found
    assert len(recorded) == len(walked[step]) * (2 if step == "ppo" else 1)
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    for folder, record in recorded.items():
        scalar = record["kind"] == "scalar"
        auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
        model = auto.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "7"}],
            return_dict=True,
            return_tensors="pt",
        )["input_ids"]
        ids = ids[:, : int((ids[0] == tokenizer.eos_token_id).nonzero()[-1]) + 1]
        assert ids.tolist() == record["ids"].tolist()
        logits = model(input_ids=ids).logits
        if scalar:  # plain transformers gives the score before the bias
            logits = logits - getattr(model.config, "reward_bias", 0.0)
        torch.testing.assert_close(logits, record["logits"], rtol=1e-5, atol=1e-5)
        assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
        assert model.config.eos_token_id == tokenizer.eos_token_id
        if not scalar:
            assert model.generation_config.eos_token_id == tokenizer.eos_token_id
            assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_the_saved_config_repeats_the_run(walked):
    first = walked["sft"]["zero0, 1 ranks"]
    losses = [metrics_of(folder, "loss") for folder in (first, first.parent / "again")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_micro_batches_do_not_change_the_path(tiny, chain, tmp_path):
    """The same optimizer step in one piece or in many: losses are normalised by its tokens."""
    sizes = {n: ["--micro_batch_size", n] for n in (1, 8)}
    sizes["tokens"] = ["--micro_batch_tokens", 150]
    run_ranks(
        [sft(tiny, tmp_path / f"sft{n}", *flags) for n, flags in sizes.items()]
        + [reward(tiny, chain / "sft", tmp_path / f"rm{n}", *flags) for n, flags in sizes.items()]
        + [
            ppo(
                tiny,
                chain / "sft",
                chain / "reward",
                tmp_path / f"ppo{n}",
                *flags,
                "--generation_tokens",
                70 * (n if n == 1 else 8),
                "--logprobs_from",
                {1: "decode", 8: "forward"}.get(n, "auto"),
                "--decode",
                {1: "static", 8: "eager"}.get(n, "auto"),
            )
            for n, flags in sizes.items()
        ],
        1,
    )
    for kind, names in (
        ("sft", ["loss", "grad_norm"]),
        ("rm", ["loss", "grad_norm"]),
        ("ppo", ["policy_loss", "value_loss", "actor_grad_norm", "critic_grad_norm"]),
    ):
        assert_same_path({f"micro {n}": tmp_path / f"{kind}{n}" for n in sizes}, names)


def test_a_save_that_fails_leaves_the_weights_that_were_there(tiny, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from utils.checkpoints import model_folder as checkpoint
    from utils.data import chat_template

    folder = tmp_path / "weights"
    shutil.copytree(tiny / "base_model", folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = chat_template.load_tokenizer(str(folder))

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(folder, {".": checkpoint.ModelFolder(model, tokenizer, "")})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_results_hold_what_the_summary_needs(chain):
    result = json.loads((chain / "reward/result.json").read_text())
    assert 0 <= result["accuracy_low"] <= result["accuracy"] <= result["accuracy_high"] <= 1
    config = json.loads((chain / "reward/config.json").read_text())
    assert config["reward_bias"] == pytest.approx(result["bias"])
    assert config["reward_read_at"] == "stop"


def test_ppo_settings_reach_the_rewards(tiny, chain, tmp_path):
    flags = ["--kl_target", 1e-4, "--kl_horizon", 100, "--kl_coef", 0.5, "--score_clip", 0.01]
    shared = ["--samples_per_prompt", 2, "--prompts_per_rollout", 8]
    jobs = [
        ppo(tiny, chain / "sft", chain / "reward", tmp_path / "plain", *shared),
        ppo(tiny, chain / "sft", chain / "reward", tmp_path / "set", *shared, *flags),
    ]
    run_ranks(jobs, 1)
    coefficients = metrics_of(tmp_path / "set", "kl_coef")
    kls = metrics_of(tmp_path / "set", "kl")
    assert coefficients[0] == 0.5 and abs(kls[0]) < 1e-6
    for before, after, kl in zip(coefficients, coefficients[1:], kls, strict=False):
        error = min(max(kl / 1e-4 - 1, -0.2), 0.2)
        assert after == pytest.approx(before * (1 + error * 16 / 100))
    assert set(metrics_of(tmp_path / "plain", "kl_coef")) == {0.05}
    # The first rollout's KL is 0, so its reward is the clipped score: within ± 0.01.
    assert abs(metrics_of(tmp_path / "set", "reward")[0]) <= 0.01
    assert abs(metrics_of(tmp_path / "plain", "reward")[0]) > 0.02
    assert metrics_of(tmp_path / "set", "score")[0] == metrics_of(tmp_path / "plain", "score")[0]


def test_a_second_round_goes_on_from_the_first_actor(tiny, chain, tmp_path):
    """As run_all.sh runs it: its answers join the comparisons, the reference stays step 1's."""
    first, second = tmp_path / "first", tmp_path / "second"
    more, model = tmp_path / "more.jsonl", tmp_path / "reward"
    both = ["--preference_data", tiny / "data/comparisons.jsonl", more]
    then = [*both, "--reference_model", chain / "sft"]
    jobs = [
        ppo(tiny, chain / "sft", chain / "reward", first, "--self_check", "off"),
        collect(tiny, first / "actor", "--output_file", more),
        reward(tiny, chain / "sft", model, *both),
        ppo(tiny, first / "actor", model, second, *then, "--max_steps", 1),
    ]
    run_ranks(jobs, 1)
    assert json.loads(more.read_text().splitlines()[0])["provenance"]["policy"] == str(
        first / "actor"
    )
    assert abs(metrics_of(first, "kl")[0]) < 1e-6
    # The KL begins where the first round ended; by k3, as k1 may be below 0 on eight answers.
    ended = json.loads((first / "result.json").read_text())["kl_k3_after"]
    begins = json.loads((second / "result.json").read_text())["kl_k3_before"]
    assert begins == pytest.approx(ended, rel=1e-3) and ended > 1e-3
