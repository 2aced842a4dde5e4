"""Comparisons from a policy: labellers, ties, provenance."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from step2_reward import collect as program
from step2_reward.collect import write_sampled
from tests.helpers.jobs import collect
from tests.helpers.running import run_ranks
from utils.data import chat_template
from utils.data.comparisons import load_comparisons
from utils.data.demonstrations import load_conversations
from utils.data.rows import BadRows


def test_ranks_share_the_sampling_and_write_the_same_comparisons(tiny, chain, tmp_path):
    files = [tiny / "data/comparisons.jsonl", tmp_path / "2.jsonl"]
    # The fixture `chain` wrote the first file on one rank.
    run_ranks([collect(tiny, chain / "sft", "--output_file", files[-1])], 2)
    first, second = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    # Padding differs between the ranks' batches, so now and then a draw falls the other way.
    same = sum(a in second for a in first)
    assert same >= 0.95 * len(first) and abs(len(first) - len(second)) <= 3
    row = first[0]
    assert len(set(row["responses"])) == len(row["responses"]) >= 2
    assert len(set(row["scores"])) >= 2 and all(r.strip() for r in row["responses"])
    assert row["provenance"]["labeller"] == "verifier" and "prompts.jsonl" in str(row["provenance"])


def test_samples_that_utf_8_cannot_hold_are_kept(tmp_path):
    rows = [{"responses": ["half a pair \ud800", "梨\0\u2028"]}]
    write_sampled(tmp_path / "s.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "s.jsonl").open()] == rows


def test_a_reward_model_or_people_may_rank(tiny, chain, tmp_path):
    scored, unranked = tmp_path / "scored.jsonl", tmp_path / "unranked.jsonl"
    best = tmp_path / "best.jsonl"
    asked = ["--labeller", "reward_model", "--reward_model", chain / "reward"]
    run_ranks(
        [
            collect(tiny, chain / "sft", *asked, "--output_file", scored),
            collect(tiny, chain / "sft", *asked, "--keep", "best", "--output_file", best),
            collect(tiny, chain / "sft", "--labeller", "none", "--output_file", unranked),
        ],
        1,
    )
    found = load_comparisons([str(scored)], bad=BadRows())
    assert len(found) > 50 and all(len(set(c.scores)) > 1 for c in found)
    # The same samples, of which step 1 is to learn the best that ended.
    demonstrations = load_conversations([str(best)], bad=BadRows())
    shown = {str(d.prompt): d.messages[-1]["content"] for d in demonstrations}
    for c in found:
        answers = zip(c.scores, c.finished, c.responses, strict=True)
        whole = [(score, text) for score, done, text in answers if done]
        assert shown.get(str(c.prompt)) == (max(whole)[1] if whole else None)
    figures = json.loads(best.with_suffix(".result.json").read_text())
    assert figures["kept"] == len(shown) > 50 and figures["prompts"] == 100
    assert figures["best_score"] > figures["score"] and 0.5 < figures["finished_share"] < 1

    rows = [json.loads(line) for line in unranked.read_text().splitlines()]
    assert rows and all("scores" not in row for row in rows)

    # People rank by length, say; their file comes back as comparisons.
    ranked, people = tmp_path / "ranked.jsonl", tmp_path / "people.jsonl"
    with open(ranked, "w") as f:
        for row in rows:
            order = sorted(row["responses"], key=len)
            row["ranks"] = [order.index(r) + 1 for r in row["responses"]]
            f.write(json.dumps(row) + "\n")
    ranking = ["--labeller", "file", "--rankings", ranked, "--output_file", people]
    run_ranks([("step2_reward/collect.py", ranking)], 1)
    for c in load_comparisons([str(people)], bad=BadRows()):
        best = max(range(len(c.scores)), key=lambda k, c=c: c.scores[k])
        assert len(c.responses[best]) == min(map(len, c.responses))


def test_parts_of_the_prompts_are_disjoint_and_all_of_them(tiny, chain, tmp_path):
    """Also where a prompt stands in two files."""
    tokenizer = chat_template.load_tokenizer(str(chain / "sft"))
    file, again = tiny / "data/prompts.jsonl", tmp_path / "again.jsonl"
    again.write_text("".join(file.read_text().splitlines(keepends=True)[:200]))

    def prompts(part):
        config = program.CollectConfig(
            prompt_data=[str(file), str(again)],
            prompt_part=part,
            output_dir=str(tmp_path),
            max_prompt_length=64,
        )
        return [str(p.messages) for p in program.load_prompts(config, tokenizer, None)]

    parts = [set(prompts(f"{n}/3")) for n in (1, 2, 3)]
    assert sum(map(len, parts)) == len(set.union(*parts)), "one prompt in two parts"
    assert set.union(*parts) == set(prompts("")) and min(map(len, parts)) > 30
    for wrong in ("3/2", "0/2", "1", "a/b", "1/0"):
        with pytest.raises(ValueError, match="not NUMBER/PARTS"):
            program.part_of(wrong)


def test_each_round_draws_by_noise_of_its_own(tiny, chain):
    tokenizer = chat_template.load_tokenizer(str(chain / "sft"))
    model = AutoModelForCausalLM.from_pretrained(chain / "sft").eval()
    lines = (tiny / "data/prompts.jsonl").read_text().splitlines()[:16]
    turns = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]
    encoded = [chat_template.encode_prompt(tokenizer, turn) for turn in turns]

    def texts(**given):
        config = program.CollectConfig(answers_per_prompt=2, max_response_length=12, **given)
        found = program.sample_answers(config, encoded, tokenizer, model, torch.device("cpu"))
        return [answer.text for group in found for answer in group]

    first = texts()
    assert texts(round=1) == first
    same = sum(a == b for a, b in zip(first, texts(round=2), strict=True))
    assert same < len(first) / 2, "round 2 repeats round 1"
