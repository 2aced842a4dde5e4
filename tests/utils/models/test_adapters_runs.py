"""Runs with adapters: one path on any ranks and ZeRO stage, apart or on one base; resumption; what
checkpoints hold; a pipeline from adapter folder to adapter folder."""

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tests.helpers.jobs import ppo, preference, reward, sft
from tests.helpers.running import ROOT, assert_same_path, files_of, run_ranks
from tests.helpers.same_end import assert_same_end, metrics_of
from tests.helpers.small_models import config_of
from tests.utils.models.test_adapters import LINEAR, load, logits_of
from tests.whole.test_gpu import GPU
from utils.data import chat_template
from utils.models import adapters, language_model, scalar_model, shared_base
from utils.models.adapters import Lora
from utils.models.loading import Loading

RANK = ("--lora_rank", 4)
SHARED = ("--share_backbone", "actor,critic,reward")
PPO = ("policy_loss", "actor_grad_norm", "critic_grad_norm", "score")


def stopped(job, step):
    program, argv = job
    return "tests/helpers/stop_at.py", [ROOT / program, step, "SIGTERM", *argv]


def weights_below(folder) -> dict[str, int]:
    """Names of the weights in a checkpoint's files, and how many numbers each has."""
    sizes = {}
    for file in files_of(folder, "*.safetensors"):
        with safe_open(str(file), framework="pt") as tensors:
            sizes |= {k: tensors.get_slice(k).get_shape() for k in tensors.keys()}  # noqa: SIM118
    return sizes


def test_ppo_on_one_base_is_ppo_apart_and_resumes_to_the_last_bit(tiny, chain, tmp_path):
    base, scorer = chain / "sft", tmp_path / "reward"

    def run(name, *flags):
        return ppo(tiny, base, scorer, tmp_path / name, *RANK, *flags)

    every = ("--save_every", 1, "--keep_last", 0)
    jobs = [
        reward(tiny, base, scorer, *RANK, "--merge_on_save", "false"),
        run("apart", *every),
        run("shared", *SHARED),
        run("zero3", *SHARED, "--zero_stage", 3),
        stopped(run("cut", *SHARED, *every), 2),
        run("cut", *SHARED, *every, "--resume", "auto"),
    ]
    said = run_ranks(jobs, 1)
    assert "reference, reward model, actor's base, critic's base unchanged" in said
    assert_same_end(tmp_path / "cut", tmp_path / "shared")
    assert metrics_of(tmp_path / "apart") == metrics_of(tmp_path / "shared")
    assert_same_path({n: tmp_path / n for n in ("shared", "zero3")}, PPO)
    kept = weights_below(tmp_path / "apart/checkpoints/step-000002")
    assert {name.split("|")[0] for name in kept if "|" in name} >= {"actor", "critic", "average"}
    strange = [
        n for n in kept if not n.startswith("random|") and "lora_" not in n and "score." not in n
    ]
    assert not strange  # nothing of the base
    moved = load_file(tmp_path / "shared/actor/adapter_model.safetensors")
    assert all(t.abs().max() > 0 for t in moved.values())


def test_models_on_one_base_hold_its_weights_once(tiny, chain, tmp_path):
    tokenizer = chat_template.load_tokenizer(str(chain / "sft"))
    given, bases = dict(dtype="fp32", tokenizer=tokenizer), {}
    path = str(chain / "sft")
    actor = language_model.load(Loading(), path, lora=Lora(4), shared=bases, **given)
    reference = language_model.load(Loading(), path, shared=bases, **given)
    critic = scalar_model.load(
        Loading(), path, head="zero", lora=Lora(4), shared=bases, **given
    ).classifier
    alone = scalar_model.load(Loading(), path, head="zero", lora=Lora(4), **given).classifier
    names = [name for name, _ in critic.named_parameters()]
    assert names == [name for name, _ in alone.named_parameters()]
    own = {id(p) for model in (actor, critic) for _, p in adapters.own_of(model)}
    weights = {id(p) for m in (actor, reference, critic) for p in m.parameters()}
    assert len(weights) == len(own) + sum(1 for _ in reference.parameters())
    assert adapters.settings_of(reference) is None
    for _, p in adapters.own_of(actor):
        p.data += 0.1
    assert (logits_of(actor) != logits_of(reference)).any()
    assert (logits_of(load(path)) == logits_of(reference)).all()
    assert shared_base.shares(actor, reference) and not shared_base.shares(actor, alone)
    # What the config says later on, as how packed rows attend, must reach every layer.
    for model in (actor, reference, critic, alone):
        assert all(getattr(m, "config", model.config) is model.config for m in model.modules())
    assert sorted({n.rpartition(".")[2] for n in adapters.layers_of(critic)}) == LINEAR


