"""The table of metrics, and how numbers of many parts become one."""

import pytest
import torch

from step1_sft.config import SFTConfig
from utils import metrics
from utils.distributed import process_group
from utils.errors import UserError
from utils.metrics import Metric
from utils.run import Run


def test_a_name_without_a_row_is_refused(monkeypatch):
    monkeypatch.setattr(metrics, "TABLE", {})
    metrics.register("step 9", Metric("loss", "nats", "…"), Metric("eval/pairs", "", "…"))
    metrics.check(["loss", "eval/loss", "actor_loss", "first_loss", "eval/pairs"])
    with pytest.raises(KeyError, match="without a row in the table: los, pairs, eval_loss; add"):
        metrics.check(["loss", "los", "pairs", "eval_loss"])


def test_a_name_has_one_row_a_step(monkeypatch):
    monkeypatch.setattr(metrics, "TABLE", {})
    metrics.register("step 1", Metric("loss", "nats", "…"))
    metrics.register("step 1", Metric("loss", "nats", "…"))  # a main that is run and imported
    metrics.register("step 2", Metric("loss", "nats a pair", "…"))
    with pytest.raises(ValueError, match="metric 'loss' has two rows in step 2"):
        metrics.register("step 2", Metric("loss", "nats", "…"))


def test_sums_are_over_micro_batches_and_ranks(monkeypatch):
    monkeypatch.setattr(process_group, "sum_over_ranks", lambda x, device: [3 * v for v in x])
    sums = metrics.Sums(torch.device("cpu"))
    weight = torch.tensor(2.0, requires_grad=True)
    for value in (2**24, 1.0, 1.0):  # which fp32 would add up to 2^24
        sums.add({"a": weight / 2 * value, "b": 7})
    assert sums.over(2) == {"a": 3 * (2**24 + 2) / 2, "b": 3 * 21 / 2}


def test_means_are_over_what_is_finite():
    nan = float("nan")
    found = metrics.mean_over([{"a": 1.0, "b": nan}, {"a": nan, "b": nan}, {"a": 4.0, "b": nan}])
    assert found["a"] == 2.5 and found["b"] != found["b"]


def test_a_misspelt_metric_of_keep_best_ends_the_run_before_it_begins(tmp_path):
    config = SFTConfig(output_dir=str(tmp_path), keep_best="eval/los:min")
    with pytest.raises(UserError, match="no metric is called 'eval/los'; set --keep_best"):
        Run(config)
