"""Side-by-side evaluation and the chat, on a model of a few thousand random weights."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from evaluation import chat, checkpoints, prompt_eval
from evaluation.prompt_eval import Answer, PromptEvalConfig, Question
from utils import config as run_config
from utils import terminal
from utils.data import chat_template, rows
from utils.models import from_scratch

ROOT = Path(__file__).resolve().parent.parent
MT_BENCH = ROOT.parent / "shared" / "data" / "mt_bench" / "question.jsonl"
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Why does the sun rise in the east? Because the earth turns towards it every morning.",
    "Write a short letter to a friend who moved to another town last year.",
    "今天天气很好,我们去公园散步吧。请写一首关于秋天的诗。",
    "Seven plus eight is fifteen; nine times six is fifty-four.",
] * 4
PROMPTS = [
    "Hi!",
    "Why does the sun rise in the east?",
    "Write a letter to a friend who moved to another town, and tell him of the lazy dog.",
    "请写一首关于秋天的诗。",
    "Seven plus eight?",
]
BIAS = 0.75


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "policy"
    from_scratch.build(
        folder,
        TEXTS,
        vocab_size=400,
        hidden_size=32,
        layers=2,
        heads=2,
        intermediate_size=64,
        max_positions=512,
        seed=0,
    )
    # At the usual scale an untrained model repeats the last token whatever was asked.
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(12)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reward_model(policy) -> str:
    folder = Path(policy).with_name("reward")
    base = LlamaConfig.from_pretrained(policy)
    base.num_labels = 1
    base.reward_bias = BIAS
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(base)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(10)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompt_file(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return str(path)


def configured(**settings) -> PromptEvalConfig:
    config = PromptEvalConfig(**{"dtype": "fp32", "max_new_tokens": 12} | settings)
    assert not config.problems(1)
    return config


def answers_of(policy, prompts, **settings) -> list[list[Answer]]:
    config = configured(checkpoints=[policy], prompts=prompts, **settings)
    return prompt_eval.answer_all(config, policy, prompt_eval.load_questions(config))[0]


def texts_of(groups) -> list[list[str]]:
    return [[a.answer for a in group] for group in groups]


def problems_of(*flags: str, of=PromptEvalConfig, world_size=1) -> str:
    with pytest.raises(run_config.ConfigError) as caught:
        run_config.build(of, list(flags), world_size)
    return str(caught.value)


def run_script(script, *flags, cwd=ROOT, **settings):
    return subprocess.run(
        [sys.executable, str(ROOT / "evaluation" / script), *flags],
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        **settings,
    )


# Reading prompts.


def test_text_file_gives_a_prompt_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufefffirst\r\n\n 第二 \nthird".encode())
    found = prompt_eval.load_questions(configured(checkpoints=["x"], prompts=[str(path)]))
    assert [q.turns for q in found] == [("first",), ("第二",), ("third",)]
    assert [q.where for q in found] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    assert all(q.context == () for q in found)


def test_data_files_keep_what_was_said_before(tmp_path):
    jsonl, mt_bench = tmp_path / "p.jsonl", tmp_path / "mt.jsonl"
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    jsonl.write_text(json.dumps({"messages": said}) + "\n")
    mt_bench.write_text(json.dumps({"question_id": 1, "turns": ["a", "b", "c"]}) + "\n")
    config = configured(checkpoints=["x"], prompts=[str(jsonl), str(mt_bench)])
    first, second = prompt_eval.load_questions(config)
    assert first.context == tuple(said[:3]) and first.turns == ("Two?",)
    assert second.context == () and second.turns == ("a", "b", "c")
    config.max_prompts = 1
    assert prompt_eval.load_questions(config) == [first]


def test_folder_gives_its_test_split_or_else_its_train_split(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "from train"}\n')
    config = configured(checkpoints=["x"], prompts=[str(folder)])
    assert prompt_eval.load_questions(config)[0].turns == ("from train",)
    (folder / "test.jsonl").write_text('{"prompt": "from test"}\n')
    assert prompt_eval.load_questions(config)[0].turns == ("from test",)
    config = configured(checkpoints=["x"], prompts=[f"{folder}:train"])
    assert prompt_eval.load_questions(config)[0].turns == ("from train",)


def test_bad_prompts_are_all_named_once(tmp_path):
    text, mt_bench, empty = tmp_path / "p.txt", tmp_path / "mt.jsonl", tmp_path / "empty.txt"
    text.write_bytes(b"fine\n\xff\xfe\nnul \0 here\n")
    mt_bench.write_text('{"turns": ["a", 7]}\n{"turns": []}\n')
    empty.write_text("\n")
    names = [str(text), str(mt_bench), str(empty)]
    with pytest.raises(rows.DataError) as caught:
        prompt_eval.load_questions(configured(checkpoints=["x"], prompts=names))
    message = str(caught.value)
    assert f"{text}:2: not UTF-8" in message and f"{text}:3: the line holds a NUL" in message
    assert f"{mt_bench}:1: turn 2 of turns is int" in message
    assert f"{empty}: holds no prompts" in message
    assert message.count(f"{mt_bench}:2:") == 1 and message.count("\n") == 5


def test_built_in_prompts_are_english_and_chinese():
    found = prompt_eval.load_questions(configured(checkpoints=["x"]))
    chinese = [q for q in found if re.search("[一-鿿]", q.turns[0])]
    assert len(found) == 10 and 3 <= len(chinese) <= 7
    assert len(prompt_eval.load_questions(configured(checkpoints=["x"], max_prompts=3))) == 3


# Answering.


def expected_answer(policy, prompt: str, **how) -> str:
    """One prompt alone, without padding, by transformers' own ways."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **how
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_greedy_answers_do_not_depend_on_the_batch(policy, prompt_file):
    alone = texts_of(answers_of(policy, [prompt_file], batch_size=1))
    assert alone == [[expected_answer(policy, p, do_sample=False)] for p in PROMPTS]
    assert texts_of(answers_of(policy, [prompt_file], batch_size=4)) == alone
    assert len({text for (text,) in alone}) >= 4  # else equality would show nothing


