"""Adapters: what peft makes of the folders, merged and unmerged, what is trained, several models on
one base, what is refused."""

import json
import math
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file

from evaluation import checkpoints
from utils.checkpoints.model_folder import ModelFolder, save
from utils.data import chat_template
from utils.models import adapters, language_model, merge, scalar_model
from utils.models.adapters import Lora
from utils.models.loading import Loading

LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
IDS = torch.randint(5, 300, (3, 11), generator=torch.Generator().manual_seed(1))
VARIANTS = list(adapters.VARIANTS)


def load(path, dtype="fp32", **settings):
    tokenizer = chat_template.load_tokenizer(str(path))
    return language_model.load(Loading(), str(path), dtype=dtype, tokenizer=tokenizer, **settings)


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def moved(model, seed: int = 3):
    """The model once its adapters are no longer what they begin as."""
    generator = torch.Generator().manual_seed(seed)
    for _, p in adapters.own_of(model):
        p.data += 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)
    return model


def saved(model, folder, path):
    save(folder, {".": ModelFolder(model, chat_template.load_tokenizer(str(path)), "x: 1")})
    return folder


@pytest.fixture(scope="module", params=VARIANTS)
def adapted(request, tiny, tmp_path_factory):
    """(variant, folder, logits of the model that was saved there)"""
    base, folder = tiny / "base_model", tmp_path_factory.mktemp(request.param)
    model = moved(load(base, lora=Lora(4, 8.0, lora_variant=request.param)))
    return request.param, saved(model, folder, base), logits_of(model)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder of a GPT-2, whose layers hold their weights as (in, out)."""
    from tests.helpers import families
    from utils.models import from_scratch

    folder = tmp_path_factory.mktemp("gpt2")
    texts = [f"number {i} of {i * i}" for i in range(400)]
    families.write(folder, "GPT2", from_scratch.train_tokenizer(texts, 350))
    (path,) = {file.parent for file in folder.rglob("config.json") if "reward" not in str(file)}
    return path


def test_fresh_adapters_change_nothing_and_all_linear_layers_have_one(tiny, capsys):
    base = tiny / "base_model"
    before = torch.get_rng_state()
    model = load(base, lora=Lora(4, seed=5))
    assert torch.equal(torch.get_rng_state(), before)  # a run's own draws stay as they were
    assert torch.equal(logits_of(model), logits_of(load(base)))
    assert sorted({name.rpartition(".")[2] for name in adapters.layers_of(model)}) == LINEAR
    # rank · (in + out) numbers a layer: hidden 32, intermediate 64, of two layers.
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
    assert "adapters of rank 4 (lora) on down_proj, gate_proj" in capsys.readouterr().out
    same, other = (load(base, lora=Lora(4, seed=seed)) for seed in (5, 6))
    name = "model.layers.1.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(model.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(model.get_parameter(name), other.get_parameter(name))


def test_a_folder_is_one_of_peft(adapted, tiny):
    variant, folder, logits = adapted
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny / "base_model")
    assert settings["target_modules"] == LINEAR
    assert (settings["use_dora"], settings["use_rslora"]) == (
        variant == "dora",
        variant == "rslora",
    )
    plain = AutoPeftModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits_of(plain), logits, rtol=0, atol=1e-5)
    assert (logits - logits_of(load(tiny / "base_model"))).abs().max() > 0.1
    assert chat_template.load_tokenizer(str(folder)).chat_template
    weights = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)  # and nothing of the base


def test_what_a_router_counts_stays_the_bases(tiny, tmp_path):
    base = tiny / "base_model"
    model = moved(load(base, lora=Lora(4)))
    model.model.layers[1].mlp.register_buffer("e_score_correction_bias", torch.ones(3))
    again = load(saved(model, tmp_path, base))
    assert torch.equal(logits_of(again), logits_of(model))


def test_a_folder_loads_as_it_was_saved(adapted):
    _, folder, logits = adapted
    assert torch.equal(logits_of(load(folder)), logits)
    shown, _ = checkpoints.load_checkpoint(str(folder), dtype="fp32", trust_remote_code=False)
    torch.testing.assert_close(logits_of(shown), logits, rtol=0, atol=1e-5)  # other kernels


def test_merged_is_unmerged_to_fp32_rounding(adapted, tmp_path):
    _, folder, logits = adapted
    merge.write(folder, tmp_path / "whole", trust_remote_code=False)
    assert not adapters.settings_of(load(tmp_path / "whole"))
    trained = load(folder, lora=Lora())  # rank 0: all of it is trained
    assert all(p.requires_grad for p in trained.parameters())
    for whole in (load(tmp_path / "whole"), trained):
        torch.testing.assert_close(logits_of(whole), logits, rtol=1e-5, atol=1e-5)
    # A merge in bf16 loses what fp32 keeps: therefore adapters stay beside the base.
    merge.write(folder, tmp_path / "bf16", trust_remote_code=False, dtype="bf16")
    lost = (logits_of(load(tmp_path / "bf16")) - logits).abs().max()
    assert lost > 1e3 * (logits_of(load(tmp_path / "whole")) - logits).abs().max()


def test_layers_that_hold_their_weights_the_other_way_merge_too(gpt2):
    for variant in VARIANTS:
        model = moved(load(gpt2, lora=Lora(2, lora_variant=variant)))
        assert all(layer.fan_in_fan_out for layer in adapters.layers_of(model).values())
        logits = logits_of(model)
        adapters.merge(model)
        torch.testing.assert_close(logits_of(model), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scale_is_that_of_the_papers(tiny, variant):
    model = moved(load(tiny / "base_model", lora=Lora(4, 12.0, lora_variant=variant)))
    layer = next(iter(adapters.layers_of(model).values()))
    low, high = (x["default"].weight.double() for x in (layer.lora_A, layer.lora_B))
    weight = layer.get_base_layer().weight.double()
    weight = weight + 12 / (math.sqrt(4) if variant == "rslora" else 4) * high @ low
    if variant == "dora":
        norms = torch.tensor([math.sqrt(sum(x * x for x in row)) for row in weight.tolist()])
        magnitude = layer.lora_magnitude_vector["default"].weight.double()
        weight = weight / norms[:, None].double() * magnitude[:, None]
    name = next(iter(adapters.layers_of(model)))
    parts = adapters.parts_of(name, dict(model.named_parameters()))
    found = adapters.merged_weight(layer, layer.get_base_layer().weight, *parts)
    torch.testing.assert_close(found.double(), weight, rtol=1e-5, atol=1e-6)


def test_a_reward_model_keeps_its_head_bias_and_base(tiny, adapted, tmp_path):
    variant, folder, _ = adapted
    tokenizer = chat_template.load_tokenizer(str(folder))
    given = dict(dtype="fp32", tokenizer=tokenizer)
    lora = Lora(4, 8.0, lora_variant=variant)
    model = scalar_model.load(Loading(), str(folder), head="normal", lora=lora, **given)
    moved(model.classifier)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in adapters.own_of(model)}
    assert "classifier.score.weight" in trained
    model.set_bias(0.75)
    out = saved(model.classifier, tmp_path / "reward", folder)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    again = scalar_model.load(Loading(), str(out), **given)
    with torch.no_grad():
        scores = model.eval()(IDS, mask)
        assert torch.equal(again.eval()(IDS, mask), scores)
        plain = AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=1).eval()
        raw = plain(input_ids=IDS, attention_mask=mask.long()).logits.squeeze(1)
        torch.testing.assert_close(raw - 0.75, scores[:, -1], rtol=0, atol=1e-5)
        merge.write(out, out, trust_remote_code=False)  # in place: nothing of the adapter stays
        assert not list(out.glob("adapter_*"))
        whole = scalar_model.load(Loading(), str(out), **given).eval()
        torch.testing.assert_close(whole(IDS, mask), scores, rtol=1e-5, atol=1e-5)
    with pytest.raises(SystemExit, match="is a reward model or critic and writes no text"):
        load(out)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("new", ["pad", "turn"])
def test_a_reward_model_stands_on_grown_embeddings(tiny, gpt2, tmp_path, family, new):
    base = tiny / "base_model" if family == "llama" else gpt2
    tokenizer = chat_template.load_tokenizer(str(base))
    rows = load(base).get_input_embeddings().num_embeddings
    others = [f"<|{i}|>" for i in range(rows - len(tokenizer) + (new == "turn"))]
    tokenizer.add_special_tokens({"additional_special_tokens": others})
    if new == "pad":
        tokenizer.add_special_tokens({"pad_token": "<|no token so far|>"})
    assert len(tokenizer) == rows + 1
    given = dict(dtype="fp32", tokenizer=tokenizer)
    model = moved(language_model.load(Loading(), str(base), lora=Lora(4), **given))
    save(tmp_path, {"sft": ModelFolder(model, tokenizer, "x: 1")})
    mask = torch.ones_like(IDS, dtype=torch.bool)
    ids = IDS if new == "pad" else IDS.index_fill(1, torch.tensor([4]), rows)
    for start in (base, tmp_path / "sft") if new == "pad" else (tmp_path / "sft",):
        reward = scalar_model.load(Loading(), str(start), head="normal", lora=Lora(4), **given)
        moved(reward.classifier)
        out = saved(reward.classifier, tmp_path / "reward", tmp_path / "sft")
        with torch.no_grad():
            scores = reward.eval()(ids, mask)
            for how in ({}, dict(head="zero", lora=Lora(4))):  # to judge, or as critic
                again = scalar_model.load(Loading(), str(out), **given, **how).eval()
                assert torch.equal(again(ids, mask), scores)
            merge.write(out, tmp_path / "whole", trust_remote_code=False)
            whole = scalar_model.load(Loading(), str(tmp_path / "whole"), **given).eval()
            torch.testing.assert_close(whole(ids, mask), scores, rtol=1e-5, atol=1e-4)


def test_embeddings_that_have_grown_are_trained_and_saved(tiny, tmp_path):
    base = tiny / "base_model"
    tokenizer = chat_template.load_tokenizer(str(base))
    rows = load(base).get_input_embeddings().num_embeddings
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{i}|>" for i in range(rows)]})
    given = dict(dtype="fp32", tokenizer=tokenizer)
    model = moved(language_model.load(Loading(), str(base), lora=Lora(4), **given))
    assert model.get_input_embeddings().weight.requires_grad
    save(tmp_path, {".": ModelFolder(model, tokenizer, "x: 1")})
    again = language_model.load(Loading(), str(tmp_path), **given)
    assert torch.equal(logits_of(again), logits_of(model))
    more = language_model.load(Loading(), str(tmp_path), lora=Lora(4), **given)
    assert more.get_input_embeddings().weight.requires_grad


def test_what_does_not_fit_is_refused_by_name(tiny, adapted, tmp_path):
    variant, folder, _ = adapted
    base = tiny / "base_model"
    with pytest.raises(SystemExit, match="no linear layer below its head called lm_head, query"):
        load(base, lora=Lora(4, lora_target_modules=["query", "q_proj", "lm_head"]))
    other = "rslora" if variant == "lora" else "lora"
    asked = Lora(8, 8.0, lora_variant=other, lora_target_modules=["q_proj"])
    with pytest.raises(SystemExit) as refusal:
        load(folder, lora=asked)
    for part in ("--lora_rank 4 (now 8)", f"--lora_variant {variant} (now {other})", "q_proj"):
        assert part in str(refusal.value)
    assert "lora_alpha" not in str(refusal.value)
    settings = json.loads((folder / "adapter_config.json").read_text())

    def broken(**changes):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | changes))
        return load(tmp_path)

    with pytest.raises(SystemExit, match="'/nowhere', which is not there"):
        broken(base_model_name_or_path="/nowhere")
    with pytest.raises(SystemExit, match="which is an adapter itself"):
        broken(base_model_name_or_path=str(folder))
    with pytest.raises(SystemExit, match="does not fit its base"):
        broken(r=2)
    with pytest.raises(SystemExit, match="with bias 'all'"):
        broken(bias="all")
    with pytest.raises(SystemExit, match="does not fit its base"):
        broken(target_modules=["q_proj"])
    with pytest.raises(SystemExit, match="nothing to merge"):
        merge.write(base, tmp_path / "x", trust_remote_code=False)


def test_dropout_is_of_the_adapters_alone(tiny):
    model = load(tiny / "base_model", lora=Lora(4, lora_dropout=0.25))
    rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}
    assert torch.equal(logits_of(model), logits_of(load(tiny / "base_model")))


def test_a_folder_of_another_program_keeps_its_pattern_and_its_own_embeddings(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    tokenizer, base = chat_template.load_tokenizer(str(tiny / "base_model")), tmp_path / "base"
    apart = load(tiny / "base_model")
    apart.lm_head.weight = torch.nn.Parameter(apart.lm_head.weight.detach().clone())
    apart.config.tie_word_embeddings = False
    save(tmp_path, {"base": ModelFolder(apart, tokenizer, "x: 1")})
    config = LoraConfig(
        r=4,
        target_modules=r".*\.[qv]_proj",
        modules_to_save=["embed_tokens"],
        task_type="CAUSAL_LM",
    )
    plain = get_peft_model(load(base), config)
    for p in plain.parameters():
        if p.requires_grad:
            p.data += 0.1
    logits = logits_of(plain)
    plain.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    bases = {}
    whole = load(base, lora=Lora(4, 8.0), shared=bases)
    before = logits_of(whole)
    lora = Lora(4, 8.0)
    model = load(tmp_path / "theirs", lora=lora, shared=bases)
    torch.testing.assert_close(logits_of(model), logits, rtol=0, atol=1e-5)
    assert torch.equal(logits_of(whole), before)  # on the base that both name
    again = load(saved(moved(model), tmp_path / "ours", base), lora=lora)
    assert torch.equal(logits_of(again), logits_of(model))
    bases = {}
    model = load(tmp_path / "theirs", lora=lora, shared=bases)
    other = load(tmp_path / "theirs", shared=bases)
    logits_of(moved(model))
    torch.testing.assert_close(logits_of(other), logits, rtol=0, atol=1e-5)
    settings = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tiny / "base_model")
    (tmp_path / "theirs/adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="apart from the head, and .* ties the two"):
        load(tmp_path / "theirs")


def test_adapters_taken_out_of_the_base_get_a_base_of_their_own(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny / "base_model"
    config = LoraConfig(r=4, init_lora_weights="pissa", task_type="CAUSAL_LM")
    theirs = get_peft_model(load(base), config)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            p.data += 0.1
    logits = logits_of(theirs)
    theirs.save_pretrained(tmp_path)
    chat_template.load_tokenizer(str(base)).save_pretrained(tmp_path)
    bases: dict = {}
    whole = load(base, lora=Lora(4), shared=bases)
    before = logits_of(whole)
    model = load(tmp_path, shared=bases)
    torch.testing.assert_close(logits_of(model), logits, rtol=0, atol=1e-4)
    assert torch.equal(logits_of(whole), before)
    merged = load(tmp_path, lora=Lora())  # all of it is trained
    torch.testing.assert_close(logits_of(merged), logits, rtol=0, atol=1e-4)
    with pytest.raises(SystemExit, match="init_lora_weights='pissa', which changes its base"):
        load(tmp_path, lora=Lora(4, 8.0))


def test_a_run_without_adapters_does_without_peft(tiny, tmp_path, monkeypatch):
    """An environment that brings its own packages may lack it."""
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it is an error
    model = load(tiny / "base_model", lora=Lora())
    adapters.same_layers(model, model)
    saved(model, tmp_path / "out", tiny / "base_model")
    assert torch.equal(logits_of(load(tmp_path / "out")), logits_of(model))
