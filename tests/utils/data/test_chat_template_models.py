"""What the templates of real models ask of us: BOS, thoughts, the day, system turns, once each."""

import copy
import pickle
from datetime import datetime
from types import SimpleNamespace

import pytest
from transformers.utils import chat_template_utils

from tests.helpers.chat_templates import STOPS, TEMPLATES, byte_level, put_in_front, with_template
from utils.data import chat_template, fitting
from utils.data.chat_template import TemplateError
from utils.models import from_scratch

HARD = ["tree", "\n\ntwo  spaces ", "<b>bold</b>", "🙂 猫", ""]
THOUGHTS = "<think>\nIt barks.\n</think>\n\n"


@pytest.fixture(scope="module")
def pieces():
    """Sentencepiece's tokens, which carry the space before a word."""
    return from_scratch.train_tokenizer(["Name two fruits: tree, dog, hello."] * 20, 330)


def turns(*contents, system=None):
    first = [{"role": "system", "content": system}] if system is not None else []
    return first + [
        {"role": "user" if i % 2 == 0 else "assistant", "content": text}
        for i, text in enumerate(contents)
    ]


def loaded(name, pieces=None):
    tokenizer = with_template(name, copy.deepcopy(pieces))
    chat_template.set_up(tokenizer)
    return tokenizer


def supervised_text(tokenizer, encoded) -> list[str]:
    """Text of each stretch of supervised tokens."""
    runs, before = [], False
    for token, on in zip(encoded.ids, encoded.supervised, strict=True):
        if on:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = on
    return [tokenizer.decode(run) for run in runs]


