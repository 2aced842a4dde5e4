"""Which weights stay as they are, by name, in language models and under a head of one number."""

import re

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.helpers.jobs import preference, sft
from tests.helpers.running import run_ranks
from utils.models import freezing
from utils.models.freezing import Freezing
from utils.models.scalar_model import ScalarModel

SIZES = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=9)


def model_of(scalar=False, **settings):
    config = transformers.LlamaConfig(num_hidden_layers=3, num_labels=1, **SIZES, **settings)
    if scalar:
        return ScalarModel(transformers.AutoModelForSequenceClassification.from_config(config))
    return transformers.AutoModelForCausalLM.from_config(config)


EVERY = {n for n, _ in model_of().named_parameters()}
EMBEDDING = {"model.embed_tokens.weight"}
LAYERS = [{n for n in EVERY if n.startswith(f"model.layers.{i}.")} for i in range(3)]


def frozen(model) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    "how, expected",
    [
        (dict(), set()),
        (dict(freeze_bottom_layers=1), EMBEDDING | LAYERS[0]),
        (dict(freeze_bottom_layers=3), EVERY - {"model.norm.weight", "lm_head.weight"}),
        (dict(freeze=["embed", r"layers\.[12]\."]), EMBEDDING | LAYERS[1] | LAYERS[2]),
        (
            dict(freeze=["lm_head"], freeze_bottom_layers=1),
            EMBEDDING | LAYERS[0] | {"lm_head.weight"},
        ),
        (dict(trainable_modules=[r"layers\.2\."]), EVERY - LAYERS[2]),
        (
            dict(trainable_modules=[r"layers\.2\."], freeze=["mlp"]),
            EVERY - {n for n in LAYERS[2] if "mlp" not in n},
        ),
    ],
)
def test_what_is_named_is_frozen_and_nothing_else(how, expected):
    model = model_of()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    held = sum(sizes[name] for name in expected)
    said = freezing.apply(model, Freezing(**how))
    assert frozen(model) == expected == freezing.frozen_by(model, Freezing(**how))
    free = sum(sizes.values()) - held
    assert said == f"{free:,} weights are trained, {held:,} are frozen"


def test_a_tied_head_is_frozen_with_the_embeddings():
    model = model_of(tie_word_embeddings=True)
    freezing.apply(model, Freezing(freeze_bottom_layers=2))
    assert frozen(model) == EMBEDDING | LAYERS[0] | LAYERS[1]
    assert not model.lm_head.weight.requires_grad


@pytest.mark.parametrize("how", [dict(freeze=["."]), dict(trainable_modules=["norm"])])
def test_a_head_of_one_number_is_trained_in_any_case(how):
    model = model_of(scalar=True)
    freezing.apply(model, Freezing(**how))
    assert model.classifier.score.weight.requires_grad
    assert not model.classifier.model.layers[1].mlp.up_proj.weight.requires_grad
    assert model.classifier.model.norm.weight.requires_grad == ("freeze" not in how)


def test_what_was_frozen_before_stays_so():
    model = model_of()
    model.model.norm.weight.requires_grad_(False)
    freezing.apply(model, Freezing(trainable_modules=["norm"]))
    assert "model.norm.weight" in frozen(model)


@pytest.mark.parametrize(
    "how, problem",
    [
        (dict(freeze_bottom_layers=4), "the model has 3 layers; set --freeze_bottom_layers to 3"),
        (
            dict(freeze=["mlp", "nothing"]),
            "'nothing' matches no weight; names look like .*--freeze",
        ),
        (dict(trainable_modules=["nothing"]), "matches no weight; .*change --trainable_modules"),
        (dict(freeze=["."]), "every weight is frozen"),
    ],
)
def test_what_cannot_be_meant_is_refused(how, problem):
    with pytest.raises(SystemExit, match=problem):
        freezing.apply(model_of(), Freezing(**how))


@pytest.mark.parametrize(
    "how", [["--freeze", "embed", r"layers\.0\.mlp"], ["--freeze_bottom_layers", 1]]
)
def test_frozen_weights_end_as_they_began_and_all_others_move(chain, tiny, tmp_path, how):
    short = ["--max_steps", 2, "--max_eval_rows", 8, "--sample_answers", 0]
    jobs = [sft(tiny, tmp_path / "sft", *short, *how)]
    jobs += [preference(tiny, chain / "sft", tmp_path / "preference", *short[:4], *how)]
    said = run_ranks(jobs, 1)
    for start, name in ((tiny / "base_model", "sft"), (chain / "sft", "preference")):
        before, after = (load_file(f / "model.safetensors") for f in (start, tmp_path / name))
        held = {n for n in before if torch.equal(before[n], after[n])}
        wanted = [p for p in how[1:] if isinstance(p, str)] or ["embed", r"layers\.0\."]
        assert held == {n for n in before if any(re.search(p, n) for p in wanted)}, name
        count = sum(before[n].numel() for n in held)
        assert said.count(f"{count:,} are frozen") == 2
