"""Models that bring their own Python files: what is saved holds all of them, and loads from its
folder alone, moved and with the original gone."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

from evaluation import checkpoints
from step1_sft.config import SFTConfig
from tests.helpers import custom_model
from tests.helpers.families import LLAMA_LIKE
from tests.helpers.family_folders import write_tokenizer
from utils.checkpoints import model_folder as checkpoint
from utils.data import chat_template
from utils.models import language_model, scalar_model, scorer
from utils.models.ema import EMA
from utils.planner import shapes as plan_shapes

TEXTS = ["What does Tom like, 7 times?", "Ann likes tea, and Bob likes tea, too."]
SETTINGS = "output_dir: -\n"
CONFIG = SFTConfig(output_dir="-", trust_remote_code=True, packing="off")
HOW = {"dtype": "fp32", "zero_stage": 0}
FILES = {"configuration_small.py", "layers_small.py", "modeling_small.py", "tokenization_small.py"}
TURNS = [{"role": "user", "content": "What does Tom like?"}]
KINDS = {"actor": "CausalLM", "actor_ema": "CausalLM", "reward": "SequenceClassification"}
# Another process, which knows neither this repository nor what was loaded before.
ALONE = """
import json, sys
import torch, transformers
trusting = {"trust_remote_code": True}
turns, jobs = json.load(sys.stdin)
for folder, kind in jobs:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trusting)
    auto = getattr(transformers, "AutoModelFor" + kind)
    model = auto.from_pretrained(folder, **trusting).eval()
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    found = {"ids": ids.tolist(), "numbers": model(input_ids=ids)[0].flatten().tolist()}
    found |= {"stop": tokenizer.eos_token, "pad": tokenizer.pad_token}
    print(json.dumps(found | {"vocab_size": model.config.vocab_size}))
