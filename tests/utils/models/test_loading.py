"""Damaged and unfit model folders are refused with what was expected and found, nothing stays at
random; what loads is ready to train: embeddings, dropout, gradient checkpointing."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from evaluation import checkpoints
from tests.helpers.families import FAMILIES, LLAMA_LIKE, READ_THEIR_CONFIG, with_dropout
from tests.helpers.jobs import ppo, sft
from tests.helpers.running import run_ranks
from utils.data import chat_template
from utils.models import language_model, loading, scalar_model
from utils.models.freezing import layers_of
from utils.models.loading import Loading

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tiny, tmp_path):
    shutil.copytree(tiny / "base_model", tmp_path / "model")
    return tmp_path / "model"


def load_all(folder, kinds=("lm", "evaluation", "normal")):
    """Every way in which the programs load a model; the models."""
    models = []
    for kind in kinds:
        if kind == "evaluation":
            models.append(
                checkpoints.load_checkpoint(str(folder), dtype="fp32", trust_remote_code=False)[0]
            )
            continue
        language_model.check_positions(str(folder), 10, "--max_length", False)
        how = {"dtype": "fp32"}
        how["tokenizer"] = chat_template.load_tokenizer(str(folder))
        if kind == "lm":
            models.append(language_model.load(Loading(), str(folder), **how))
        else:
            models.append(scalar_model.load(Loading(), str(folder), head=kind, **how))
    return models


def assert_refused(folder, *words) -> None:
    """Each way of loading ends with one message that names the folder and holds the words."""
    for kind in ("lm", "evaluation", "normal"):
        with pytest.raises(SystemExit) as caught:
            load_all(folder, [kind])
        for word in (str(folder), *words):
            assert word in str(caught.value), (kind, caught.value)


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    weights = {name: w.contiguous() for name, w in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    settings = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(settings))


def test_the_sound_folder_loads(folder):
    assert len(load_all(folder)) == 3


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("config.json", b'{"model_type": "lla', ["config.json"]),
        ("config.json", b"{}", ["model_type"]),
        ("config.json", b"[]", ["it holds chat_template.jinja, config.json"]),
        ("tokenizer.json", b"{", ["a tokenizer"]),
        ("tokenizer.json", b'{"version": "1.0", "added_tokens": [], "model": {}}', ["a tokenizer"]),
        ("tokenizer_config.json", b"[]", ["a tokenizer"]),
        ("chat_template.jinja", b"{% for m in %}", ["the chat template of"]),
        ("chat_template.jinja", b"{{ 1/0 }}", ["division by zero"]),
        ("chat_template.jinja", b"{{ messages[7].content }}", ["the chat template of"]),
        ("model.safetensors", b"", ["header too small"]),
        ("model.safetensors", b"\xff" * 100, ["header too large"]),
        ("tokenizer.json", None, ["a tokenizer", "it holds chat_template.jinja, config.json"]),
        ("model.safetensors", None, ["no file named model.safetensors"]),
        ("config.json", None, []),
    ],
)
def test_a_damaged_or_missing_file(folder, name, content, words):
    if content is None:
        (folder / name).unlink()
        if name == "tokenizer.json":
            (folder / "tokenizer_config.json").unlink()
    else:
        (folder / name).write_bytes(content)
    assert_refused(folder, *words)


def test_truncated_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert_refused(folder, "incomplete metadata, file not fully covered")


def test_weights_of_another_shape(folder):
    change_weights(folder, lambda weights: weights.update({Q: weights[Q][:16]}))
    assert_refused(folder, f"{Q} (found [16, 32], expected [32, 32])")


def test_a_weight_that_is_not_there(folder):
    change_weights(folder, lambda weights: weights.pop(Q))
    assert_refused(folder, "lacks weights of Llama", Q, "would stay random")


@pytest.mark.parametrize(
    "values, words",
    [
        ({"num_hidden_layers": 3}, ["lacks weights", "model.layers.2."]),
        ({"num_hidden_layers": 1}, ["layers that its config.json leaves out", "model.layers.1."]),
        ({"vocab_size": 1024}, ["embed_tokens.weight (found [512, 32], expected [1024, 32])"]),
        ({"vocab_size": 128}, ["embed_tokens.weight (found [512, 32], expected [128, 32])"]),
        ({"hidden_size": 64}, ["another shape"]),
        ({"model_type": "gpt2"}, ["lacks weights of GPT2"]),
        ({"model_type": "nonsense"}, ["nonsense"]),
        ({"num_attention_heads": 0}, []),
        ({"num_attention_heads": "four"}, ["num_attention_heads"]),
    ],
)
def test_a_config_that_does_not_fit_its_weights(folder, values, words):
    change_config(folder, **values)
    assert_refused(folder, *words)


def in_shards(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    return sorted(folder.glob("model-*.safetensors"))


def test_shards(folder):
    shards = in_shards(folder)
    assert len(load_all(folder)) == 3
    shards[1].unlink()
    assert_refused(folder, f"No such file or directory: {shards[1]}")


@pytest.mark.parametrize("index", ["{", "{}", '{"metadata": {}, "weight_map": {}}'])
def test_a_damaged_index_of_shards(folder, index):
    in_shards(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    assert_refused(folder, "cannot load a model")


# Pickles.


class Program:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_pickled_weights_are_read_as_tensors_only(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    (model,) = load_all(folder, ["lm"])
    assert torch.equal(model.state_dict()[Q], weights[Q])
    torch.save(weights | {"x": Program(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert_refused(folder, "hold more than tensors")
    assert not (tmp_path / "ran").exists(), "the pickle's program ran"
    torch.save(weights, folder / "pytorch_model.bin")
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[:1000])
    assert_refused(folder, "cannot load a model")


# Vocabularies.


def add_tokens(folder, count, special):
    tokenizer = chat_template.load_tokenizer(str(folder))
    tokenizer.add_tokens([f"<new{i}>" for i in range(count)], special_tokens=special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_tokenizer_of_another_vocabulary(folder):
    add_tokens(folder, 100, special=False)
    assert_refused(folder, "embeddings for 512 tokens and the tokenizer 612, of which 100 would")


def test_new_special_tokens_grow_a_language_model_but_no_reward_model(folder, tmp_path):
    (scalar,) = load_all(folder, ["normal"])
    tokenizer = add_tokens(folder, 3, special=True)
    for model in load_all(folder)[:2]:
        assert model.get_input_embeddings().num_embeddings == 576
    scalar.classifier.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    with pytest.raises(SystemExit, match="512 tokens and the tokenizer 515"):
        load_all(tmp_path / "reward", ["saved"])


def test_heads(folder, tmp_path):
    """No head, a head of five labels, a head where a language model is asked for."""
    with pytest.raises(SystemExit, match="has no reward head"):
        load_all(folder, ["saved"])
    (scalar,) = load_all(folder, ["normal"])
    scalar.classifier.save_pretrained(tmp_path / "reward")
    chat_template.load_tokenizer(str(folder)).save_pretrained(tmp_path / "reward")
    (again,) = load_all(tmp_path / "reward", ["saved"])
    assert torch.equal(again.classifier.score.weight, scalar.classifier.score.weight)
    for kind in ("lm", "evaluation"):
        with pytest.raises(SystemExit, match="is a reward model or critic and writes no text"):
            load_all(tmp_path / "reward", [kind])
    five = lambda weights: weights.update({"score.weight": torch.zeros(5, 32)})  # noqa: E731
    change_weights(tmp_path / "reward", five)
    with pytest.raises(SystemExit, match=r"score.weight \(found \[5, 32\], expected \[1, 32\]\)"):
        load_all(tmp_path / "reward", ["saved"])


# Programs that come with a model.


def test_a_models_own_program_runs_only_when_asked(folder, tmp_path):
    program = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (folder / "mine.py").write_text(program)
    change_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.C"})
    assert_refused(folder, "custom code")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["/no/where", "", "x" * 300, "/dev/null", __file__])
def test_what_is_no_folder_is_named(path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as caught:
        chat_template.load_tokenizer(path)
    assert "cannot load a tokenizer from" in str(caught.value)


# Ready to train.


def test_a_folder_that_lacks_weights_is_refused(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny / "base_model", folder)
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "mlp" in name)
    weights.pop(gone)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="lacks weights of LlamaForCausalLM.*mlp"):
        language_model.load(Loading(), str(folder), dtype="fp32")
    with pytest.raises(SystemExit, match="cannot load a model"):
        language_model.load(Loading(), str(tmp_path / "nothing"), dtype="fp32")
    with pytest.raises(SystemExit, match="cannot load a tokenizer from"):
        chat_template.load_tokenizer(str(tmp_path / "nothing"))


def test_embeddings_grow_to_a_multiple_of_64_and_ids_agree(tiny):
    tokenizer = chat_template.load_tokenizer(str(tiny / "base_model"))
    new = [f"<extra_{i}>" for i in range(530 - len(tokenizer))]
    tokenizer.add_tokens(new, special_tokens=True)
    model = language_model.load(
        Loading(), str(tiny / "base_model"), dtype="fp32", tokenizer=tokenizer
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
    model = language_model.load(Loading(), str(folder), dtype="fp32").train()
    ids = torch.arange(20, 30)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


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


@pytest.mark.parametrize("layers, passes", [(0, [2, 2, 2]), (1, [2, 1, 1]), (2, [2, 2, 1])])
def test_layers_asked_for_are_recomputed_and_no_gradient_changes(layers, passes):
    sizes = LLAMA_LIKE | {"num_hidden_layers": 3, "vocab_size": 96}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).train()
    ids, gradients, seen = torch.arange(20, 34).view(2, 7), [], []
    for i, layer in enumerate(layers_of(model)):
        layer.mlp.register_forward_pre_hook(lambda _, __, i=i: seen.append(i))
    for prepare in (lambda m: None, lambda m: loading.checkpoint(m, layers)):
        prepare(model)
        seen.clear()
        model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert [seen.count(i) for i in range(3)] == passes
    assert all(map(torch.equal, *gradients)) and len(gradients[0]) > 20


def test_layers_are_not_counted_where_the_family_has_none_to_recompute(monkeypatch):
    monkeypatch.setattr("transformers.modeling_layers.GradientCheckpointingLayer", torch.nn.Linear)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_LIKE, vocab_size=96))
    with pytest.raises(SystemExit, match="all layers or none; leave out --checkpoint_layers"):
        loading.checkpoint(model, 1)


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
