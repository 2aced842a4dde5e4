"""Which rows --ptx_data may hold, and which of their tokens count."""

import copy
import json

import pytest

from step3_ppo import ptx
from tests.helpers.chat_templates import put_in_front
from tests.helpers.small_models import config_of
from utils.data import chat_template
from utils.data.rows import DataError

SETTINGS = dict(ptx_coef=1.0, max_prompt_length=20, max_response_length=12)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return chat_template.load_tokenizer(str(tiny / "base_model"))


def load(tokenizer, folder, *files, **settings):
    """ptx.load of files given as lists of rows."""
    names = []
    for i, rows in enumerate(files):
        path = folder / f"{i}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        names.append(str(path))
    return ptx.load(
        config_of(ptx_data=names, output_dir=str(folder), **SETTINGS, **settings), tokenizer
    )


def test_all_of_a_plain_text_counts_and_its_end_is_learned(tokenizer, tmp_path):
    rows = [{"text": "The sky is blue.", "url": "-"}, {"text": "a b c " * 50, "url": "-"}]
    short, long = load(tokenizer, tmp_path, rows).rows
    assert short.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(short.ids[:-1]) == "The sky is blue."
    assert len(long.ids) == 32 and tokenizer.eos_token_id not in long.ids, "cut, and so no end"
    assert all(short.supervised) and all(long.supervised)


def test_a_plain_text_begins_as_the_tokenizer_begins_a_text(tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    put_in_front(other, "<s>")
    (found,) = load(other, tmp_path, [{"text": "Snow is white."}]).rows
    assert other.decode(found.ids) == f"<s>Snow is white.{other.eos_token}"


def test_demonstrations_count_in_their_answers(tokenizer, tmp_path):
    # Alpaca's own file has a column `text` too.
    row = {"instruction": "Add 3 and 4.", "input": "", "output": "7", "text": "### Instruction:"}
    (found,) = load(tokenizer, tmp_path, [row]).rows
    turns = [{"role": "user", "content": "Add 3 and 4."}, {"role": "assistant", "content": "7"}]
    assert found == chat_template.encode_conversation(tokenizer, turns)
    assert not all(found.supervised) and any(found.supervised)


def test_columns_of_other_names_decide_what_the_rows_are(tokenizer, tmp_path):
    (plain,) = load(tokenizer, tmp_path, [{"body": "Snow is white."}], columns=["text=body"]).rows
    assert tokenizer.decode(plain.ids[:-1]) == "Snow is white." and all(plain.supervised)
    row = {"text": "Add 3 and 4.", "sum": "7"}
    (shown,) = load(tokenizer, tmp_path, [row], columns=["prompt=text", "answer=sum"]).rows
    turns = [{"role": "user", "content": "Add 3 and 4."}, {"role": "assistant", "content": "7"}]
    assert shown == chat_template.encode_conversation(tokenizer, turns)


def test_both_kinds_together_are_counted(tokenizer, tmp_path):
    found = load(
        tokenizer,
        tmp_path,
        [{"text": "a b c " * 50}, {"text": "Snow is white."}],
        [{"prompt": "Add 3 and 4.", "completion": "7"}, {"prompt": "x", "completion": "y " * 99}],
    )
    assert len(found.rows) == 3
    assert found.counts.line("rows") == (
        "rows: 3 rows kept, 1 of them with the answer cut, 1 dropped as too long"
    )


@pytest.mark.parametrize(
    "value, said", [(None, "text is null"), (5, "text is int"), ("", "is empty"), (" ", "is blank")]
)
def test_a_row_without_text_is_named(tokenizer, tmp_path, value, said):
    rows = [{"text": "Snow is white."}, {"text": value}]
    with pytest.raises(DataError) as error:
        load(tokenizer, tmp_path, rows)
    assert said in str(error.value) and "0.jsonl:2" in str(error.value)
    (kept,) = load(tokenizer, tmp_path, rows, max_bad_rows=1.0).rows
    assert "Snow" in tokenizer.decode(kept.ids)
    assert said in (tmp_path / "bad_rows.jsonl").read_text()


def test_no_row_that_fits_ends_the_run(tokenizer, tmp_path):
    with pytest.raises(SystemExit, match="no row fits"):
        load(tokenizer, tmp_path, [{"prompt": "x", "completion": "y " * 99}])
