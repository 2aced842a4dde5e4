"""Messages → tokens: which are supervised, and what a tokenizer is given to train with."""

import copy

import pytest
from tokenizers import pre_tokenizers

from tests.helpers.chat_templates import byte_level
from utils.data import chat_template
from utils.data.chat_template import TemplateError
from utils.models import from_scratch

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Name two fruits, please. What is the first letter of tree?",
    "Say hello to Tom. Hello, Tom! user and assistant and system",
    "从小到大排列：3 1 2。请列出三种动物。今天天气很好。我喜欢喝茶。",
] * 20
HARD = [
    "tree",
    "\n\ntwo newlines in front",
    "two  spaces   three",
    " a leading space",
    "a trailing space ",
    "lines\n\nand\n",
    "tab\there",
    "🙂 and 🎉👩‍👩‍👧",
    "请列出三种动物。猫、狗、马",
    "字 unseen 龘靐 and 3 + 4 = 7",
    "▁ is the mark of a space",
    "",
]


def sampled(tokenizer, answer):
    """Ids of an answer and its stop token as a policy would sample them after a prompt."""
    return tokenizer(tokenizer.eos_token + answer, add_special_tokens=False).input_ids[1:] + [
        tokenizer.eos_token_id
    ]


@pytest.fixture(scope="module")
def trained():
    return from_scratch.train_tokenizer(TEXTS, 400)


@pytest.fixture
def tokenizer(trained):
    return copy.deepcopy(trained)


def turns(*contents, system=None):
    first = [{"role": "system", "content": system}] if system is not None else []
    return first + [
        {"role": "user" if i % 2 == 0 else "assistant", "content": text}
        for i, text in enumerate(contents)
    ]


def supervised_runs(encoded):
    """Ids of each stretch of supervised tokens."""
    runs, before = [], False
    for token, on in zip(encoded.ids, encoded.supervised, strict=True):
        if on and not before:
            runs.append([])
        if on:
            runs[-1].append(token)
        before = on
    return runs


# The tokenizer trained here.


@pytest.mark.parametrize("text", [t for t in HARD if "▁" not in t])
def test_text_survives_the_round_trip(trained, text):
    ids = trained(text, add_special_tokens=False).input_ids
    assert trained.decode(ids) == text
    assert trained.unk_token_id not in ids


