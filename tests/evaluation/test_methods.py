"""Policies side by side: what is measured of their answers, by plain transformers; on any ranks."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluation import html_report, methods
from step1_sft.config import SFTConfig
from step3_ppo import samples
from step3_preference.config import PreferenceConfig
from tests.helpers.running import run_ranks
from utils.data import chat_template
from utils.settings import command_line
from utils.settings.fields import ConfigError

CPU = torch.device("cpu")


def words(tiny, chain, held, out, *more) -> list[str]:
    flags = ["--policies", f"sft={chain / 'sft'}", f"base={tiny / 'base_model'}"]
    flags += ["--judge_model", chain / "reward", "--held_out_data", held, "--output_file", out]
    flags += ["--max_response_length", 12, "--dtype", "fp32", "--micro_batch_size", 4, *more]
    return list(map(str, flags))


@pytest.fixture(scope="module")
def held(tiny, tmp_path_factory):
    file = tmp_path_factory.mktemp("held") / "held.jsonl"
    lines = (tiny / "data/prompts.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:21]))
    return file


@pytest.fixture(scope="module")
def found(tiny, chain, held, tmp_path_factory):
    """Each prompt's values, in this process; and what was sampled."""
    out = tmp_path_factory.mktemp("out") / "methods.json"
    folder = out.parent / "step3_best_of_n"
    shutil.copytree(tiny / "base_model", folder)
    command_line.save(SFTConfig(output_dir=str(folder)), folder, 1)
    policies = ["--policies", f"sft={chain / 'sft'}", f"base={folder}"]
    argv = words(tiny, chain, held, out, "--temperature", "0.8", *policies)
    config = command_line.build(methods.MethodsConfig, argv, 1)
    sampled, real = [], methods.sample_answers

    def sample(*args):
        sampled.append(real(*args))
        return sampled[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "sample_answers", sample)
        values = methods.each_prompts(config, CPU)
    return SimpleNamespace(values=values, sampled=sampled, folder=folder)


def test_the_distance_is_of_the_sampled_ids_by_plain_transformers(tiny, chain, held, found):
    tokenizer = chat_template.load_tokenizer(str(chain / "sft"))
    models = [
        AutoModelForCausalLM.from_pretrained(path).double().eval()
        for path in (tiny / "base_model", chain / "sft")
    ]
    rows = [json.loads(line) for line in held.read_text().splitlines()]
    expected = []
    for row, (answer,) in zip(rows, found.sampled[1], strict=True):
        turn = [{"role": "user", "content": row["prompt"]}]
        prompt, total = chat_template.encode_prompt(tokenizer, turn), [0.0, 0.0]
        for which, model in enumerate(models):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *answer.ids]])).logits[0] / 0.8
            for place, token in enumerate(answer.ids, len(prompt) - 1):
                total[which] += logits[place].log_softmax(-1)[token].item()
        expected.append(total[0] - total[1])
    assert found.values["base"]["kl"] == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 1 and set(found.values["sft"]["kl"]) == {0.0}
    lengths = [len(answer.ids) for (answer,) in found.sampled[1]]
    assert found.values["base"]["response_length"] == lengths
    stops = [answer.ids[-1] == tokenizer.eos_token_id for (answer,) in found.sampled[0]]
    assert found.values["sft"]["eos_share"] == stops and sum(stops) > 0