def test_beams_are_those_of_transformers(policy, prompt_file):
    how = {"strategy": "beam", "num_beams": 3}
    beams = texts_of(answers_of(policy, [prompt_file], batch_size=4, **how))
    assert beams == [[expected_answer(policy, p, do_sample=False, num_beams=3)] for p in PROMPTS]
    assert beams != texts_of(answers_of(policy, [prompt_file]))


def test_sampling_follows_the_seed(policy, prompt_file):
    how = {"strategy": "sample", "temperature": 1.5, "top_p": 0.95}
    first = texts_of(answers_of(policy, [prompt_file], seed=1, **how))
    assert texts_of(answers_of(policy, [prompt_file], seed=1, **how)) == first
    assert texts_of(answers_of(policy, [prompt_file], seed=2, **how)) != first
    # A sliver of the probability leaves the likeliest token only.
    sliver = answers_of(policy, [prompt_file], strategy="sample", top_p=1e-6)
    assert texts_of(sliver) == texts_of(answers_of(policy, [prompt_file]))


def test_sampling_reaches_past_the_fifty_likeliest_tokens():
    """transformers' own default, top_k=50, would hide the tail that PPO samples from."""
    tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=0, bos_token_id=None)
    config = checkpoints.generation_config(tokenizer, max_new_tokens=5, do_sample=True)
    assert config.top_k == 0 and config.eos_token_id == 2 and config.pad_token_id == 0


def test_a_checkpoints_own_generation_settings_do_not_count(policy, prompt_file, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(policy).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    settings = {"repetition_penalty": 9.0, "do_sample": True, "temperature": 5.0, "max_length": 3}
    (other / "generation_config.json").write_text(json.dumps(settings))
    found = texts_of(answers_of(str(other), [prompt_file]))
    assert found == texts_of(answers_of(policy, [prompt_file]))


def test_each_turn_sees_the_answers_before_it(policy, tmp_path, monkeypatch):
    path = tmp_path / "mt.jsonl"
    turns = [["red", "green", "blue"], ["one"], ["up", "down"]]
    path.write_text("".join(json.dumps({"turns": t}) + "\n" for t in turns))
    tokenizer = AutoTokenizer.from_pretrained(policy)
    seen = []

    def canned(model, tokenizer, encoded):
        seen.extend(tokenizer.decode(ids) for ids in encoded)
        return [(f"reply {len(seen) - len(encoded) + n}", 3, True) for n in range(len(encoded))]

    monkeypatch.setattr(prompt_eval, "generate", canned)
    answers = answers_of(policy, [str(path)], batch_size=2)
    assert texts_of(answers) == [
        ["reply 0", "reply 3", "reply 5"],
        ["reply 1"],
        ["reply 2", "reply 4"],
    ]
    assert [[a.turn for a in group] for group in answers] == [[1, 2, 3], [1], [1, 2]]
    said = ["red", "reply 0", "green", "reply 3", "blue"]
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)
    ]
    assert seen[5] == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert answers[0][2].conversation == (*messages, {"role": "assistant", "content": "reply 5"})