def test_text_survives_saving(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = chat_template.load_tokenizer(str(tmp_path))
    messages = turns("two  spaces", "🙂 猫\n", system=" s ")
    assert chat_template.encode_conversation(loaded, messages) == chat_template.encode_conversation(
        trained, messages
    )
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|pad|>")
    assert loaded.chat_template == trained.chat_template


def test_special_tokens_are_one_token_each(trained):
    for text in (*from_scratch.SPECIAL, "\n"):
        assert len(trained(text, add_special_tokens=False).input_ids) == 1


def test_template_words_are_one_token_each(trained):
    lengths = [
        len(trained(w, add_special_tokens=False).input_ids) for w in from_scratch.TEMPLATE_WORDS
    ]
    assert lengths == [1] * len(from_scratch.TEMPLATE_WORDS)


# Supervised tokens.


@pytest.mark.parametrize("answer", [t for t in HARD if "▁" not in t])
@pytest.mark.parametrize("system", [None, "Be  brief. 请简短"])
def test_supervised_tokens_are_the_answer_and_the_stop_token(tokenizer, answer, system):
    encoded = chat_template.encode_conversation(tokenizer, turns("q  1 猫", answer, system=system))
    (run,) = supervised_runs(encoded)
    assert tokenizer.decode(run) == answer + tokenizer.eos_token
    assert encoded.ids[-1] == tokenizer.eos_token_id and encoded.supervised[-1]
    assert encoded.ids[encoded.last_answer :] == run
    head = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    assert tokenizer.decode(encoded.ids) == (
        f"{head}<|im_start|>user\nq  1 猫<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    )


@pytest.mark.parametrize("system", [None, "You are kind."])
def test_supervised_tokens_of_several_turns(tokenizer, system):
    answers = ["tree", " spaced  out ", "猫、🙂\n"]
    messages = turns("a", answers[0], "b\n", answers[1], "请", answers[2], system=system)
    encoded = chat_template.encode_conversation(tokenizer, messages)
    runs = supervised_runs(encoded)
    assert [tokenizer.decode(run) for run in runs] == [a + "<|im_end|>" for a in answers]
    assert encoded.ids[encoded.last_answer :] == runs[-1]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(encoded.ids) == rendered.removesuffix("\n")


def check_prompt_and_response(tokenizer, messages, answer):
    ids = chat_template.encode_prompt(tokenizer, messages)
    ids += sampled(tokenizer, answer)
    whole = [*messages, {"role": "assistant", "content": answer}]
    assert ids == chat_template.encode_conversation(tokenizer, whole).ids


def set_prepend_scheme(tokenizer, scheme):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme=scheme, split=False
    )


@pytest.mark.parametrize("scheme", ["never", "first", "always"])
@pytest.mark.parametrize("answer", HARD)
def test_prompt_and_response_make_the_conversation(tokenizer, answer, scheme):
    """What SFT trains on is, to the token, what a rollout is prompted with and answers."""
    set_prepend_scheme(tokenizer, scheme)
    check_prompt_and_response(tokenizer, turns("a  b", system="s"), answer)
    if scheme != "always":
        check_prompt_and_response(tokenizer, turns("a", "tree", "b", "dog", "c"), answer)


def test_earlier_answers_are_the_same_tokens_in_prompts_with_a_space_before_every_piece(tokenizer):
    set_prepend_scheme(tokenizer, "always")
    check_prompt_and_response(tokenizer, turns("a", "tree", "b"), "dog")


def test_earlier_answers_are_the_same_tokens_in_prompts_where_newlines_merge():
    tokenizer = byte_level(merges=[("Ċ", "Ċ")])
    chat_template.set_up(tokenizer)
    check_prompt_and_response(tokenizer, turns("a", "\n\ntree", "b"), "dog")


def test_answers_get_no_space_in_front(tokenizer):
    """LlamaTokenizer puts a space before the first word of a text; an answer is not the first."""
    plain = chat_template.encode_conversation(tokenizer, turns("dog", "tree", "two", "hello"))
    set_prepend_scheme(tokenizer, "first")
    tree = tokenizer("tree", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(tree)[0].startswith("▁"), "the trap is set"
    encoded = chat_template.encode_conversation(tokenizer, turns("dog", "tree", "two", "hello"))
    assert encoded == plain
    for run in supervised_runs(encoded):
        assert not tokenizer.convert_ids_to_tokens(run)[0].startswith("▁")
    response = sampled(tokenizer, "tree")
    assert response == supervised_runs(plain)[0]


# Templates.


def test_a_template_that_renders_a_prompt_otherwise_with_its_answer_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}" + chat_template.CHATML
    with pytest.raises(TemplateError, match=r"turn 2 with '1<\|im_start\|>.*behind '2<\|im_start"):
        chat_template.encode_conversation(tokenizer, turns("a", "b"))


@pytest.mark.parametrize("answer", ["a<|im_end|>b", "<|im_end|>", "b<|im_end|>", "<|im_end|>\nb"])
@pytest.mark.parametrize("turn", [2, 4])
def test_an_answer_that_holds_the_stop_token_is_refused(tokenizer, answer, turn):
    answers = [answer, "tree"] if turn == 2 else ["tree", answer]
    messages = turns("a", answers[0], "b", answers[1])
    with pytest.raises(TemplateError, match=rf"^turn {turn} holds the stop token <\|im_end\|> 2 "):
        chat_template.encode_conversation(tokenizer, messages)


def test_a_template_that_does_not_end_an_answer_with_the_stop_token_is_refused(tokenizer):
    tokenizer.eos_token = "<|pad|>"
    with pytest.raises(TemplateError, match=r"turn 2 holds the stop token <\|pad\|> 0 times"):
        chat_template.encode_conversation(tokenizer, turns("a", "tree"))


def test_a_prompt_whose_earlier_turns_are_refused_is_rendered_as_it_stands(tokenizer):
    messages = turns("a", "tree<|im_end|>", "b")
    ids = chat_template.encode_prompt(tokenizer, messages)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_set_up_leaves_a_complete_tokenizer_alone(tokenizer):
    before = (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer), tokenizer.chat_template)
    chat_template.set_up(tokenizer)
    assert before == (
        tokenizer.eos_token,
        tokenizer.pad_token,
        len(tokenizer),
        tokenizer.chat_template,
    )


def test_set_up_takes_the_stop_token_from_the_template(tokenizer):
    """As in Qwen2.5's base model: the template ends turns with <|im_end|>, eos is another."""
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id != end
    chat_template.set_up(tokenizer)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == end
    assert tokenizer.pad_token == "<|endoftext|>", "a pad of its own already"
    encoded = chat_template.encode_conversation(tokenizer, turns("a", "tree"))
    assert encoded.ids[-1] == end


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_set_up_gives_a_pad_token_of_its_own(tokenizer, pad):
    tokenizer.pad_token = pad
    chat_template.set_up(tokenizer)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == chat_template.PAD
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert tokenizer.padding_side == "right" and tokenizer.truncation_side == "left"


def test_set_up_gives_chatml_where_there_is_no_template():
    tokenizer = byte_level()
    assert tokenizer.chat_template is None and len(tokenizer) == 257
    chat_template.set_up(tokenizer)
    assert tokenizer.chat_template == chat_template.CHATML
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    new = {"<|im_start|>", "<|im_end|>", "<|pad|>"}
    assert sorted(map(tokenizer.convert_tokens_to_ids, new)) == [257, 258, 259]
    encoded = chat_template.encode_conversation(tokenizer, turns("a", "tree 猫"))
    assert encoded.ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.decode(supervised_runs(encoded)[0]) == "tree 猫<|im_end|>"
    chat_template.set_up(tokenizer)
    assert len(tokenizer) == 260, "a second time adds nothing"


def test_set_up_refuses_a_template_without_a_stop_token(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(SystemExit, match="could never learn to stop"):
        chat_template.set_up(tokenizer)


def test_load_tokenizer_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="cannot load a tokenizer") as caught:
        chat_template.load_tokenizer(str(tmp_path / "nothing"))
    assert "there is no folder" in str(caught.value)


def test_show_colours_the_supervised_tokens(tokenizer):
    encoded = chat_template.encode_conversation(tokenizer, turns("a", "tree"))
    shown = chat_template.show(tokenizer, encoded)
    count = sum(encoded.supervised)
    assert shown.count("\033[32m") == count > 0
    assert shown.endswith(f"{len(encoded.ids)} tokens, {count} supervised (green)")
