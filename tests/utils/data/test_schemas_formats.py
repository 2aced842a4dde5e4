"""Every format that data sets have: the exact supervised tokens, the prompts, the comparisons."""

import json
from collections import Counter

import pytest

from tests.helpers import data_formats
from tests.helpers.data_formats import COMPARED, FORMATS, FULL, PROMPTS_ONLY
from utils.data import chat_template
from utils.data.comparisons import load_comparisons
from utils.data.demonstrations import load_conversations
from utils.data.prompts import load_prompts
from utils.data.rows import BadRows
from utils.data.schemas import SCHEMAS
from utils.models import from_scratch

IM = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for d in FULL for turn in d.turns for text in turn] * 5
    return from_scratch.train_tokenizer(texts, 500)


@pytest.fixture
def save(tmp_path):
    def write(*rows, name="a.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def chatml(turns):
    return "".join(f"{IM[0]}{t['role']}\n{t['content']}{IM[1]}\n" for t in turns)


def pieces_of(dialogue):
    """[(text, supervised)] of a dialogue in ChatML: answers with their stop token are learnt."""
    pieces, before = [], ""
    for turn in dialogue.whole:
        if turn["role"] == "assistant":
            pieces.append((f"{before}{IM[0]}assistant\n", False))
            pieces.append((f"{turn['content']}{IM[1]}", True))
            before = "\n"
        else:
            before += chatml([turn])
    return pieces


def tokens_of(tokenizer, pieces):
    """(ids, supervised) by the tokenizers library alone, each stretch of text by itself."""
    ids, flags = [], []
    for text, supervised in pieces:
        piece = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        flags += [supervised] * len(piece)
    return ids, flags


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in PROMPTS_ONLY])
def test_supervised_tokens(tokenizer, save, name):
    rows, dialogues = FORMATS[name]
    bad = BadRows()
    found = load_conversations([save(*rows)], bad=bad)
    assert bad.problems == [] and len(found) == len(dialogues) == 20
    for one, dialogue in zip(found, dialogues, strict=True):
        encoded = chat_template.encode_conversation(tokenizer, one.messages)
        assert (encoded.ids, encoded.supervised) == tokens_of(tokenizer, pieces_of(dialogue)), one


@pytest.mark.parametrize("name", FORMATS)
def test_prompts(save, name):
    rows, dialogues = FORMATS[name]
    bad = BadRows()
    found = load_prompts([save(*rows)], bad=bad)
    assert bad.problems == []
    wanted = [chatml(d.messages) for d in dialogues]
    if name == "kto":  # a bad answer's prompt is a prompt
        wanted = [text for text in wanted for _ in range(2)]
    if name.startswith("tree"):  # each of the user's turns is one
        wanted = [chatml(d.messages[: 2 * n + 1]) for d in dialogues for n in range(len(d.turns))]
    if name == "sharegpt with open ends":
        wanted = [chatml([*d.whole, data_formats.BYE]) for d in dialogues]
    assert Counter(chatml(one.messages) for one in found) == Counter(wanted)


@pytest.mark.parametrize("name", COMPARED)
def test_comparisons(save, name):
    rows, dialogues = FORMATS[name]
    bad = BadRows()
    # UltraFeedback binarized has messages too, which no comparison is read from.
    found = load_comparisons([save(*rows)], bad=bad)
    assert bad.problems == []
    wanted = {chatml(d.messages): [d.last[1], *d.worse][: COMPARED[name]] for d in dialogues}
    if name.startswith("tree"):
        for d in dialogues:
            for n, (_, answered) in enumerate(d.turns):
                wanted[chatml(d.messages[: 2 * n + 1])] = [answered, d.worse[0]]
    assert len(found) == len(wanted)
    for one in found:
        order = sorted(zip(one.scores, one.responses, strict=True), reverse=True)
        assert [text for _, text in order] == wanted[chatml(one.prompt)]
        assert len(set(one.scores)) == len(one.scores)


def test_every_schema_has_a_format(save):
    """A schema that no format is recognised as would be read by no test of this file."""
    seen = set()
    for rows, _ in FORMATS.values():
        seen.add(next(name for name, schema in SCHEMAS.items() if schema.fits(rows[0])))
    assert seen == set(SCHEMAS) - {"plain_text"}  # which no loader of these reads