"""


def loaded(path):
    """(language model, reward model, tokenizer) as the steps load them."""
    tokenizer = chat_template.load_tokenizer(str(path), trust_remote_code=True)
    model = language_model.load(CONFIG, str(path), tokenizer=tokenizer, **HOW)
    scored = scalar_model.load(CONFIG, str(path), tokenizer=tokenizer, head="normal", **HOW)
    scored.set_bias(0.5)
    return model.eval(), scored.eval(), tokenizer


def save_all(folder, model, scored, tokenizer) -> None:
    average = EMA(model, 0.5)
    parts = {
        "actor": checkpoint.ModelFolder(model, tokenizer, SETTINGS),
        "actor_ema": checkpoint.ModelFolder(model, tokenizer, SETTINGS, average),
        "reward": checkpoint.ModelFolder(scored.classifier, tokenizer, SETTINGS),
    }
    checkpoint.save(folder, parts)


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """All that the steps save of a model with rows to spare in its embedding and of one without,
    moved away, the original deleted: {(kind, name): (folder, what it held, what plain transformers
    finds there)}. Held: (ids, logits or score, embedding rows)."""
    root, expected = tmp_path_factory.mktemp("custom"), {}
    rows_of = {"spare": custom_model.ROWS, "full": 256 + custom_model.words(TEXTS)}
    for kind, rows in rows_of.items():
        original = custom_model.write(root / "original", TEXTS, rows)
        model, scored, tokenizer = loaded(original)
        text = tokenizer.apply_chat_template(TURNS, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(input_ids=ids).logits.flatten()
            score = scorer.sequence_scores(scored, ids, torch.ones_like(ids).bool()) + 0.5
        save_all(root / "out", model, scored, tokenizer)
        shutil.rmtree(original)
        (root / "out").rename(root / kind)
        have = model.get_input_embeddings().num_embeddings
        assert (have == rows) == (kind == "spare") and have >= len(tokenizer)
        for name in KINDS:
            numbers = score if name == "reward" else logits
            expected[kind, name] = root / kind / name, (ids.tolist(), numbers, have)
    jobs = [(str(folder), KINDS[name]) for (_, name), (folder, _) in expected.items()]
    result = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=root,
        env=os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "PYTHONPATH": ""},
        input=json.dumps([TURNS, jobs]),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    lines = map(json.loads, result.stdout.splitlines()[-len(jobs) :])
    return {key: (*held, found) for (key, held), found in zip(expected.items(), lines, strict=True)}


@pytest.mark.parametrize("kind", ["spare", "full"])
@pytest.mark.parametrize("name", KINDS)
def test_a_moved_folder_holds_all_that_loads_it(moved, kind, name):
    folder, (ids, numbers, rows), found = moved[kind, name]
    files = {p.name for p in folder.glob("*.py")}
    assert files == FILES | ({"scored_backbone.py"} if name == "reward" else set())
    settings = json.loads((folder / "config.json").read_text())
    assert settings["vocab_size"] == settings["padded_vocab_size"] == rows
    assert {f"{v.split('.')[0]}.py" for v in settings["auto_map"].values()} <= files
    assert found["ids"] == ids and found["vocab_size"] == rows
    assert (found["stop"], found["pad"]) == ("<|im_end|>", "<|pad|>")
    torch.testing.assert_close(torch.tensor(found["numbers"]), numbers, rtol=1e-5, atol=1e-6)


def test_entries_of_classes_that_were_not_loaded_name_the_folder_too(tmp_path):
    """As hub models have them once downloaded: REPOSITORY--module.Class."""
    model, scored, tokenizer = loaded(custom_model.write(tmp_path / "original", TEXTS))
    model.config.auto_map["AutoModel"] = "someone/model--modeling_small.SmallModel"
    model.config.auto_map["AutoModelForMaskedLM"] = "someone/model--modeling_other.Other"
    save_all(tmp_path / "out", model, scored, tokenizer)
    shutil.rmtree(tmp_path / "original")
    found = json.loads((tmp_path / "out/actor/config.json").read_text())["auto_map"]
    assert found == custom_model.AUTO_MAP | {
        "AutoModelForMaskedLM": "someone/model--modeling_other.Other"
    }


def test_the_evaluation_loads_it_and_refuses_without_trust(tmp_path):
    model, scored, tokenizer = loaded(custom_model.write(tmp_path / "original", TEXTS))
    save_all(tmp_path / "out", model, scored, tokenizer)
    actor, reward = str(tmp_path / "out/actor"), str(tmp_path / "out/reward")
    again, its = checkpoints.load_checkpoint(actor, dtype="fp32", trust_remote_code=True)
    ids = torch.tensor([chat_template.encode_prompt(its, TURNS)])
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert checkpoints.folder_problems(actor, "checkpoints") == []
    assert "is a reward model" in checkpoints.folder_problems(reward, "checkpoints")[0]
    assert "is a language model" in checkpoints.folder_problems(actor, "reward_model")[0]
    with pytest.raises(SystemExit, match="trust_remote_code"):
        checkpoints.load_checkpoint(actor, dtype="fp32", trust_remote_code=False)


def test_a_family_without_a_class_for_scores_gets_one(tmp_path):
    """One that transformers knows: no code that came with the folder is run to read it again."""
    kind = transformers.GraniteConfig
    assert kind not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    folder = str(tmp_path / "base")
    vocabulary = write_tokenizer(tmp_path / "base", "Qwen2", TEXTS).vocab_size
    torch.manual_seed(0)
    config = kind(vocab_size=vocabulary, **LLAMA_LIKE)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = chat_template.load_tokenizer(folder)
    how = HOW | {"tokenizer": tokenizer}
    plain = SFTConfig(output_dir="-", packing="off")
    scored = scalar_model.load(plain, folder, head="normal", **how).eval()
    checkpoint.save(
        tmp_path, {"reward": checkpoint.ModelFolder(scored.classifier, tokenizer, SETTINGS)}
    )
    again = scalar_model.load(plain, str(tmp_path / "reward"), **how).eval()
    ids = torch.arange(20, 30)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    backbone = transformers.AutoModelForCausalLM.from_pretrained(folder).base_model
    expected = backbone(input_ids=ids).last_hidden_state @ scored.classifier.score.weight.T
    for model in (scored, again):
        torch.testing.assert_close(model(ids, mask), expected[..., 0], rtol=1e-5, atol=1e-6)
    assert plan_shapes.count(scored.classifier.config, True).parameters == sum(
        p.numel() for p in scored.parameters()
    )
