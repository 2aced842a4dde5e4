"""A data file is a stream of rows: what is in memory does not grow with it."""

import gzip
import json
import tracemalloc

import pytest

from utils.data.demonstrations import load_conversations
from utils.data.rows import BadRows
from utils.data.sources import files_behind, stream_rows

ROWS = 4000


def write(path):
    """A file of ROWS rows, each of about a thousand letters."""
    rows = [{"n": str(i), "text": f"{i} " + "word " * 200} for i in range(ROWS)]
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=500)
    elif path.suffix == ".csv":
        path.write_text("n,text\n" + "".join(f"{r['n']},{r['text']}\n" for r in rows))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        packed = path.suffix == ".gz"
        path.write_bytes(gzip.compress(text.encode(), 1) if packed else text.encode())
    return str(path), rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet"])
def test_memory_does_not_grow_with_a_file(tmp_path, name):
    path, rows = write(tmp_path / name)
    list(stream_rows(path, (), BadRows()))  # imports
    tracemalloc.start()
    try:
        for number, row in enumerate(stream_rows(path, (), BadRows())):
            assert row.data == rows[number]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert number == ROWS - 1
    # The text alone has 4 MB. Parquet is read a thousand rows at a time.
    assert peak < (3e6 if name.endswith("parquet") else 3e5)


def test_what_is_wrong_late_in_a_file_is_told_when_it_is_reached(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' * 3 + "{broken\n" + '{"a": 2}\n')
    bad = BadRows(1.0)
    rows = stream_rows(str(path), (), bad)
    assert [next(rows).where for _ in range(3)] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert (len(bad), bad.seen) == (0, 3)
    bad.add("there", "found bad by who takes the rows")
    assert next(rows).where == f"{path}:5" and next(rows, None) is None
    assert bad.seen == 5, "its rows, however many others are found bad"
    assert bad.problems[1].startswith(f"{path}:4: not JSON")


def test_a_packed_file_that_breaks_off_is_refused_after_its_rows(tmp_path):
    from utils.data.rows import DataError

    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 50_000)[:-20])
    rows = stream_rows(str(path), (), BadRows())
    assert next(rows).data == {"a": 1}
    with pytest.raises(DataError, match="cannot be unpacked"):
        list(rows)


def test_the_schema_is_that_of_the_first_row_that_fits_one(tmp_path):
    path = tmp_path / "a.jsonl"
    fits = {"instruction": "q", "output": "a"}
    rows = [{"id": 1}, fits, {"prompt": "q", "response": "a"}, fits]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = BadRows(1.0)
    assert [c.where for c in load_conversations([str(path)], bad=bad)] == [f"{path}:2", f"{path}:4"]
    assert [problem.split(":")[1] for problem in bad.problems] == ["1", "3"]


def test_files_behind_a_name(tmp_path):
    from datasets import Dataset, DatasetDict

    path, _ = write(tmp_path / "a.jsonl")
    assert files_behind(path, ("train",)) == [path]
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text('{"a": 1}\n')
    assert files_behind(str(folder), ("train",)) == [str(folder / "train.jsonl")]
    saved = str(tmp_path / "saved")
    DatasetDict(
        train=Dataset.from_list([{"a": 1}]), test=Dataset.from_list([{"a": 2}])
    ).save_to_disk(saved)
    (file,) = files_behind(saved, ("train",))
    assert file.startswith(f"{saved}/train/") and file.endswith(".arrow")
    assert [row.data for row in stream_rows(f"{saved}:test", (), BadRows())] == [{"a": 2}]
