"""Reading rows: every kind of file, every way it can be broken."""

import gzip
import json
import os

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from utils.data.demonstrations import load_conversations
from utils.data.files import OTHER_THINGS
from utils.data.rows import BadRows, DataError
from utils.data.sources import has_split, stream_rows

GOOD = b'{"a": 1}\n'
PACKED = gzip.compress(GOOD, mtime=0)  # no clock in it: test names are made from parameters


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def problems_of(name, splits=("train",)):
    bad = BadRows()
    rows = list(stream_rows(name, splits, bad))
    return rows, bad.problems


def refusal_of(name, splits=("train",)):
    with pytest.raises(DataError) as caught:
        list(stream_rows(name, splits, BadRows()))
    return str(caught.value)


@pytest.mark.parametrize(
    "name, content, wheres",
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": 2}\r\n', [":1", ":3"]),
        ("bom.jsonl", b'\xef\xbb\xbf{"a": 1}\n{"a": 2}', [":1", ":2"]),
        ("a.json", b'[{"a": 1},\n {"a": 2}]\n', ["[1]", "[2]"]),
        ("bom.json", b'\xef\xbb\xbf\n [\n{"a": 1} , {"a": 2}\n]', ["[1]", "[2]"]),
        ("belle.json", b'{"a": 1}\n{"a": 2}\n', [":1", ":2"]),
    ],
)
def test_json_files(tmp_path, name, content, wheres):
    path = write(tmp_path / name, content)
    rows, problems = problems_of(path)
    assert problems == []
    assert [(row.data, row.where) for row in rows] == [
        ({"a": 1}, path + wheres[0]),
        ({"a": 2}, path + wheres[1]),
    ]


def test_csv_names_the_line_a_row_starts_on(tmp_path):
    path = write(tmp_path / "a.csv", 'q,a\r\n"two\r\nlines",x\r\n\r\n"say ""hi""",中\r\n'.encode())
    rows, problems = problems_of(path)
    assert problems == []
    assert [(row.where[len(path) :], row.data) for row in rows] == [
        (":2", {"q": "two\r\nlines", "a": "x"}),
        (":5", {"q": 'say "hi"', "a": "中"}),
    ]


def test_very_long_lines(tmp_path):
    long = "x" * 3_000_000
    rows, _ = problems_of(write(tmp_path / "a.jsonl", json.dumps({"a": long}).encode()))
    assert rows[0].data == {"a": long}
    rows, _ = problems_of(write(tmp_path / "a.csv", f"a,b\n{long},1\n".encode()))
    assert rows[0].data == {"a": long, "b": "1"}


