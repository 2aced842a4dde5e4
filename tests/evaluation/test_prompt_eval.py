"""Side-by-side evaluation: prompts, answers, scores and refusals (what it writes: see
test_prompt_eval_output.py)."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from evaluation import checkpoints, prompt_eval, scores
from tests.helpers import evaluated_models
from tests.helpers.evaluated_models import (
    BIAS,
    PROMPTS,
    answers_of,
    configured,
    problems_of,
    texts_of,
)
from utils.data import chat_template, rows

policy = evaluated_models.policy  # a fixture, for this file too
reward_model, prompt_file = evaluated_models.reward_model, evaluated_models.prompt_file

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


def test_a_tools_result_is_not_asked_as_if_the_user_had_said_it(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [{"role": "user", "content": "q"}]
    turns += [{"role": "assistant", "content": None, "tool_calls": [call]}]
    turns += [{"role": "tool", "tool_call_id": "1", "content": "RESULT"}]
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps({"prompt": turns}) + "\n")
    with pytest.raises(rows.DataError, match="tools.jsonl:1: a tool's result stands last"):
        prompt_eval.load_questions(configured(checkpoints=["x"], prompts=[str(path)]))


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
    for answer in answers[::2]:
        answer.finished = not answer.finished  # this policy never ends by itself
    assert scores.score_all(config, answers) == []

    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    judge = AutoModelForSequenceClassification.from_pretrained(reward_model)
    for answer in answers:
        text = tokenizer.apply_chat_template(list(answer.conversation), tokenize=False)
        text = text.rstrip("\n")
        if not answer.finished:  # cut at the limit, as PPO scores it
            text = text.removesuffix("<|im_end|>")
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            raw = judge(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
        assert answer.score == pytest.approx(raw - BIAS, abs=1e-4)
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
    with pytest.raises(SystemExit, match="p.txt:1: not UTF-8"):
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