def rendered(tokenizer, messages) -> str:
    """What transformers makes of a conversation, up to the last answer's stop token."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return text[: text.rindex(tokenizer.eos_token)] + tokenizer.eos_token


# BOS.


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("start", [["<s>"], ["[gMASK]", "<sop>"], ["</s>"], []])
@pytest.mark.parametrize("template", ["none", "without", "with"])
def test_a_text_begins_as_the_tokenizer_begins_one_and_only_once(
    kind, start, template, pieces, tmp_path
):
    tokenizer = byte_level() if kind == "bytes" else copy.deepcopy(pieces)
    if start:
        put_in_front(tokenizer, *start)
    first = [tokenizer.convert_tokens_to_ids(token) for token in start]
    if template == "none":
        tokenizer.chat_template = None
    else:
        front = "".join(start) if template == "with" else ""
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = front + chat_template.CHATML
    chat_template.set_up(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = chat_template.load_tokenizer(str(tmp_path))
    assert again.chat_template == tokenizer.chat_template, "a second time adds nothing"
    messages = turns("a", "tree", "b", "dog", system="s")
    for reader in (tokenizer, again):
        ids = chat_template.encode_conversation(reader, messages).ids
        assert ids[: len(first) + 1] == [*first, reader.convert_tokens_to_ids("<|im_start|>")]
        assert [ids.count(token) for token in first] == [1] * len(first)
        prompt = chat_template.encode_prompt(reader, messages[:-1])
        assert prompt == ids[: len(prompt)]


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n != "qwen3"])
def test_a_template_that_has_bos_keeps_one(name):
    tokenizer = loaded(name)
    assert tokenizer.chat_template == TEMPLATES[name]
    ids = chat_template.encode_conversation(tokenizer, turns("a", "tree", "b", "dog")).ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


# Turns.


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_row_is_what_the_template_renders_and_begins_with_the_prompt_of_ppo(name, kind, pieces):
    tokenizer = loaded(name, pieces if kind == "pieces" else None)
    assert tokenizer.eos_token == STOPS[name]
    for answer in HARD:
        for earlier in ([], ["q", "dog"], ["q", "dog", "r", " x\n"]):
            for system in (None, "Be brief.") if name != "gemma" else (None,):
                messages = turns(*earlier, "a  b", answer, system=system)
                encoded = chat_template.encode_conversation(tokenizer, messages)
                assert tokenizer.decode(encoded.ids) == rendered(tokenizer, messages)
                prompt = chat_template.encode_prompt(tokenizer, messages[:-1])
                assert encoded.ids[: encoded.last_answer] == prompt
                assert encoded.ids[-1] == tokenizer.eos_token_id and encoded.supervised[-1]


def test_a_template_that_forgets_thoughts_supervises_the_last_answer_as_rendered():
    tokenizer = loaded("qwen3")
    one = chat_template.encode_conversation(tokenizer, turns("a", "tree"))
    empty = "<think>\n\n</think>\n\n"
    assert supervised_text(tokenizer, one) == [f"{empty}tree<|im_end|>"] and not one.rewritten
    found = chat_template.encode_conversation(tokenizer, turns("a", "tree", "b", "dog"))
    assert supervised_text(tokenizer, found) == [f"{empty}dog<|im_end|>"] and found.rewritten
    messages = turns("a", THOUGHTS + "tree", "b", THOUGHTS + "dog", "c", THOUGHTS + "hello")
    found = chat_template.encode_conversation(tokenizer, messages)
    assert supervised_text(tokenizer, found) == [f"{THOUGHTS}hello<|im_end|>"] and found.rewritten
    assert tokenizer.decode(found.ids) == rendered(tokenizer, messages)
    assert tokenizer.decode(found.ids).count("<think>") == 1


def test_a_prompt_begins_where_answers_do_though_the_generation_prompt_opens_thoughts():
    tokenizer = loaded("r1")
    plain = chat_template.encode_conversation(tokenizer, turns("a", "tree", "b", "<b>dog</b>"))
    assert supervised_text(tokenizer, plain) == ["tree<|end|>", "<b>dog</b><|end|>"]
    assert not plain.rewritten
    prompt = chat_template.encode_prompt(tokenizer, turns("a"))
    assert tokenizer.decode(prompt) == "<s><|User|>a<|Assistant|>"


def test_thoughts_that_a_template_takes_from_the_last_answer_too_are_supervised():
    tokenizer = loaded("r1")
    for said in ("dog", "", " 猫\n"):
        messages = turns("a", THOUGHTS + "tree", "b", THOUGHTS + said)
        found = chat_template.encode_conversation(tokenizer, messages)
        assert supervised_text(tokenizer, found) == [(THOUGHTS + said).strip() + "<|end|>"]
        assert found.rewritten
        before = tokenizer.decode(found.ids[: found.last_answer])
        assert before == "<s><|User|>a<|Assistant|>\n\ntree<|end|><|User|>b<|Assistant|>"
        prompt = chat_template.encode_prompt(tokenizer, messages[:-1])
        assert prompt == found.ids[: found.last_answer]


def test_a_system_turn_that_moves_with_the_questions_leaves_the_last_answer_supervised():
    tokenizer = loaded("mistral")
    found = chat_template.encode_conversation(tokenizer, turns("a", "tree", "b", "dog", system="s"))
    assert supervised_text(tokenizer, found) == [" dog</s>"] and found.rewritten
    found = chat_template.encode_conversation(tokenizer, turns("a", "tree", "b", "dog"))
    assert supervised_text(tokenizer, found) == [" tree</s>", " dog</s>"] and not found.rewritten


def test_a_template_without_system_turns_says_so():
    with pytest.raises(TemplateError, match="refuses this conversation: no system role"):
        chat_template.encode_conversation(loaded("gemma"), turns("a", "tree", system="s"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_to_rank_stand_behind_the_prompt_of_ppo(name):
    tokenizer = loaded(name)
    prompt = turns("a", THOUGHTS + "tree", "b")
    answers = ["dog", THOUGHTS + "a longer answer"]
    given = [{"role": "assistant", "content": text} for text in answers]
    rows, counts = fitting.encode_answers(tokenizer, prompt, given, 200, "cut", "cut")
    assert counts == fitting.Counts(kept=2)
    before = chat_template.encode_prompt(tokenizer, prompt)
    for row, answer in zip(rows, answers, strict=True):
        assert row.ids[: len(before)] == before
        after = tokenizer.decode(row.ids[len(before) :])
        assert after.endswith(answer + tokenizer.eos_token)


# The day.


@pytest.mark.parametrize("format", ["%d %B %Y", "%Y-%m-%d", "%-d %b %y", "%A, %j", "%F %H:%M:%S"])
def test_the_day_is_written_as_python_would(format):
    tokenizer = loaded("qwen3")
    stated = "{%- macro head() -%}{{ strftime_now('" + format + "') }}{%- endmacro -%}{{ head() }}"
    tokenizer.chat_template = stated + TEMPLATES["qwen3"]
    tokenizer.date = "2026-02-03"
    ids = chat_template.encode_prompt(tokenizer, turns("a"))
    day = datetime(2026, 2, 3).strftime(format)
    assert tokenizer.decode(ids).startswith(f"{day}<|im_start|>user")


def test_a_template_states_the_day_it_is_told_whatever_the_clock_says(monkeypatch):
    tokenizer = loaded("llama3.2")
    tokenizer.date = "2026-01-31"
    messages = turns("a", "tree")
    today = chat_template.encode_conversation(tokenizer, messages)
    assert "Today Date: 31 Jan 2026\n" in tokenizer.decode(today.ids)
    later = SimpleNamespace(now=lambda: datetime(2031, 5, 6))
    monkeypatch.setattr(chat_template_utils, "datetime", later)
    # In another process, too, which a tokenizer is sent to.
    for reader in (tokenizer, pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert chat_template.encode_conversation(reader, messages) == today
        assert chat_template.encode_prompt(reader, messages[:1]) == today.ids[: today.last_answer]
    tokenizer.date = ""
    of_the_clock = chat_template.encode_prompt(tokenizer, messages[:1])
    assert "Today Date: 06 May 2031\n" in tokenizer.decode(of_the_clock)