BROKEN_LINES = {
    "truncated": (b'{"a": "tex', "not JSON"),
    "not an object": (b'"text"', "a JSON str, not an object"),
    "array line": (b'[{"a": 1}]', "a JSON list, not an object"),
    "null": (b"null", "a JSON NoneType, not an object"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8: byte 0xff at byte 8"),
    "NUL byte": (b'{"a": "\x00"}', "holds a NUL byte"),
    "NUL escaped": (b'{"a": "\\u0000"}', "holds a NUL character"),
    "surrogate": (b'{"a": {"b": ["\\ud83d"]}}', "lone surrogate, U+D83D"),
    "surrogate key": (b'{"\\udc00": 1}', "lone surrogate, U+DC00"),
    "NaN": (b'{"a": NaN}', "holds nan, which is not a finite number"),
    "Infinity": (b'{"a": [-Infinity]}', "holds -inf"),
    "overflow": (b'{"a": 1e999}', "holds inf"),
    "nested": (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    "nested but whole": (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", "nested more than 100 levels"),
    "huge integer": (b'{"a": ' + b"9" * 5000 + b"}", "not usable"),
    "a name twice": (b'{"a": 1, "a": 2}', "'a' stands there twice"),
    "inner name twice": (b'{"a": [{"b": 1, "b": 1}]}', "'b' stands there twice"),
    "mark in the middle": (b'\xef\xbb\xbf{"a": 1}', "a byte order mark in the middle"),
    "two rows": (b'{"a": 1}{"a": 2}', "not JSON: Extra data at column 9"),
}


@pytest.mark.parametrize("kind", BROKEN_LINES)
def test_broken_line_is_named(tmp_path, kind):
    line, reason = BROKEN_LINES[kind]
    path = write(tmp_path / "a.jsonl", GOOD * 2 + line + b"\n" + GOOD)
    rows, problems = problems_of(path)
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:2", f"{path}:4"]
    assert len(problems) == 1 and problems[0].startswith(f"{path}:3: ") and reason in problems[0]


@pytest.mark.parametrize("kind", ["not an object", "NUL escaped", "surrogate", "NaN"])
def test_bad_array_element_is_named(tmp_path, kind):
    line, reason = BROKEN_LINES[kind]
    path = write(tmp_path / "a.json", b"[" + GOOD + b"," + line + b"," + GOOD + b"]")
    rows, problems = problems_of(path)
    assert [row.where for row in rows] == [f"{path}[1]", f"{path}[3]"]
    assert len(problems) == 1 and problems[0].startswith(f"{path}[2]: ") and reason in problems[0]


@pytest.mark.parametrize(
    "content, place, reason",
    [
        (b'[\n{"a": 1},\n{"a": "tex', ":3:7: ", "Unterminated string"),
        (b'[\n{"a": 1}', ":2:9: ", "where the text ends"),
        (b'[{"a": 1},]', ":1:11: ", "Expecting value"),
        (b'[{"a": 1}\n]\nx', ":1:10: ", "final ']'"),
        (b'[{"a": 1},\n{"a": "\xff"}]', ":2: ", "not UTF-8"),
        (b"[\n" + b"[" * 100_000, ":2:1: ", "nested too deeply"),
        (b"[]", ": ", "holds no rows"),
    ],
)
def test_broken_array_is_refused_by_line_and_column(tmp_path, content, place, reason):
    path = write(tmp_path / "a.json", content)
    message = refusal_of(path)
    assert message.startswith(path + place) and reason in message


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"1,2,3", "3 fields, but the header names 2"),
        (b"1", "1 fields, but the header names 2"),
        (b"\xff,2", "not UTF-8: byte 0xff"),
        (b"1\x00,2", "holds a NUL byte"),
        (b'"1"x,2', "not CSV"),
    ],
)
def test_bad_csv_row_is_named(tmp_path, line, reason):
    path = write(tmp_path / "a.csv", b"a,b\n1,2\n" + line + b"\n3,4\n")
    rows, problems = problems_of(path)
    assert [row.data for row in rows] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert len(problems) == 1 and problems[0].startswith(f"{path}:3: ") and reason in problems[0]


def test_open_quote_in_csv_is_named_by_the_line_it_opens_on(tmp_path):
    path = write(tmp_path / "a.csv", b'a,b\n1,2\n"3,4\n5,6\n')
    rows, problems = problems_of(path)
    assert len(rows) == 1 and len(problems) == 1
    assert problems[0].startswith(f"{path}:3: not CSV: unexpected end of data")


def test_files_refused_as_a_whole(tmp_path):
    for name in ("a.jsonl", "a.json", "a.csv"):
        path = write(tmp_path / name, b"")
        assert refusal_of(path) == f"{path}: the file is empty"
    path = write(tmp_path / "b.csv", b"a,a\n1,2\n")
    assert refusal_of(path).startswith(f"{path}:1: a column name")
    path = write(tmp_path / "b.parquet", b"PAR1 this is not parquet")
    assert refusal_of(path).startswith(f"{path}: Arrow")
    path = write(tmp_path / "b.txt", b"hello")
    assert ".jsonl" in refusal_of(path)
    path = write(tmp_path / "b.jsonl", GOOD)
    assert refusal_of(f"{path}:train").endswith("is a plain file and has no split train")


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "/gone/away", "gone.json:train"])
def test_missing_path_is_named_and_the_hub_not_asked(name, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path: pytest.fail("asked"))
    assert refusal_of(name).startswith(f"{name}: no such file or folder")
    assert "neither a file, nor a folder" in refusal_of("no such name")


