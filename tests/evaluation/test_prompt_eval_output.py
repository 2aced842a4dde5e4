"""What a side-by-side evaluation writes and prints."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from evaluation import checkpoints, prompt_eval
from evaluation.prompt_eval import Answer, Question
from tests.helpers import evaluated_models
from tests.helpers.evaluated_models import ROOT, answers_of, configured, run_script, texts_of
from utils import terminal

MT_BENCH = ROOT.parent / "shared" / "data" / "mt_bench" / "question.jsonl"

policy = evaluated_models.policy  # a fixture, for this file too
reward_model = evaluated_models.reward_model


NASTY = "```\n# not a heading\n``````\n<script>alert(1)</script>\n\x1b[2J\rgone `\n~~~\n| a | b |"


def nasty_results():
    question = Question(({"role": "system", "content": NASTY},), (NASTY, "Again?"), "file `x`:1")
    talk, groups = question.context, []
    for turn, said in enumerate(question.turns, 1):
        talk += ({"role": "user", "content": said}, {"role": "assistant", "content": NASTY})
        groups.append(Answer("out/`a`", turn, talk, 4 * turn, turn == 1, float(turn)))
    return [question], {"out/`a`": [groups]}


def blocks_of(markdown: str) -> tuple[list[str], list[str]]:
    """(contents of the fenced blocks, lines outside), by CommonMark's rule for closing one."""
    inside, outside, opened, current = [], [], "", []
    for line in re.split("\r\n|\r|\n", markdown):
        if not opened and (found := re.match(r" {0,3}(`{3,}|~{3,})[^`]*$", line)):
            opened, current = found[1], []
        elif opened and re.fullmatch(f" {{0,3}}{opened[0]}{{{len(opened)},}}[ \t]*", line):
            inside.append("\n".join(current))
            opened = ""
        else:
            (current if opened else outside).append(line)
    assert not opened
    return inside, outside


def test_no_text_breaks_out_of_its_block():
    questions, results = nasty_results()
    config = configured(checkpoints=["out"])
    inside, outside = blocks_of(prompt_eval.as_markdown(config, questions, results, "a summary"))
    shown = NASTY.replace("\x1b", "\\x1b").replace("\r", "\\r")
    assert inside[1:] == ["a summary", shown, shown, shown, "Again?", shown]
    assert [line for line in outside if line] == [
        "# Answers side by side",
        "## `` prompt 1 of 1, file `x`:1 ``",
        "### ` system `",
        "### ` user `",
        "#### `` out/`a` (4 tokens, finished, score 1.000) ``",
        "### ` user `",
        "#### `` out/`a` (8 tokens, cut off, score 2.000) ``",
    ]


def test_printed_text_cannot_steer_the_terminal():
    text = prompt_eval.as_text(*nasty_results())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert "\\x1b[2J" in text and "    # not a heading\n" in text
    assert terminal.visible("a\tb\n中文 é🙂\x00\x9b") == "a\tb\n中文 é🙂\\x00\\x9b"


def test_summary_is_of_all_answers():
    _, results = nasty_results()
    header, _, line = prompt_eval.summary_table(results, {"out/`a`": 4.0}).split("\n")
    columns = ["checkpoint", "answers", "tokens/answer", "finished", "tokens/s", "mean score"]
    assert re.split("  +", header) == columns
    assert line.split() == ["out/`a`", "2", "6.0", "50%", "3.0", "1.500"]


def test_whole_script_from_another_folder(policy, reward_model, tmp_path):
    other = Path(policy).with_name("other policy")
    model = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(policy).save_pretrained(other)
    prompts = tmp_path / "mt.jsonl"
    prompts.write_text('{"turns": ["Hi!", "And the dog?"]}\n{"turns": ["请写诗。"]}\n')
    flags = f"--prompts mt.jsonl --reward_model {reward_model} --output_dir out --dtype fp32"
    run = run_script(
        "prompt_eval.py",
        "--checkpoints",
        policy,
        str(other),
        *flags.split(),
        "--max_new_tokens=5",
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    lines = (tmp_path / "out" / "answers.jsonl").read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines if line]
    assert [(r["prompt"], r["checkpoint"], r["turn"]) for r in records] == [
        ("Hi!", policy, 1),
        ("And the dog?", policy, 2),
        ("Hi!", str(other), 1),
        ("And the dog?", str(other), 2),
        ("请写诗。", policy, 1),
        ("请写诗。", str(other), 1),
    ]
    keys = "prompt where checkpoint turn answer tokens finished score"
    assert all(list(r) == keys.split() for r in records)
    assert records[0]["answer"] != records[2]["answer"]
    assert all(1 <= r["tokens"] <= 5 for r in records)
    expected = texts_of(answers_of(policy, [str(prompts)], max_new_tokens=5))
    assert [r["answer"] for r in records if r["checkpoint"] == policy] == sum(expected, [])

    mean = sum(r["score"] for r in records if r["checkpoint"] == policy) / 3
    closing = [line for line in run.stdout.split("\n") if line.startswith(f"{policy}  ")]
    assert len(closing) == 1 and closing[0].endswith(f"  {mean:.3f}")
    page = (tmp_path / "out" / "answers.md").read_text(encoding="utf-8")
    inside, _ = blocks_of(page)
    assert inside.count("请写诗。") == 1 and closing[0] in inside[1]
    for record in records:
        assert terminal.visible(record["answer"]) in inside


