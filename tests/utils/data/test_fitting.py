"""Rows longer than their limit: what stays of prompt and answer, and what is counted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AddedToken

from tests.helpers.chat_templates import TEMPLATES, byte_level, with_template
from utils.data import chat_template, fitting
from utils.data.fitting import Counts
from utils.models import from_scratch

LONG = " ".join(["one two three four five six seven eight nine ten"] * 6)


@pytest.fixture(scope="module")
def tokenizers():
    """Each template's, of bytes, and ChatML's of sentencepiece's pieces."""
    found = {name: with_template(name) for name in TEMPLATES}
    for tokenizer in found.values():
        chat_template.set_up(tokenizer)
    found["pieces"] = from_scratch.train_tokenizer([LONG, "猫 🙂"] * 20, 330)
    return found


def turns(*contents, system=None):
    first = [{"role": "system", "content": system}] if system is not None else []
    return tuple(first) + tuple(
        {"role": "user" if i % 2 == 0 else "assistant", "content": text}
        for i, text in enumerate(contents)
    )


def text_of(tokenizer, messages) -> str:
    """A prompt as the template renders it, without what R1's opens."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return text.removesuffix("<think>\n")


KINDS = [*TEMPLATES, "pieces"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_keeps_its_frame_and_the_end_of_its_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    system = None if kind == "gemma" else "Be kind."
    whole = turns(LONG, system=system)
    ids = chat_template.encode_prompt(tokenizer, whole)
    frame = len(chat_template.encode_prompt(tokenizer, turns("", system=system)))
    for limit in (len(ids) - 1, (len(ids) + frame) // 2, frame + 9):
        cut, counts = fitting.encode_prompt(tokenizer, whole, limit, "cut")
        assert counts == Counts(kept=1, cut_prompts=1)
        # A word cut in two may be more tokens than its share of them was.
        assert limit - 3 <= len(cut) <= limit
        before, after = text_of(tokenizer, whole).split(LONG)
        found = tokenizer.decode(cut)
        assert found.startswith(before.rstrip(" ")) and found.endswith(after)
        assert LONG.endswith(found[len(before) :].removesuffix(after).lstrip(" ")), found
    assert fitting.encode_prompt(tokenizer, whole, len(ids), "drop") == (ids, Counts(kept=1))
    for limit, fate in ((len(ids) - 1, "drop"), (frame - 1, "cut"), (1, "cut")):
        assert fitting.encode_prompt(tokenizer, whole, limit, fate) == (None, Counts(dropped=1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_oldest_exchanges_go_first_and_whole(tokenizers, kind):
    tokenizer = tokenizers[kind]
    system = () if kind == "gemma" else turns(system="Be kind.")
    talk = turns("one two", "three four", "five six", "seven eight", "nine ten")
    lengths = []
    for start in (0, 2, 4):
        ids = chat_template.encode_prompt(tokenizer, system + talk[start:])
        for limit in (len(ids), lengths[-1] - 1 if lengths else len(ids) + 5):
            kept, _ = fitting.encode_prompt(tokenizer, system + talk, limit, "cut")
            assert kept == ids, (start, limit)
        lengths.append(len(ids))
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [110, 150, 230])
def test_a_training_row_is_cut_as_the_prompt_of_ppo_is(tokenizers, kind, max_length):
    tokenizer = tokenizers[kind]
    for messages in (
        turns(LONG, "tree"),
        turns("q", "dog", LONG, "tree"),
        turns("q", LONG, "r", "t"),
    ):
        whole = chat_template.encode_conversation(tokenizer, messages)
        if len(whole.ids) <= max_length:
            continue
        answer = whole.ids[whole.last_answer :]
        row, counts = fitting.encode_conversation(tokenizer, messages, max_length, "cut", "drop")
        assert (counts.kept, counts.cut_prompts, counts.cut_answers) == (1, 1, 0)
        assert len(row.ids) <= max_length and row.ids[row.last_answer :] == answer
        room = max_length - len(answer)
        prompt, _ = fitting.encode_prompt(tokenizer, messages[:-1], room, "cut")
        assert row.ids[: row.last_answer] == prompt
        left_out = fitting.encode_conversation(tokenizer, messages, max_length, "drop", "drop")
        assert left_out == (None, Counts(dropped=1))


def test_several_user_turns_in_a_row_are_one_exchange(tokenizers):
    tokenizer = tokenizers["pieces"]
    a, b, c, d = (turns(text)[0] for text in ("one two", "three", "five six", "seven"))
    answer = {"role": "assistant", "content": "ten"}
    talk = (a, b, answer, c, d)
    limit = len(chat_template.encode_prompt(tokenizer, talk)) - 1
    assert fitting.shortened(tokenizer, talk, limit) == (c, d)
    limit = len(chat_template.encode_prompt(tokenizer, (c, d))) - 1
    first, last = fitting.shortened(tokenizer, talk, limit)
    assert first == c and "seven".endswith(last["content"]) and last["content"]


def test_no_half_character_is_left(tokenizers):
    """A byte-level token may be a third of a character."""
    tokenizer, text = tokenizers["qwen3"], "猫🙂" * 30
    frame = len(chat_template.encode_prompt(tokenizer, turns("")))
    for limit in range(frame + 8, frame + 40):
        ids, _ = fitting.encode_prompt(tokenizer, turns(text), limit, "cut")
        found = tokenizer.decode(ids)
        assert "\ufffd" not in found and limit - 3 <= len(ids) <= limit


@pytest.mark.parametrize("text", ["ONE TWO THREE " * 20, "é́à" * 40, "a" * 5 + "B  " * 60])
def test_a_tokenizer_that_gives_back_other_text_cuts_too(text):
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("  ", " ")]
    )
    marks = [AddedToken(m, normalized=False, special=True) for m in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    chat_template.set_up(tokenizer)
    fitted = fitting.shortened(tokenizer, turns(text), 60)
    assert text.endswith(fitted[0]["content"]) and len(fitted[0]["content"]) > 5
    assert len(chat_template.encode_prompt(tokenizer, fitted)) <= 60


# Answers.


def by_hand(prompt: int, answer: int, max_length: int, long_answers="drop"):
    """A row of so many letters, one token each; what is left of them, and the counts."""
    tokenizer = byte_level()
    chat_template.set_up(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if m.role == 'assistant' }}"
        "{% endfor %}"
    )
    messages = turns("p" * prompt, "a" * (answer - 1))
    found, counts = fitting.encode_conversation(
        tokenizer, messages, max_length, "cut", long_answers
    )
    if found is None:
        return None, counts
    text = tokenizer.decode(found.ids)
    assert text.endswith("<|im_end|>") and len(found.ids) == len(found.supervised)
    assert found.supervised == [False] * text.count("p") + [True] * (text.count("a") + 1)
    return (text.count("p"), text.count("a") + 1), counts


@pytest.mark.parametrize("long_answers", ["drop", "cut"])
def test_what_fits_stays_and_the_prompt_gives_way_first(long_answers):
    assert by_hand(4, 4, 8, long_answers) == ((4, 4), Counts(kept=1))
    assert by_hand(1, 7, 8, long_answers) == ((1, 7), Counts(kept=1))
    assert by_hand(10, 3, 8, long_answers) == ((5, 3), Counts(kept=1, cut_prompts=1))
    # Down to a quarter of the room.
    assert by_hand(10, 6, 8, long_answers) == ((2, 6), Counts(kept=1, cut_prompts=1))


def test_an_answer_too_long_even_so_is_dropped_or_cut_before_its_stop_token():
    for prompt in (2, 10):
        assert by_hand(prompt, 7, 8) == (None, Counts(dropped=1))
    assert by_hand(10, 12, 8, "cut") == ((2, 6), Counts(kept=1, cut_prompts=1, cut_answers=1))
    assert by_hand(1, 12, 8, "cut") == ((1, 7), Counts(kept=1, cut_answers=1))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(4, 30), st.sampled_from(["drop", "cut"]))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_a_row_always_fits_and_wastes_no_room(prompt, answer, max_length, long_answers):
    found, counts = by_hand(prompt, answer, max_length, long_answers)
    assert counts.kept + counts.dropped == 1
    if found is None:
        assert long_answers == "drop" and answer + min(prompt, max_length // 4) > max_length
        return
    before, after = found
    assert counts.cut_prompts == (before < prompt) and counts.cut_answers == (after < answer)
    if counts.cut_prompts or counts.cut_answers:
        assert before + after == max_length
    assert before >= min(prompt, max_length // 4)


def encode_answers(tokenizer, prompt, texts, max_length, long_prompts):
    """(token rows, Counts) as comparisons are encoded."""
    answers = [{"role": "assistant", "content": text} for text in texts]
    limits = max_length, long_prompts, "cut"
    rows, counts = fitting.encode_answers(tokenizer, prompt, answers, *limits)
    return rows and [row.ids for row in rows], counts


def test_answers_of_one_prompt_share_its_tokens_and_are_counted(tokenizers):
    tokenizer = tokenizers["llama3.2"]
    stop, short, long = tokenizer.eos_token_id, "tree", "dog dog dog"
    rows, counts = encode_answers(tokenizer, turns(LONG), [short, long], 180, "cut")
    assert counts == Counts(kept=2, cut_prompts=2)
    room = 180 - len(long) - 1
    prompt, _ = fitting.encode_prompt(tokenizer, turns(LONG), room, "cut")
    after = [tokenizer.decode(row[len(prompt) :]) for row in rows]
    assert [row[: len(prompt)] for row in rows] == [prompt, prompt]
    assert after == [short + "<|eot|>", long + "<|eot|>"]

    rows, counts = encode_answers(tokenizer, turns("one"), [short, LONG], 180, "cut")
    assert counts == Counts(kept=2, cut_answers=1)
    assert len(rows[1]) == 180 and rows[1][-1] == stop and stop not in rows[1][80:-1]
    left_out = encode_answers(tokenizer, turns(LONG), [short, long], 180, "drop")
    assert left_out == (None, Counts(dropped=2))


def test_rows_whose_history_is_rewritten_are_counted_and_told(tokenizers):
    talk = turns("q", "dog", "r", "tree")
    counts = Counts()
    for messages in (talk, talk[2:], talk):
        counts += fitting.encode_conversation(tokenizers["qwen3"], messages, 400, "cut", "drop")[1]
    assert counts == Counts(kept=3, rewritten=2)
    assert counts.line("training data") == (
        "training data: 3 rows kept, 2 of them without loss on earlier answers, which the chat "
        "template rewrites once turns follow"
    )
    # What is cut away is not rewritten.
    limit = len(chat_template.encode_conversation(tokenizers["qwen3"], talk).ids) - 1
    found = fitting.encode_conversation(tokenizers["qwen3"], talk, limit, "cut", "drop")
    assert found[1] == Counts(kept=1, cut_prompts=1)


@pytest.mark.parametrize(
    "prompt, answer, max_length, room",
    [
        (3, 2, 8, 3),  # all fits
        (6, 2, 8, 6),
        (10, 3, 8, 5),  # what the answer leaves
        (10, 6, 8, 2),
        (10, 7, 8, 2),  # a quarter
        (10, 100, 8, 2),
        (1, 100, 8, 1),  # less than a quarter
        (0, 100, 8, 0),
        (10, 100, 11, 2),
        (10, 3, 3, 0),
        (10, 2, 3, 1),
    ],
)
def test_prompt_room_by_hand(prompt, answer, max_length, room):
    assert fitting.prompt_room(prompt, answer, max_length) == room