def test_hub_name_goes_to_datasets_and_its_failure_names_it(monkeypatch):
    import datasets

    seen = []
    configs = ["default"]
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: [*configs])
    monkeypatch.setattr(datasets, "get_dataset_default_config_name", lambda path: None)
    splits = ["test", "train_x"]
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, config: splits)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *path, split: seen.append((*path, split)) or [{"a": 1}]
    )
    rows, _ = problems_of("owner/some-set", ("train", "train_x"))
    assert seen == [("owner/some-set", None, "train_x")]
    assert rows[0].where == "owner/some-set[train_x] row 1"
    assert problems_of("owner/some-set:test")[0][0].where == "owner/some-set[test] row 1"

    configs = ["easy", "hard"]
    assert problems_of("owner/some-set:hard:test")[0] and seen[-1][1:] == ("hard", "test")
    assert "the configurations easy, hard; name one of them as" in refusal_of("owner/some-set")

    def offline(path):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "get_dataset_config_names", offline)
    assert refusal_of("owner/some-set") == "owner/some-set: ConnectionError: no network"


def test_folders_splits_and_pins(tmp_path):
    from datasets import Dataset, DatasetDict

    train, test = Dataset.from_list([{"a": 1}, {"a": 2}]), Dataset.from_list([{"a": 3}])
    saved, parquet = str(tmp_path / "saved"), tmp_path / "parquet" / "data"
    DatasetDict({"train_x": train, "test_x": test}).save_to_disk(saved)
    parquet.mkdir(parents=True)
    train.to_parquet(str(parquet / "train_x-00000-of-00001.parquet"))
    test.to_parquet(str(parquet / "test_x-00000-of-00001.parquet"))
    for folder in (saved, str(parquet.parent)):
        rows, _ = problems_of(folder, ("train_sft", "train_x", "train"))
        assert [(r.data["a"], r.where) for r in rows] == [
            (1, f"{folder}[train_x] row 1"),
            (2, f"{folder}[train_x] row 2"),
        ]
        assert [r.data["a"] for r in problems_of(f"{folder}:test_x", ("train_x",))[0]] == [3]
        message = refusal_of(folder, ("train", "other"))
        assert message.startswith(f"{folder}: has the splits ")
        assert "train_x" in message and "test_x" in message and "not train or other" in message
        assert has_split(folder, ("test", "test_x")) and not has_split(folder, ("test",))
        assert not has_split(f"{folder}:test_x", ("test_x",))
        assert not has_split(f"{folder}:train_x", ("test_x",))
    rows, _ = problems_of(str(parquet / "train_x-00000-of-00001.parquet"))
    assert rows[1].where.endswith(".parquet row 2") and rows[1].data == {"a": 2}
    assert not has_split(str(parquet / "train_x-00000-of-00001.parquet"), ("train_x",))


def test_text_files_in_a_folder_keep_file_and_line(tmp_path):
    path = write(tmp_path / "set" / "train.jsonl", GOOD + b'{"a": \n' + GOOD)
    write(tmp_path / "set" / "test.jsonl", GOOD)
    rows, problems = problems_of(str(tmp_path / "set"))
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:3"]
    assert len(problems) == 1 and problems[0].startswith(f"{path}:2: not JSON")
    assert has_split(str(tmp_path / "set"), ("test",))


