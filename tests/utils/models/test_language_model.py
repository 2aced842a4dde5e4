"""Loading models: scores, heads, biases, embeddings, and refusals."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from step2_reward.config import RewardConfig
from tests.helpers.families import FAMILIES, READ_THEIR_CONFIG, with_dropout
from tests.helpers.jobs import ppo, sft
from tests.helpers.running import ROOT, run_ranks
from utils.data import chat_template
from utils.distributed import zero
from utils.distributed.zero import lr_factor
from utils.models import language_model, loading, scalar_model, scorer

CONFIG = RewardConfig()


def load_scalar(folder, **kwargs):
    return scalar_model.load(CONFIG, str(folder), dtype="fp32", zero_stage=0, **kwargs)


def test_scores_are_transformers_logits_before_the_bias(tiny, tmp_path):
    tokenizer = chat_template.load_tokenizer(str(tiny / "base_model"))
    model = load_scalar(tiny / "base_model", tokenizer=tokenizer, head="normal").eval()
    model.set_bias(0.75)
    model.classifier.save_pretrained(tmp_path)
    rows = [[20, 21, 22, 4], [30, 4], [23, 24, 25, 26, 27, 4]]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    expected = torch.cat([plain(input_ids=torch.tensor([r])).logits[0] for r in rows]) - 0.75
    again = load_scalar(tmp_path).eval()
    assert again.bias == 0.75
    for left in (True, False):
        for extra in (0, 3):
            width = max(map(len, rows)) + extra
            pad = tokenizer.pad_token_id
            fill = [[pad] * (width - len(r)) for r in rows]
            pairs = zip(rows, fill, strict=True)
            ids = torch.tensor([f + r if left else r + f for r, f in pairs])
            mask = ids != pad
            for m in (model, again):
                got = scorer.sequence_scores(m, ids, mask)
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_heads_are_drawn_zeroed_or_refused(tiny):
    width = 32
    normal = load_scalar(tiny / "base_model", head="normal").classifier.score.weight
    assert normal.shape == (1, width)
    assert 0.6 < normal.std() * math.sqrt(width + 1) < 1.5
    zero = load_scalar(tiny / "base_model", head="zero").classifier.score.weight
    assert (zero == 0).all()
    with pytest.raises(SystemExit, match="has no reward head"):
        load_scalar(tiny / "base_model")


def test_a_folder_that_lacks_weights_is_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny / "base_model", folder)
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "mlp" in name)
    weights.pop(gone)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="lacks weights of LlamaForCausalLM.*mlp"):
        language_model.load(CONFIG, str(folder), dtype="fp32", zero_stage=0)
    with pytest.raises(SystemExit, match="cannot load a model"):
        language_model.load(CONFIG, str(tmp_path / "nothing"), dtype="fp32", zero_stage=0)
    with pytest.raises(SystemExit, match="cannot load a tokenizer from"):
        chat_template.load_tokenizer(str(tmp_path / "nothing"))


def test_embeddings_grow_to_a_multiple_of_64_and_ids_agree(tiny):
    tokenizer = chat_template.load_tokenizer(str(tiny / "base_model"))
    new = [f"<extra_{i}>" for i in range(530 - len(tokenizer))]
    tokenizer.add_tokens(new, special_tokens=True)
    model = language_model.load(
        CONFIG, str(tiny / "base_model"), dtype="fp32", zero_stage=0, tokenizer=tokenizer
    )
    assert model.get_input_embeddings().num_embeddings == 576 == model.config.vocab_size
    assert model.get_output_embeddings().weight.shape[0] == 576
    for holder in (model.config, model.generation_config):
        assert holder.eos_token_id == tokenizer.eos_token_id
        assert holder.pad_token_id == tokenizer.pad_token_id


def test_dropout_is_off(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny / "base_model", folder)
    config = json.loads((folder / "config.json").read_text()) | {"attention_dropout": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    model = language_model.load(CONFIG, str(folder), dtype="fp32", zero_stage=0).train()
    ids = torch.arange(20, 30)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_training_only_some_weights():
    import importlib.util

    spec = importlib.util.spec_from_file_location("step2", ROOT / "step2_reward/main.py")
    step2 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step2)
    model = torch.nn.Module()
    model.classifier = torch.nn.Module()
    model.classifier.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    model.classifier.score = torch.nn.Linear(2, 1, bias=False)
    step2.freeze(model, [r"layers\.(1|2)\.weight"])
    free = {name for name, p in model.named_parameters() if p.requires_grad}
    assert free == {
        "classifier.layers.1.weight",
        "classifier.layers.2.weight",
        "classifier.score.weight",
    }
    step2.freeze(model, [])
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(SystemExit, match="matches no weight; names look like"):
        step2.freeze(model, ["nothing"])


@pytest.mark.parametrize("flags", ["avx512_bf16", "amx_tile amx_bf16"])
def test_bf16_is_the_default_where_the_processor_computes_it(monkeypatch, flags):
    cpu = torch.device("cpu")
    for there, dtype in ((flags, "bf16"), ("avx2 avx512f", "fp32")):
        text = f"model name : any\nflags : fpu {there} sse\n"
        monkeypatch.setattr(zero.Path, "read_text", lambda self, text=text: text)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        assert zero.resolve_dtype("auto", cpu) == dtype
        assert [zero.resolve_dtype(d, cpu) for d in ("fp32", "bf16")] == ["fp32", "bf16"]
    # A processor that has it, and an oneDNN that is told not to use it.
    monkeypatch.setattr(zero.Path, "read_text", lambda self: f"flags : {flags}\n")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert zero.resolve_dtype("auto", cpu) == "fp32"


@pytest.mark.parametrize("shape, end", [("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)])
def test_learning_rate_warms_up_and_decays(shape, end):
    factors = [lr_factor(step, 100, 10, shape) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11) and factors[10] == 1.0
    assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:])[::-1]
    assert factors[100] == pytest.approx(end, abs=1e-12)
    if shape == "cosine":
        assert factors[55] == pytest.approx(0.5)


def test_gradient_checkpointing_recomputes_in_every_step(tiny, chain, tmp_path):
    """A model left in eval mode, as transformers loads it, would keep all activations."""
    jobs = []
    for name, flags in (("plain", []), ("checkpointed", ["--gradient_checkpointing", "true"])):
        for step, (program, argv) in {
            "sft": sft(tiny, tmp_path / name / "sft", "--max_steps", 1, *flags),
            "ppo": ppo(
                tiny,
                chain / "sft",
                chain / "reward",
                tmp_path / name / "ppo",
                "--check_only",
                *flags,
            ),
        }.items():
            jobs.append(
                ("tests/helpers/count_forwards.py", [tmp_path / f"{name}_{step}", program, *argv])
            )
    run_ranks(jobs, 1)
    for step in ("sft", "ppo"):
        plain, more = (
            int((tmp_path / f"{name}_{step}").read_text()) for name in ("plain", "checkpointed")
        )
        assert more > plain, f"{step}: {plain} layer passes, {more} with checkpointing"


@pytest.mark.parametrize("family", FAMILIES | READ_THEIR_CONFIG)
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_no_family_keeps_dropout(family, auto):
    """Rates stand in nn.Dropout, in attributes under many names (Bloom, OPT), or are read from the
    config in each pass (Falcon)."""
    torch.manual_seed(0)  # OPT may drop all its layers, twice in a row
    ids = torch.arange(3, 30)[None]
    settings = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = auto.from_config(with_dropout(family, **settings)).train()
    first, second = (model(input_ids=ids).logits for _ in range(2))
    assert not torch.equal(first, second), "nothing to turn off"
    loading.prepare_training(model)
    first, second, third = (model(input_ids=ids).logits for _ in range(3))
    assert torch.equal(first, second) and torch.equal(second, third)
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, first, rtol=0, atol=1e-6)