def test_tokens_are_counted_through_the_stop_token(policy):
    tokenizer = chat_template.load_tokenizer(policy)
    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    hello = tokenizer("dog", add_special_tokens=False).input_ids[0]
    responses = torch.tensor(
        [
            [hello, stop, pad, pad],
            [hello, hello, hello, hello],
            [stop, pad, pad, pad],
            [hello, pad, hello, stop],
        ]
    )

    def generate(input_ids, attention_mask):
        assert input_ids.tolist() == [[pad, 7], [8, 9], [pad, 7], [pad, 7]]
        assert attention_mask.tolist() == [[0, 1], [1, 1], [0, 1], [0, 1]]
        return torch.cat([input_ids, responses], 1)

    model = SimpleNamespace(device=torch.device("cpu"), generate=generate)
    found = prompt_eval.generate(model, tokenizer, [[7], [8, 9], [7], [7]])
    one = tokenizer.decode([hello])
    assert found == [(one, 2, True), (one * 4, 4, False), ("", 1, True), (one * 2, 4, True)]


def test_long_conversations_lose_their_beginning_and_it_is_said(policy, tmp_path, capsys):
    path = tmp_path / "p.txt"
    path.write_text("the lazy dog " * 400)
    assert answers_of(policy, [str(path)])[0][0].tokens == 12
    assert "1 prompts lost their beginning" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="512 positions.*lower --max_new_tokens"):
        answers_of(policy, [str(path)], max_new_tokens=512)