@pytest.mark.parametrize(
    "name, content, what",
    [
        ("a.jsonl", PACKED, "packed with gzip"),
        ("a.json", b"PK\x03\x04rest", "is packed; unpack it"),
        ("a.csv", b"PAR1rest", "is Parquet; name it .parquet"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "is UTF-16 or UTF-32"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.json", b"\n<!DOCTYPE html><html>", "is a web page"),
        ("a.jsonl.gz", GOOD, "cannot be unpacked"),
        ("a.jsonl.gz", PACKED[:-9], "cannot be unpacked"),
    ],
)
def test_a_file_that_is_something_else_is_told_so(tmp_path, name, content, what):
    path = write(tmp_path / name, content)
    message = refusal_of(path)
    assert message.startswith(f"{path}: ") and what in message


def test_a_packed_file_keeps_its_lines(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(GOOD + b"{\n" + GOOD))
    rows, problems = problems_of(path)
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:3"]
    assert problems[0].startswith(f"{path}:2: not JSON")


def test_a_pipe_or_a_link_to_itself_is_no_data(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "is no file that could be read" in refusal_of(str(tmp_path / "pipe.jsonl"))
    os.symlink("loop.jsonl", tmp_path / "loop.jsonl")
    assert "no such file" in refusal_of(str(tmp_path / "loop.jsonl"))


def test_a_parquet_row_that_python_cannot_hold_is_named(tmp_path):
    buffers = pyarrow.array([b"fine", b"\xff\xfe"], pyarrow.binary()).buffers()
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"a": text}), path)
    rows, problems = problems_of(path)
    assert [(row.data, row.where) for row in rows] == [({"a": "fine"}, f"{path} row 1")]
    assert len(problems) == 1 and problems[0].startswith(f"{path} row 2: UnicodeDecodeError")
    column = pyarrow.array(["x"])
    parquet.write_table(pyarrow.Table.from_arrays([column, column], names=["a", "a"]), path)
    assert refusal_of(path) == f"{path}: has the columns a twice"


@pytest.mark.parametrize("names", ["a.jsonl b.parquet", "train.jsonl more.csv", "train.csv x.json"])
def test_a_file_that_no_split_of_its_folder_takes_is_told(tmp_path, names):
    for name in names.split():
        if name.endswith(".parquet"):
            parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / name)
        else:
            write(tmp_path / name, b"a\n1\n" if name.endswith(".csv") else GOOD)
    assert "(1 in all) would be read into none of its splits" in refusal_of(str(tmp_path))


@pytest.mark.parametrize(
    "mark, content",
    [
        ("state.json", "{"),
        ("state.json", "{}"),
        ("dataset_dict.json", '{"splits": 3}'),
        ("dataset_dict.json", "[]"),
        ("dataset_dict.json", '{"splits": ["train"]}'),
    ],
)
def test_a_damaged_saved_data_set_is_named(tmp_path, mark, content):
    write(tmp_path / mark, content.encode())
    write(tmp_path / "dataset_info.json", b"{}")
    assert refusal_of(str(tmp_path)).startswith(f"{tmp_path}: ")


PIECES = st.sampled_from(
    [
        b'{"instruction": "a", "input": "", "output": "b"}',
        b'{"messages": [{"role": "user", "content": "a"}]}',
        b'{"instruction": "a", "output": null}',
        b"\n",
        b"\r",
        b"[",
        b"]",
        b",",
        b'"',
        b"{",
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"NaN",
        b"[" * 3000,
    ]
)
CONTENT = st.one_of(st.binary(max_size=60), st.lists(PIECES, max_size=8).map(b"".join))


@given(content=CONTENT, extension=st.sampled_from(["jsonl", "json", "csv"]))
@settings(
    max_examples=400,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_bytes_load_or_are_named(tmp_path, content, extension):
    path = write(tmp_path / f"any.{extension}", content)
    bad = BadRows()
    try:
        loaded = load_conversations([path], bad=bad)
    except DataError as error:
        # Only a file without a row has no line to be named by.
        wordless = {f"{path}: the file is empty", f"{path}: holds no rows"}
        wordless |= {f"{path}: {what}" for what in OTHER_THINGS.values()}
        assert all(p.startswith((f"{path}:", f"{path}[")) for p in error.problems)
        assert {p for p in error.problems if p.startswith(f"{path}: ")} <= wordless
        return
    assert all(problem.startswith((f"{path}:", f"{path}[")) for problem in bad.problems)
    if extension == "jsonl":
        body = content.removeprefix(b"\xef\xbb\xbf")
        assert len(loaded) + len(bad) == sum(bool(line.strip()) for line in body.split(b"\n"))