@pytest.mark.skipif(not MT_BENCH.exists(), reason=f"MT-Bench is not at {MT_BENCH}")
def test_mt_bench(policy):
    answers = answers_of(policy, [str(MT_BENCH)], max_prompts=2, max_new_tokens=4)
    assert [[a.turn for a in group] for group in answers] == [[1, 2], [1, 2]]
    raw = [json.loads(line) for line in MT_BENCH.read_text().splitlines()[:2]]
    for group, row in zip(answers, raw, strict=True):
        users = [m["content"] for m in group[1].conversation if m["role"] == "user"]
        assert users == row["turns"]


# What a template refuses, and what fails.


WITHOUT_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_template(model, folder, template) -> str:
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_talks(tmp_path) -> str:
    """A prompt with a system turn, and one without."""
    path = tmp_path / "talks.jsonl"
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]
    plain = [{"role": "user", "content": "Why?"}]
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (system, plain)))
    return str(path)


def run_main(monkeypatch, *flags) -> None:
    monkeypatch.setattr("sys.argv", ["prompt_eval.py", "--max_new_tokens", "5", *flags])
    prompt_eval.main()


def test_one_answer_that_a_reward_models_template_refuses_costs_its_own_score_only(
    policy, reward_model, tmp_path, monkeypatch, capsys
):
    scorer = with_template(reward_model, tmp_path / "scorer", WITHOUT_SYSTEM)
    flags = ["--checkpoints", policy, "--prompts", write_talks(tmp_path), "--dtype", "fp32"]
    out = tmp_path / "out"
    run_main(monkeypatch, *flags, "--reward_model", scorer, "--output_dir", str(out))
    lines = (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    refused, scored = map(json.loads, lines)
    assert refused["answer"] and refused["score"] is None and isinstance(scored["score"], float)
    said = capsys.readouterr().out
    assert said.count("no system turns") == 1 and "turn 1" in said
    table = [line.split() for line in said.splitlines()]
    assert ["1", "1", "-"] in table and ["2", "1", f"{scored['score']:.3f}"] in table
    assert f"  {scored['score']:.3f}" in said.splitlines()[-2]  # the mean is of what was scored


def test_answers_are_told_and_written_before_they_are_scored(
    policy, reward_model, tmp_path, monkeypatch, capsys
):
    scorer = shutil.copytree(reward_model, tmp_path / "scorer")
    (scorer / "model.safetensors").write_bytes(b"damaged")
    flags = ["--checkpoints", policy, "--prompts", write_talks(tmp_path), "--dtype", "fp32"]
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="cannot load a model"):
        run_main(monkeypatch, *flags, "--reward_model", str(scorer), "--output_dir", str(out))
    lines = (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 2 and all(answers)
    said = capsys.readouterr().out
    assert all(terminal.visible(a).split("\n")[0] in said for a in answers)


def test_a_prompt_that_a_checkpoints_template_refuses_ends_the_run_before_one_answers(
    policy, tmp_path, monkeypatch, capsys
):
    other = with_template(policy, tmp_path / "other", WITHOUT_SYSTEM)
    flags = ["--checkpoints", policy, other, "--prompts", write_talks(tmp_path)]
    with pytest.raises(SystemExit, match=f"talks.jsonl:1: {other}: .*no system turns"):
        run_main(monkeypatch, *flags)
    assert "answered" not in capsys.readouterr().out


def test_in_a_talk_the_turn_is_named(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = WITHOUT_SYSTEM
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with pytest.raises(SystemExit, match="talks.jsonl:1: the chat template of .* refuses"):
        checkpoints.encode_prompt(tokenizer, turns, "talks.jsonl:1", 99)