def test_a_reward_model_on_another_base_is_refused(chain):
    config = config_of(
        model_name_or_path=str(chain / "sft"), lora_rank=4, share_backbone="actor,reward"
    )
    path = str(chain / "reward")
    with pytest.raises(SystemExit, match="stands on .*reward.*, and the actor on .*sft"):
        config.on_actors_base("reward", path, {})
    assert config.on_actors_base("critic", path, {}) is None
    bases = {}
    assert config.on_actors_base("reward", str(chain / "sft"), bases) is bases
    for bad, flags in {
        "share_backbone='critic'": dict(lora_rank=4, share_backbone="critic"),
        "share_backbone='actor'": dict(lora_rank=4, share_backbone="actor"),
        "has no reward model": dict(
            lora_rank=4, share_backbone="actor,reward", reward_model="", reward_function=["a.py:f"]
        ),
        "has no critic model": dict(
            lora_rank=4, share_backbone="actor,critic", algorithm="grpo", samples_per_prompt=4
        ),
        "read only with --lora_rank": dict(share_backbone="actor,critic"),
        "leave out --reference_zero_stage": dict(lora_rank=4, reference_zero_stage=3),
        "two passes": dict(lora_rank=4, lora_dropout=0.1),
        "leave out --critic_zero_stage": dict(
            lora_rank=4, critic_zero_stage=3, share_backbone="actor,critic"
        ),
    }.items():
        assert any(bad in problem for problem in config_of(**flags).problems(1)), bad
    apart = config_of(lora_rank=4, critic_zero_stage=3, share_backbone="actor,reward")
    assert not any("critic_zero_stage" in problem for problem in apart.problems(1))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_every_step_from_folder_to_folder_on_any_ranks_and_stage(tiny, chain, tmp_path, variant):
    """The SFT model is an adapter on the base model; all later ones stand on that base too."""
    flags = (*RANK, "--lora_variant", variant)
    first = tmp_path / "1-0"
    for ranks in (1, 2):
        jobs = []
        for stage in (0, 3):
            out, how = tmp_path / f"{ranks}-{stage}", (*flags, "--zero_stage", stage)
            jobs += [
                sft(tiny, out / "sft", *how),
                reward(tiny, first / "sft", out / "reward", *how),
                preference(tiny, first / "sft", out / "dpo", *how, "--ema_decay", 0.9),
                ppo(tiny, first / "sft", first / "reward", out / "ppo", *how, *SHARED),
                # a second round: the reference is the SFT model, the actor has moved on
                ppo(
                    tiny,
                    first / "ppo/actor",
                    first / "reward",
                    out / "again",
                    *(*how, "--reference_model", first / "sft"),
                ),
            ]
        cut = ppo(tiny, first / "sft", first / "reward", tmp_path / f"cut{ranks}", *how, *SHARED)
        jobs += [stopped(cut, 1), (cut[0], [*cut[1], "--resume", "auto"])]
        run_ranks(jobs, ranks)
        assert_same_end(tmp_path / f"cut{ranks}", tmp_path / f"{ranks}-3/ppo")
    runs = [f"{ranks}-{stage}" for ranks in (1, 2) for stage in (0, 3)]
    for name in ("sft", "reward", "dpo"):
        assert_same_path({run: tmp_path / run / name for run in runs}, ("loss", "grad_norm"))
    for name in ("ppo", "again"):
        assert_same_path({run: tmp_path / run / name for run in runs}, PPO)
    base = str((tiny / "base_model").resolve())
    for folder in ("sft", "dpo", "dpo/ema", "ppo/actor", "ppo/actor_ema", "again/actor"):
        model = load(first / folder)
        assert adapters.settings_of(model).base_model_name_or_path == base


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=GPU)],
)
def test_adapters_in_bf16_under_zero_0_and_3(tiny, chain, tmp_path, device):
    """All steps, on one base; a resumed run ends as one that was not stopped."""
    jobs, at, bf16 = [], {}, (*RANK, "--dtype", "bf16", "--learning_rate", 1e-2)
    for stage in (0, 3):
        out, how = tmp_path / str(stage), (*bf16, "--zero_stage", stage, "--save_every", 1)
        at[stage] = out
        step3 = ppo(tiny, out / "sft", out / "reward", out / "ppo", *how, *SHARED)
        cut = ppo(tiny, out / "sft", out / "reward", out / "cut", *how, *SHARED)
        jobs += [
            sft(tiny, out / "sft", *bf16, "--zero_stage", stage),
            reward(tiny, out / "sft", out / "reward", *bf16, "--zero_stage", stage),
            step3,
            stopped(cut, 2),
            (cut[0], [*cut[1], "--resume", "auto"]),
        ]
    said = run_ranks(jobs, 1, accelerator=device)
    assert said.count("actor's base, critic's base unchanged") == 6
    for stage, out in at.items():
        assert_same_end(out / "cut", out / "ppo")
        kl = [row["kl"] for row in metrics_of(out / "ppo") if "kl" in row]
        assert abs(kl[0]) < 1e-2 < kl[-1], (stage, kl)
    for name in ("sft", "reward"):
        # bf16 keeps three digits, and gradients of another stage are summed in another order.
        zero0, zero3 = ([row["loss"] for row in metrics_of(out / name)] for out in at.values())
        assert zero0 == pytest.approx(zero3, rel=3e-2, abs=3e-2)


@pytest.mark.slow
def test_nlpo_and_trpo_train_adapters_in_bf16(tiny, chain, tmp_path):
    """One copies the policy with its adapters, the other takes steps of theirs back."""
    jobs = [reward(tiny, chain / "sft", tmp_path / "reward", *RANK, "--dtype", "bf16")]
    for method, flags in {"nlpo": (), "trpo": ("--ppo_epochs", 1)}.items():
        for stage in (0, 3):
            how = (*RANK, *SHARED, "--dtype", "bf16", "--zero_stage", stage, "--algorithm", method)
            out = tmp_path / f"{method}{stage}"
            jobs.append(ppo(tiny, chain / "sft", tmp_path / "reward", out, *how, *flags))
    run_ranks(jobs, 1)
    for method in ("nlpo", "trpo"):
        runs = [metrics_of(tmp_path / f"{method}{stage}") for stage in (0, 3)]
        kl = [[row["kl"] for row in run if "kl" in row] for run in runs]
        assert kl[0][0] == pytest.approx(kl[1][0], rel=1e-2, abs=1e-3), kl
        assert all(abs(one[-1] - one[0]) > 1e-4 for one in kl), kl
        moved = load_file(tmp_path / f"{method}3/actor/adapter_model.safetensors")
        assert all(t.isfinite().all() and t.abs().max() > 0 for t in moved.values())