def test_tokens_that_a_chat_template_adds_get_embeddings(policy, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.save_pretrained(tmp_path / "small")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    rows = model.get_input_embeddings().num_embeddings
    new = [f"<|turn{n}|>" for n in range(rows - len(tokenizer) + 2)]
    tokenizer.add_tokens(new, special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "small")
    path = tmp_path / "p.txt"
    path.write_text("Hi!")
    assert answers_of(str(tmp_path / "small"), [str(path)])[0][0].tokens
    assert "untrained" in capsys.readouterr().out


# Scoring.


def test_scores_are_the_reward_models_own(policy, reward_model, tmp_path):
    path = tmp_path / "mt.jsonl"
    path.write_text("".join(json.dumps({"turns": [p, "And why?"]}) + "\n" for p in PROMPTS))
    config = configured(
        checkpoints=[policy], prompts=[str(path)], reward_model=reward_model, batch_size=4
    )
    questions = prompt_eval.load_questions(config)
    groups, _ = prompt_eval.answer_all(config, policy, questions)
    answers = [a for group in groups for a in group]
    prompt_eval.score_all(config, answers)

    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    judge = AutoModelForSequenceClassification.from_pretrained(reward_model)
    for answer in answers:
        text = tokenizer.apply_chat_template(list(answer.conversation), tokenize=False)
        ids = tokenizer(text.rstrip("\n"), add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            raw = judge(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
        assert answer.score == pytest.approx(raw - BIAS, abs=1e-4)
    scores = [a.score for a in answers]
    assert max(scores) - min(scores) > 0.05  # else any constant would pass


# What comes out.

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


# Refusals.


def test_every_problem_is_in_one_message(tmp_path, policy, reward_model):
    message = problems_of(
        *f"--checkpoints /no/where {tmp_path} {policy} {policy} {reward_model} owner/name".split(),
        *f"--reward_model {policy} --prompts no.txt ./gone owner/data --max_prompts -1".split(),
        *"--strategy beam --num_beams 1 --temperature 0 --top_p 2 --max_new_tokens 0".split(),
        *"--batch_size 0 --device_map moon --words many".split(),
        world_size=2,
    )
    for part in (
        "unknown flag --words",
        "device_map=moon is not one of",
        "2 ranks",
        "checkpoints: '/no/where' does not exist; set --checkpoints",
        f"checkpoints: '{tmp_path}' holds no readable config.json",
        f"checkpoints names '{policy}' twice",
        f"checkpoints: '{reward_model}' is a reward model or critic",
        f"reward_model: '{policy}' is a language model",
        "prompts: 'no.txt' does not exist",
        "prompts: './gone' does not exist",
        "max_prompts=-1",
        "num_beams=1 is no beam search; set --num_beams",
        "temperature=0.0 means nothing to strategy=beam; set --strategy sample",
        "top_p=2.0 must lie in (0, 1]",
        "max_new_tokens=0",
        "batch_size=0",
    ):
        assert part in message
    assert "owner" not in message  # hub names may exist
    assert "temperature=0.0 must be above 0" in problems_of(
        "--checkpoints", policy, "--strategy", "sample", "--temperature", "0"
    )
    assert "checkpoints is empty; name at least one folder" in problems_of()


def test_a_path_below_a_folder_that_exists_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not checkpoints.looks_local("output/step1_sft")
    (tmp_path / "output").mkdir()
    assert checkpoints.looks_local("output/step1_sft")
    assert "'output/step1_sft' does not exist" in problems_of("--checkpoints", "output/step1_sft")


def test_a_checkpoint_that_lacks_weights_is_refused(policy, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in Path(policy).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"lacks weights of LlamaForCausalLM.*model\.norm\.weight"):
        checkpoints.load_checkpoint(str(tmp_path), dtype="fp32", trust_remote_code=False)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="cannot load a model"):
        checkpoints.load_checkpoint(str(tmp_path), dtype="fp32", trust_remote_code=False)


def test_bad_prompts_end_the_run_before_a_model_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_bytes(b"\xff")
    flags = ["--checkpoints", "owner/name", "--prompts", f"{tmp_path}/p.txt"]
    monkeypatch.setattr("sys.argv", ["prompt_eval.py", *flags])
    with pytest.raises(SystemExit, match="p.txt:1: not UTF-8"):
        prompt_eval.main()


# The chat.

CHAT_FLAGS = "--dtype fp32 --temperature 0 --max_new_tokens 8".split()


def test_chat_through_a_pipe(policy, tmp_path):
    lines = "Hi dog!\nHi dog!\n\n/clear\nHi dog!\n/exit\nnever read\n"
    run = run_script("chat.py", "--checkpoint", policy, *CHAT_FLAGS, cwd=tmp_path, input=lines)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    first, second, third = run.stdout.split("assistant: ")[1:]
    before_clear, cleared = second.split("(conversation forgotten)\n")
    assert third == first + "\n"
    assert before_clear != first and cleared == ""
    expected = answers_of_one(policy, "Hi dog!", 8)
    assert first == terminal.visible(expected) + "\n"


def answers_of_one(policy, prompt: str, max_new_tokens: int) -> str:
    config = configured(checkpoints=[policy], max_new_tokens=max_new_tokens)
    return prompt_eval.answer_all(config, policy, [Question((), (prompt,), "")])[0][0][0].answer


def test_chat_tells_the_model_the_system_turn_and_all_before(monkeypatch, capsys):
    heard = []

    def canned(model, tokenizer, messages, room):
        heard.append([m["content"] for m in messages])
        return f"reply {len(heard)}"

    lines = iter(["one", "half a pair \ud800", "two", "/clear", "three"])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(chat, "answer", canned)
    monkeypatch.setattr(checkpoints, "prompt_room", lambda model, length: 99)
    monkeypatch.setattr("builtins.input", typed)
    chat.talk(chat.ChatConfig(checkpoint="x", system="Be kind."), None, None)
    assert heard == [
        ["Be kind.", "one"],
        ["Be kind.", "one", "reply 1", "two"],
        ["Be kind.", "three"],
    ]
    assert "not sent: your line holds a lone surrogate" in capsys.readouterr().out


def test_chat_ends_cleanly_on_ctrl_c(policy, monkeypatch, capsys):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    monkeypatch.setattr("sys.argv", ["chat.py", "--checkpoint", policy])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    chat.main()
    assert capsys.readouterr().out.startswith(f"{policy}; /clear forgets")


def test_chat_lists_its_problems():
    message = problems_of(
        *"--checkpoint /no/where --temperature -1 --top_p 0 --max_new_tokens 0".split(),
        of=chat.ChatConfig,
    )
    for part in ("'/no/where' does not exist", "temperature=-1.0", "top_p=0.0", "max_new_tokens=0"):
        assert part in message
    assert "checkpoint is empty" in problems_of(of=chat.ChatConfig)


def test_a_lora_adapter_is_a_checkpoint_too(policy, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(policy)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=64))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = chat_template.load_tokenizer(policy)
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert checkpoints.folder_problems(str(tmp_path / "adapter"), "checkpoints") == []
    model, loaded = checkpoints.load_checkpoint(
        str(tmp_path / "adapter"), dtype="fp32", trust_remote_code=False
    )
    ids = torch.tensor([loaded("Hi! Why?", add_special_tokens=False).input_ids])
    with torch.no_grad():
        expected, got = adapted.eval()(input_ids=ids).logits, model(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(policy).eval()(input_ids=ids).logits
    torch.testing.assert_close(got, expected)
    assert (got - plain).abs().max() > 0.01
