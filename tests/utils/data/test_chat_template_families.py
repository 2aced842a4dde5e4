"""What each family is trained on: the supervised text of an answer, and where its model stops."""

import pytest

from tests.helpers import family_folders
from utils.data import chat_template

TEXTS = ["What does Tom like, 7 times? Ann likes tea.", "Bob likes snow, and so does 小红."] * 3
QUESTION = [{"role": "user", "content": "What does Tom like?"}]
ANSWER = {"role": "assistant", "content": "tea and snow"}
# Stop token, and what stands before the answer and belongs to it.
STOPS = {
    "Llama 2": ("</s>", ""),
    "Llama 3.2": ("<|eot_id|>", ""),
    "Qwen2": ("<|im_end|>", ""),
    "Qwen2.5": ("<|im_end|>", ""),
    "Qwen3": ("<|im_end|>", "<think>\n\n</think>\n\n"),
    "Mistral": ("</s>", ""),
    "Gemma 2": ("<end_of_turn>", ""),
    "Gemma 3": ("<end_of_turn>", ""),
    "Phi-3": ("<|end|>", ""),
    "Phi-4": ("<|im_end|>", ""),
    "GPT-2": ("<|im_end|>", ""),
    "OPT": ("<|im_end|>", ""),
    "GPT-NeoX": ("<|im_end|>", ""),
    "Bloom": ("<|im_end|>", ""),
    "Falcon": ("<|endoftext|>", ""),
    "GLM-4": ("<|user|>", ""),
    "InternLM 3": ("<|im_end|>", ""),
    "Mixtral": ("</s>", ""),
    "Qwen2-MoE": ("<|im_end|>", ""),
    "Qwen3-MoE": ("<|im_end|>", "<think>\n\n</think>\n\n"),
}


def packed(text: str) -> str:
    """Without blanks, which sentencepiece adds and drops at special tokens."""
    return "".join(text.split())


@pytest.fixture(scope="module", params=family_folders.REAL)
def family(request, tmp_path_factory):
    """(name, tokenizer as a step loads it, the same saved and loaded again)."""
    root = tmp_path_factory.mktemp("family")
    family_folders.write_tokenizer(root / "base", request.param, TEXTS)
    tokenizer = chat_template.load_tokenizer(str(root / "base"))
    tokenizer.save_pretrained(root / "saved")
    return request.param, tokenizer, chat_template.load_tokenizer(str(root / "saved"))


def test_the_answer_and_its_stop_token_are_supervised(family):
    name, *tokenizers = family
    stop, before = STOPS[name]
    for tokenizer in tokenizers:
        encoded = chat_template.encode_conversation(tokenizer, [*QUESTION, ANSWER])
        start = encoded.last_answer
        supervised = tokenizer.decode(encoded.ids[start:])
        assert packed(supervised) == packed(before + ANSWER["content"] + stop)
        assert encoded.ids[-1] == tokenizer.convert_tokens_to_ids(stop) == tokenizer.eos_token_id
        assert tokenizer.pad_token_id not in encoded.ids
        assert encoded.ids[:start] == chat_template.encode_prompt(tokenizer, QUESTION)


def test_a_second_question_follows_the_first_answer(family):
    """What a model is asked with later is what it was trained on, its template's own text."""
    name, *tokenizers = family
    for tokenizer in tokenizers:
        turns = [*QUESTION, ANSWER, *QUESTION]
        ids = chat_template.encode_prompt(tokenizer, turns)
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert packed(tokenizer.decode(ids)) == packed(text)


@pytest.mark.parametrize("family", ["Phi-3"], indirect=True)
def test_another_stop_token_leaves_what_the_template_writes(family):
    """Phi-3's writes eos_token behind all turns, and none of them ends with that."""
    _, *tokenizers = family
    for tokenizer in tokenizers:
        text = tokenizer.apply_chat_template([*QUESTION, ANSWER], tokenize=False)
        assert text.endswith("tea and snow<|end|>\n<|endoftext|>")
