"""Data files of any shape: what was written is what is loaded, and what cannot be is named.

A few hundred files in the default suite; `-m slow` tries more than ten thousand and prints how
many. Expectations are made with the rows, not read from the loaders.
"""

import gzip
import io
import json
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tests.helpers.fuzzing import NO_PROCESS
from tests.helpers.row_strategies import (
    CSV_KINDS,
    NEEDED,
    TEXT,
    csv_line,
    row_files,
    sound_rows,
    turns,
)
from utils.data.comparisons import load_comparisons
from utils.data.demonstrations import SPLITS as SFT_SPLITS
from utils.data.demonstrations import load_conversations
from utils.data.rows import BadRows, DataError
from utils.data.sources import has_split

FEW, MANY = settings(NO_PROCESS, max_examples=150), settings(NO_PROCESS, max_examples=8000)
TRIED = Counter()


def load(kind, path, bad, schema="auto"):
    """What the schema's own loader makes of the file: (what, where) of each row."""
    if kind in ("preference", "kwise"):
        found = load_comparisons([path], schema=schema, bad=bad)
        return [((c.prompt, c.responses, c.scores), c.where) for c in found]
    found = load_conversations([path], schema=schema, bad=bad)
    return [(c.messages, c.where) for c in found]


def assert_loaded_or_named(folder, case) -> None:
    """Every sound row is loaded as it was made, in order; every spoiled one is named, alone."""
    kind, ending, content, sound, spoiled = case
    TRIED["files with spoiled rows" if spoiled else "sound files"] += 1
    TRIED["spoiled rows"] += len(spoiled)
    path = str(folder / f"rows{ending}")
    with open(path, "wb") as file:
        file.write(gzip.compress(content) if ending.endswith(".gz") else content)
    bad = BadRows()
    assert load(kind, path, bad) == [(what, path + where) for what, where in sound], content
    named = [problem.removeprefix(path).partition(": ") for problem in bad.problems]
    # Rows that are no rows are told before those that are but cannot be converted.
    assert sorted(where for where, _, _ in named) == sorted(spoiled), (content, bad.problems)
    assert all(len(reason) > 5 for _, _, reason in named)


@given(case=row_files())
@FEW
def test_sound_rows_are_loaded_and_spoiled_ones_named(tmp_path, case):
    assert_loaded_or_named(tmp_path, case)


# Damage to the bytes of a whole file: nobody can say beforehand which rows it hits.


@st.composite
def damaged_files(draw):
    """(kind, ending, bytes of a file of sound rows with a few accidents)."""
    kind = draw(st.sampled_from(list(NEEDED)))
    ending = draw(st.sampled_from([".jsonl", ".json", ".csv"]))
    kind = draw(st.sampled_from(CSV_KINDS)) if ending == ".csv" else kind
    rows = [draw(sound_rows(kind))[0] for _ in range(draw(st.integers(1, 3)))]
    if ending == ".csv":
        content = csv_line(rows[0]) + b"".join(csv_line(row.values()) for row in rows)
    else:
        lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in rows]
        content = (
            "[" + ",\n".join(lines) + "]" if ending == ".json" else "\n".join(lines)
        ).encode()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 8))
        new = draw(
            st.binary(max_size=3)
            | st.sampled_from([b"\n", b'"', b"\0", b"}", b"{", b",", b"\\", b"]", b"\xef\xbb\xbf"])
        )
        content = content[:at] + new + content[at + length * draw(st.booleans()) :]
        if draw(st.integers(0, 5)) == 0:
            content = content[:at]
    return kind, ending, content


