"""Side-by-side evaluation: answers, scores, refusals, and the whole program."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from evaluation import checkpoints, prompt_eval, questions
from tests.helpers import evaluated_models
from tests.helpers.evaluated_models import (
    BIAS,
    PROMPTS,
    ROOT,
    answers_of,
    blocks_of,
    configured,
    problems_of,
    run_script,
    texts_of,
)
from utils import terminal
from utils.data import chat_template
from utils.data.rows import DataError

MT_BENCH = ROOT.parent / "shared" / "data" / "mt_bench" / "question.jsonl"
policy = evaluated_models.policy  # a fixture, for this file too
reward_model, prompt_file = evaluated_models.reward_model, evaluated_models.prompt_file

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

    def canned(model, tokenizer, encoded, drawn):
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


def scored_by_transformers(reward_model, conversation, finished: bool) -> float:
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    judge = AutoModelForSequenceClassification.from_pretrained(reward_model)
    text = tokenizer.apply_chat_template(list(conversation), tokenize=False).rstrip("\n")
    if not finished:  # cut at the limit, as PPO scores it
        text = text.removesuffix("<|im_end|>")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        raw = judge(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
    return raw - BIAS


def test_scores_are_the_reward_models_own(policy, reward_model, tmp_path):
    path = tmp_path / "mt.jsonl"
    path.write_text("".join(json.dumps({"turns": [p, "And why?"]}) + "\n" for p in PROMPTS))
    config = configured(
        checkpoints=[policy], prompts=[str(path)], reward_model=reward_model, batch_size=4
    )
    asked = questions.load(config.prompts)
    groups, _ = prompt_eval.answer_all(config, policy, asked)
    answers = [a for group in groups for a in group]
    for answer in answers[::2]:
        answer.finished = not answer.finished  # this policy never ends by itself
    assert prompt_eval.score_all(config, answers) == []

    for answer in answers:
        expected = scored_by_transformers(reward_model, answer.conversation, answer.finished)
        assert answer.score == pytest.approx(expected, abs=1e-4)
    found = [a.score for a in answers]
    assert max(found) - min(found) > 0.05  # else any constant would pass
    assert {a.finished for a in answers} == {True, False}


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
        "num_beams=1 must be at least 2; set --num_beams",
        "temperature=0.0 is read only with --strategy sample (now 'beam')",
        "top_p=2.0 must be at most 1",
        "max_new_tokens=0",
        "batch_size=0",
    ):
        assert part in message
    assert "owner" not in message  # hub names may exist
    assert "temperature=0.0 must be above 0" in problems_of(
        "--checkpoints", policy, "--strategy", "sample", "--temperature", "0"
    )
    assert "checkpoints is empty; set --checkpoints" in problems_of()


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
    with pytest.raises(DataError, match="p.txt:1: not UTF-8"):
        prompt_eval.main()


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


# The whole program.


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
    with pytest.raises(DataError, match=f"talks.jsonl:1: {other}: .*no system turns"):
        run_main(monkeypatch, *flags)
    assert "answered" not in capsys.readouterr().out


def test_in_a_talk_the_turn_is_named(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = WITHOUT_SYSTEM
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with pytest.raises(SystemExit, match="talks.jsonl:1: the chat template of .* refuses"):
        checkpoints.encode_prompt(tokenizer, turns, "talks.jsonl:1", 99)
