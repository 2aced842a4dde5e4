"""TRPO's line search by its definition, the restored step bit by bit, and a run with it and with
frozen layers."""

import math

import pytest
import torch
from safetensors.torch import load_file

from step3_ppo.trust_region import HALVINGS, search
from tests.helpers.jobs import ppo
from tests.helpers.running import ROOT, assert_same_path, metrics_of, run_ranks
from tests.helpers.same_end import assert_same_end

FLAGS = ["--algorithm", "trpo", "--trust_region", 0.002, "--freeze_bottom_layers", 1, "--seed", 3]


class Line:
    """Stands for Before: how far along the step the weights are."""

    def __init__(self):
        self.share, self.tried = 1.0, [1.0]

    def weights(self):
        return "end"

    def take(self, share, after):
        assert after == "end"
        self.share = share
        self.tried.append(share)

    def restore(self):
        self.share = 0.0


def loss_of(share: float, best: float) -> float:
    """Falls up to `best` along the step and rises behind it; 0 at the start."""
    return share * (share - 2 * best)


@pytest.mark.parametrize("curvature", [0.001, 0.05, 1.0, 40.0, math.inf, math.nan])
@pytest.mark.parametrize("best", [1.0, 0.3, 0.01, -1.0])
def test_the_largest_halving_that_keeps_to_the_limit_and_does_not_raise_the_loss(curvature, best):
    line, limit = Line(), 0.01

    def kl(share: float) -> float:
        return curvature * share**2 if share else 0.0

    found = search(line, lambda: (kl(line.share), loss_of(line.share, best)), 0.0, limit)
    shares = [0.5**i for i in range(HALVINGS + 1)]
    fine = [s for s in shares if kl(s) <= limit and loss_of(s, best) <= 0.0]
    expected = max(fine, default=0.0)
    assert found == {"trust_region_step": expected, "trust_region_kl": kl(expected)}
    assert line.share == expected
    assert line.tried == shares[: shares.index(expected) + 1] if expected else line.tried == shares


def test_a_step_is_shortened_and_taken_back_to_the_last_bit(tiny):
    checks = "tests/helpers/trust_region_checks.py"
    assert run_ranks([(checks, [tiny / "base_model"])], 2).count("held: ") == 2 * 4


@pytest.fixture(scope="module")
def runs(tiny, chain, tmp_path_factory):
    """One start of two ranks: ZeRO-0 and 3, a crash and a resume."""
    out = tmp_path_factory.mktemp("trpo")

    def job(name, *flags):
        return ppo(tiny, chain / "sft", chain / "reward", out / name, *FLAGS, *flags)

    saving = ["--zero_stage", 3, "--save_every", 1]
    program, argv = job("crashed", *saving)
    jobs = [job("zero0"), job("zero3", "--zero_stage", 3)]
    jobs += [("tests/helpers/stop_at.py", [ROOT / program, 2, "crash", *argv])]
    jobs += [job("crashed", *saving, "--resume", "auto")]
    return out, run_ranks(jobs, 2)


@pytest.mark.slow
def test_a_run_keeps_to_its_trust_region_and_takes_one_path(runs, chain):
    out, said = runs
    names = ["score", "kl", "policy_loss", "trust_region_step", "trust_region_kl"]
    assert_same_path({"zero0": out / "zero0", "zero3": out / "zero3"}, names)
    kls = metrics_of(out / "zero0", "trust_region_kl")
    steps = metrics_of(out / "zero0", "trust_region_step")
    assert max(kls) <= 0.002 and all(0 < step < 1 for step in steps), (kls, steps)
    start, end = (load_file(f / "model.safetensors") for f in (chain / "sft", out / "zero3/actor"))
    held = {n for n in start if torch.equal(start[n], end[n])}
    below = {n for n in start if n.startswith(("model.embed_tokens.", "model.layers.0."))}
    assert held == below and said.count("gradients reached all") >= 2


@pytest.mark.slow
def test_a_run_that_crashed_ends_as_one_that_did_not(runs):
    assert_same_end(runs[0] / "crashed", runs[0] / "zero3")