def read_line(kind, line: bytes):
    """What a damaged line still says, read without the loaders; None where it says nothing."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and NEEDED[kind][0] in row else None


def strings_of(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings_of(inner)


def assert_named_or_true(folder, case) -> None:
    kind, ending, content = case
    TRIED["damaged files"] += 1
    path = folder / f"damaged{ending}"
    path.write_bytes(content)
    bad = BadRows()
    try:
        found = load(kind, str(path), bad, schema=kind)
    except DataError as error:
        assert all(problem.startswith(str(path)) for problem in error.problems), error
        return
    places = [problem.split(": ")[0] for problem in bad.problems]
    assert all(place.startswith((f"{path}:", f"{path}[")) for place in places), bad.problems
    if ending != ".jsonl":
        return
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    there = {f"{path}:{n}" for n, line in enumerate(lines, 1) if line.strip()}
    loaded = dict((where, what) for what, where in found)
    assert len(loaded) == len(found) and loaded.keys() | set(places) == there
    assert not loaded.keys() & set(places)
    for where, what in loaded.items():
        row = read_line(kind, lines[int(where.rsplit(":", 1)[1]) - 1])
        assert row is not None
        texts = what if kind not in ("preference", "kwise") else what[0]
        said = set(strings_of(row))
        said |= {f"{one}\n\n{other}" for one in said for other in said}  # Alpaca's input
        assert all(turn["content"] in said for turn in texts)


@given(case=damaged_files())
@FEW
def test_a_damaged_file_is_named_or_loads_what_it_says(tmp_path, case):
    assert_named_or_true(tmp_path, case)


# Parquet, and folders.


@st.composite
def damaged_parquet(draw):
    """Bytes of a Parquet file of conversations, a few of them changed or gone."""
    rows = [
        {"messages": turns(draw(st.tuples(TEXT, TEXT)))} for _ in range(draw(st.integers(1, 3)))
    ]
    buffer = io.BytesIO()
    packing = draw(st.sampled_from(["snappy", "none", "zstd"]))
    checksums = draw(st.booleans())
    parquet.write_table(
        pyarrow.Table.from_pylist(rows), buffer, compression=packing, write_page_checksum=checksums
    )
    content = buffer.getvalue()
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(content)))
        gone = draw(st.sampled_from([0, 1, 1, 5, 10_000]))
        content = content[:at] + draw(st.binary(max_size=2)) + content[at + gone :]
    return rows, content


def assert_parquet_is_named(folder, case) -> None:
    TRIED["damaged Parquet files"] += 1
    rows, content = case
    path = folder / "damaged.parquet"
    path.write_bytes(content)
    bad = BadRows()
    try:
        found = load("messages", str(path), bad)
    except DataError as error:
        assert all(problem.startswith(str(path)) for problem in error.problems), error
        return
    assert len(found) + len(bad) == len(rows)
    assert all(problem.startswith(f"{path} row ") for problem in bad.problems)


@given(case=damaged_parquet())
@FEW
def test_a_damaged_parquet_file_is_named(tmp_path, case):
    assert_parquet_is_named(tmp_path, case)


NAMES = "train.jsonl test.csv more.jsonl a/b.json x.parquet notes.txt README.md .hidden.jsonl "
NAMES += "empty.jsonl d.json/in.jsonl train-2.jsonl.gz broken.jsonl config.json"


def assert_no_file_of_a_folder_is_dropped(folder, names) -> None:
    """A folder is refused by its name or a file's, or every row of every data file is read."""
    TRIED["folders"] += 1
    written = set()
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"prompt": f"q{number}", "completion": f"a{number}"}
        if name.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        else:
            line = json.dumps(row).encode() + b"\n"
            line = csv_line(row) + csv_line(row.values()) if name.endswith(".csv") else line
            line = {"empty.jsonl": b"", "broken.jsonl": b"{"}.get(name, line)
            path.write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
        if name not in ("notes.txt", "README.md", ".hidden.jsonl", "config.json"):
            written.add(f"q{number}")
    bad, found = BadRows(), []
    try:
        found += load_conversations([str(folder)], bad=bad)
        if has_split(str(folder), SFT_SPLITS["eval"]):
            found += load_conversations([str(folder)], split_role="eval", bad=bad)
    except DataError as error:
        assert all(problem.startswith(str(folder)) for problem in error.problems), error
        return
    read = {c.messages[0]["content"] for c in found}
    broken = {f"q{n}" for n, name in enumerate(names) if name in ("empty.jsonl", "broken.jsonl")}
    assert written - broken <= read and bool(broken) <= bool(len(bad))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def assert_folders_are_read_or_named(root, names):
    with tempfile.TemporaryDirectory(dir=root) as folder:
        assert_no_file_of_a_folder_is_dropped(Path(folder), names)


FOLDERS = st.lists(st.sampled_from(NAMES.split()), min_size=1, max_size=4, unique=True)


@given(names=FOLDERS)
@settings(FEW, max_examples=30)
def test_no_file_of_a_folder_is_dropped(tmp_path, own_cache, names):
    assert_folders_are_read_or_named(tmp_path, names)


@pytest.mark.slow
def test_ten_thousand_files(tmp_path, own_cache, capsys):
    @given(case=row_files())
    @MANY
    def spoiled(case):
        assert_loaded_or_named(tmp_path, case)

    @given(case=damaged_files())
    @MANY
    def damaged(case):
        assert_named_or_true(tmp_path, case)

    spoiled()
    damaged()
    settings(MANY, max_examples=1500)(
        given(case=damaged_parquet())(lambda case: assert_parquet_is_named(tmp_path, case))
    )()
    settings(MANY, max_examples=300)(
        given(names=FOLDERS)(lambda names: assert_folders_are_read_or_named(tmp_path, names))
    )()
    with capsys.disabled():
        print(f"\ngenerated: {dict(TRIED)}")
    assert TRIED["files with spoiled rows"] + TRIED["damaged files"] >= 10_000
