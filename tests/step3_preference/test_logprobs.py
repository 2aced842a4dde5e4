"""The reference's numbers: computed once, and read again for the same rows and reference alone."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from step3_preference import logprobs
from step3_preference.config import PreferenceConfig
from utils.data import chat_template
from utils.data.preferences import Answers


class Rows(list):
    def fingerprint(self):
        return str([row.answers for row in self])


ROWS = Rows(
    [
        Answers([[5, 6, 7, 8], [5, 6, 9]], [2, 2], [1.0, 0.0], [1, 1]),
        Answers([[10, 11, 12], [10, 13], [10, 14, 15, 16]], [1, 1, 1], [2.0, 1.0, 0.0], [1, 1, 1]),
        Answers([[17, 18, 19], [17, 20]], [1, 1], [1.0, 0.0], [1, 1]),
    ]
)


@pytest.fixture
def run(tiny, tmp_path):
    config = PreferenceConfig(
        output_dir=str(tmp_path), model_name_or_path=str(tiny / "base_model"), micro_batch_size=2
    )
    said = []
    return SimpleNamespace(
        config=config, dtype="fp32", device=torch.device("cpu"), say=said.append, said=said
    )


def numbers_of(run, parts):
    tokenizer = chat_template.load_tokenizer(run.config.model_name_or_path)
    return logprobs.of_reference(run.config, parts, tokenizer, run)


@torch.no_grad()
def by_row(path) -> list[list[float]]:
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(path).eval(), []
    for row in ROWS:
        found.append([])
        for ids, begin in zip(row.answers, row.begins, strict=True):
            logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            found[-1].append(float(sum(logs[t - 1, ids[t]] for t in range(begin, len(ids)))))
    return found


def test_every_answer_has_its_own_number(run, tiny):
    found = numbers_of(run, {"train": ROWS, "held": Rows(ROWS[1:])})
    expected = by_row(tiny / "base_model")
    for a, e in zip(found["train"] + found["held"], expected + expected[1:], strict=True):
        assert a == pytest.approx(e, abs=1e-4)


def test_they_are_read_again_for_the_same_rows_and_reference_alone(run, tiny, monkeypatch):
    first = numbers_of(run, {"train": ROWS})
    loaded, load = [], logprobs.language_model.load
    monkeypatch.setattr(
        logprobs.language_model, "load", lambda *a, **k: loaded.append(a[1]) or load(*a, **k)
    )
    assert numbers_of(run, {"train": ROWS}) == first and not loaded
    assert "read from" in run.said[-1]
    # Anything else is computed anew: other rows, another dtype, a file that was cut.
    turned = numbers_of(run, {"train": Rows(ROWS[::-1])})["train"]
    assert turned == [pytest.approx(row, abs=1e-5) for row in first["train"][::-1]]
    assert len(loaded) == 1
    run.dtype = "bf16"
    numbers_of(run, {"train": Rows(ROWS[::-1])})
    assert len(loaded) == 2
    file = logprobs.Path(run.config.output_dir) / logprobs.FILE
    file.write_bytes(file.read_bytes()[:200])
    numbers_of(run, {"train": Rows(ROWS[::-1])})
    assert len(loaded) == 3


def test_a_reference_whose_ids_mean_other_text_is_refused(run, tiny, tmp_path):
    other = chat_template.load_tokenizer(str(tiny / "base_model"))
    other.add_tokens(["zyx"])
    shutil.copytree(tiny / "base_model", tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    run.config.reference_model = str(tmp_path / "other")
    with pytest.raises(SystemExit, match="differ in vocabulary: .* as --reference_model"):
        numbers_of(run, {"train": ROWS})


def test_numbers_of_an_adapter_are_those_of_its_base_as_it_is_now(tiny, tmp_path):
    shutil.copytree(tiny / "base_model", tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    settings = json.dumps({"base_model_name_or_path": str(tmp_path / "base")})
    (tmp_path / "adapter/adapter_config.json").write_text(settings)
    keys = [logprobs._key(str(tmp_path / "adapter"), "fp32", {})]
    assert keys[0] == logprobs._key(str(tmp_path / "adapter"), "fp32", {})
    os.utime(tmp_path / "base/model.safetensors", (0, 0))  # written anew
    assert logprobs._key(str(tmp_path / "adapter"), "fp32", {}) not in keys