def test_the_page_has_answers_and_tokens_of_a_method_without_rollouts(chain, held, found):
    kept = json.loads((found.folder / "samples.json").read_text())
    rows = [json.loads(line) for line in held.read_text().splitlines()]
    for moment, of, name in (("before", 0, "sft"), ("after", 1, "base")):
        texts = [answer.text for (answer,) in found.sampled[of]]
        assert [row["answer"] for row in kept[moment]] == texts[: samples.ANSWERS]
        scores = found.values[name]["score"]
        assert [row["score"] for row in kept[moment]] == scores[: samples.ANSWERS]
        assert kept[moment][3]["prompt"][-1]["content"] == rows[3]["prompt"]
    tokens = json.loads((found.folder / "tokens.json").read_text())
    scores = found.values["base"]["score"]
    shown = [row["score"] for row in tokens["rows"]]
    assert shown == sorted(shown) and (shown[0], shown[-1]) == (min(scores), max(scores))
    for row in tokens["rows"]:
        i = scores.index(row["score"])
        assert sum(row["kl"]) == pytest.approx(found.values["base"]["kl"][i], abs=1e-3)
        assert len(row["kl"]) == len(row["pieces"]) == len(found.sampled[1][i][0].ids)
    page = " ".join(html_report.render([found.folder.parent]).split())
    assert "Best_Of_N" in page or "BEST_OF_N, held-out prompts" in page
    assert "before</b>" in page and "after</b>" in page and "verifier" in page
    assert not (chain / "sft/samples.json").exists(), "the first policy has no before"


def test_answers_that_a_step_kept_itself_stay(tmp_path):
    """Of its own prompts, while it trained; token by token it has none."""
    config = PreferenceConfig(output_dir=str(tmp_path), prompt_data=["p.jsonl"])
    command_line.save(config, tmp_path, 1)
    (tmp_path / "samples.json").write_text('{"before": "its own"}')
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    answer = SimpleNamespace(ids=[104, 105], text="hi", finished=True)
    asked = [(SimpleNamespace(messages=({"role": "user", "content": "?"},)), answer)]
    given = [{"answer": "a"}], [{"answer": "hi"}], asked, [[0.5, -0.25]], {"kl": [0.25]}
    methods.keep_for_page(tmp_path, tokenizer, *given)
    assert json.loads((tmp_path / "samples.json").read_text()) == {"before": "its own"}
    (row,) = json.loads((tmp_path / "tokens.json").read_text())["rows"]
    assert (row["pieces"], row["kl"]) == (["h", "i"], [0.5, -0.25])


def test_means_have_errors_and_changes_are_paired(found):
    summary = methods.summarised(found.values)
    before, after = (found.values[name]["score"] for name in ("sft", "base"))
    gained = [b - a for a, b in zip(before, after, strict=True)]
    mean = sum(gained) / 21
    error = math.sqrt(sum((x - mean) ** 2 for x in gained) / 20 / 21)
    assert summary["base"]["score_change"] == pytest.approx(mean)
    assert summary["base"]["score_change_se"] == pytest.approx(error)
    assert summary["sft"]["score_change"] == 0 and summary["sft"]["prompts"] == 21
    head, _, sft, base, *legend = methods.as_table(summary, {"base": 12.3}).splitlines()
    assert head.split()[:5] == ["method", "verifier", "change", "score", "change"]
    assert (
        base.startswith("base ") and base.endswith(" 12") and f"{mean:+.3f} ± {error:.3f}" in base
    )
    assert sft.count("±") == 2 and legend[0].startswith("21 held-out prompts")


def test_two_ranks_measure_the_same(tiny, chain, held, found, tmp_path):
    out = tmp_path / "methods.json"
    argv = words(tiny, chain, held, out, "--temperature", "0.8")
    run_ranks([("evaluation/methods.py", argv)], 2)
    written, expected = json.loads(out.read_text()), methods.summarised(found.values)
    for name, row in expected.items():
        assert written[name] == pytest.approx(row, abs=0.15), "a draw may fall the other way"
        assert written[name]["prompts"] == row["prompts"] == 21


@pytest.mark.parametrize(
    "more, message",
    [
        (["--policies", "sft"], "not NAME=FOLDER, each name once"),
        (["--policies", "a=x", "a=y"], "not NAME=FOLDER, each name once"),
        (["--prompt_data", "p.jsonl"], "set either"),
    ],
)
def test_what_cannot_be_compared_is_refused(tiny, chain, held, tmp_path, more, message):
    argv = [*words(tiny, chain, held, tmp_path / "o.json"), *more]
    with pytest.raises(ConfigError, match=message):
        command_line.build(methods.MethodsConfig, argv, 1)
