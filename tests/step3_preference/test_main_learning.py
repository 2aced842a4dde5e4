"""What DPO, KTO and ILQL learn on the embedded task from one set of comparisons."""

import json

import pytest

from evaluation.summary import verdicts
from tests.helpers.running import ROOT, run_ranks
from utils.data import toy_tasks
from utils.models import from_scratch

LOSSES = {  # and their settings, as the recipe has them
    "dpo": ["--learning_rate", 1e-4],
    "kto": ["--learning_rate", 2e-4],
    "ilql": ["--learning_rate", 1e-3, "--beta", 16, "--target_rate", 0.05, "--awac_beta", 3],
}


@pytest.mark.slow
def test_one_round_raises_the_verifier_by_a_fifth(tmp_path):
    """From step 1's model of the tiny recipe and its own answers, ranked by the verifier."""
    data, base, sft = tmp_path / "data", tmp_path / "base_model", tmp_path / "sft"
    toy_tasks.write(data, 42)
    texts = from_scratch.texts_of([str(data / "sft.jsonl")])
    from_scratch.build(base, texts, vocab_size=768, max_positions=256, seed=42)
    recipe = ["--config", ROOT / "recipes/tiny.yaml", "--seed", 42]
    compared, own = tmp_path / "comparisons.jsonl", ["--tensorboard", "false", *recipe]
    step1 = ["--model_name_or_path", base, "--sft_data", data / "sft.jsonl", "--output_dir", sft]
    collect = ["--policy", sft, "--prompt_data", data / "prompts.jsonl", "--output_file", compared]
    step3 = ["--model_name_or_path", sft, "--preference_data", compared, "--max_length", 96]
    step3 += ["--dtype", "fp32", "--epochs", 2, "--global_batch_size", 32, "--micro_batch_size", 16]
    jobs = [("step1_sft/main.py", [*own, *step1]), ("step2_reward/collect.py", [*recipe, *collect])]
    for loss, settings in LOSSES.items():
        flags = ["--loss", loss, *settings, "--output_dir", tmp_path / loss]
        jobs.append(("step3_preference/main.py", [*own, *step3, *flags]))
    run_ranks(jobs, 1)
    rows = [json.loads(line) for line in (data / "held_out.jsonl").read_text().splitlines()]
    found = {}
    for name in ("sft", *LOSSES):
        of_each = verdicts(tmp_path / name, rows, seed=42)
        found[name] = sum(of_each) / len(of_each)
    print(found)
    assert found["sft"] < 0.6, "there must be something left to learn"
    for loss in LOSSES:
        assert found[loss] >= found["sft"] + 0.2, found
