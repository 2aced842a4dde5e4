"""Rows of large data sets: tokenised once, kept in a file, the same as those made in memory."""

import dataclasses
import datetime
import decimal
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import whole_files
from utils.data import cache, chat_template, comparisons, demonstrations, fitting, tables
from utils.data import prompts as prompt_data
from utils.data.demonstrations import DEMONSTRATIONS
from utils.data.fitting import Counts
from utils.data.loading import DataSettings
from utils.data.rows import BadRows, DataError
from utils.data.splits import train_and_held_out


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return chat_template.load_tokenizer(str(tiny / "base_model"))


@pytest.fixture
def large(monkeypatch):
    """Every file is large enough to be kept, in chunks of seven rows."""
    monkeypatch.setattr(cache, "SMALL", 0)
    monkeypatch.setattr(cache, "CHUNK", 7)


def write(path: Path, rows: list) -> str:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def some_rows(count: int = 40) -> list:
    rows: list = [
        {"instruction": f"Add {i} and {i}.", "output": "7 " * (1 + i % 9)} for i in range(count)
    ]
    rows[3]["output"] = "9 " * 200  # too long
    rows[11]["instruction"] = "x y " * 60  # its prompt is cut
    rows[13] = "{broken"
    rows[20]["output"] = ""
    rows[31]["output"] = "a<|im_end|>"  # the template refuses it
    return rows


def read(tokenizer, folder, name, role="train", max_bad_rows=1.0, **changes):
    """(view, bad rows) of demonstrations."""
    limits = dict(max_length=64, long_prompts="cut", long_answers="drop") | changes
    bad = BadRows(max_bad_rows)
    settings = DataSettings(str(folder), data_cache=str(folder))
    encode = demonstrations.Encode(tokenizer, **limits)
    return cache.load_view(DEMONSTRATIONS, [name], role, encode, settings, bad), bad


def facts(bad: BadRows) -> tuple:
    return bad.seen, sorted(bad.problems)


def files_of(folder: Path, ending: str = ".arrow") -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(ending))


def test_what_is_kept_is_what_a_list_of_rows_gives(tokenizer, tmp_path, large, monkeypatch):
    name = write(tmp_path / "rows.jsonl", some_rows())
    expected_bad = BadRows(1.0)
    listed = demonstrations.load_conversations([name], bad=expected_bad)
    encode = demonstrations.Encode(tokenizer, 64, "cut", "drop")
    examples, counts = tables.encode_all(listed, encode, expected_bad)
    assert counts == Counts(kept=36, cut_prompts=1, dropped=1) and len(expected_bad) == 3

    made, bad = read(tokenizer, tmp_path / "cache", name)
    again, bad_again = read(tokenizer, tmp_path / "cache", name)
    monkeypatch.setattr(cache, "SMALL", 2**30)
    in_memory, bad_in_memory = read(tokenizer, tmp_path / "cache", name)
    assert len(files_of(tmp_path / "cache")) == 1
    for view, told in ((made, bad), (again, bad_again), (in_memory, bad_in_memory)):
        assert [view.item(i) for i in range(len(view))] == listed
        assert list(view.usable()) == examples and view.counts() == counts
        assert facts(told) == facts(expected_bad)
    prints = {view.usable().fingerprint() for view in (made, again, in_memory)}
    assert len(prints) == 1 and prints.pop().startswith("36 rows (")


@pytest.mark.parametrize("small", [0, 2**30], ids=["kept", "in memory"])
def test_bad_rows_beside_an_error_of_the_whole_are_named_too(
    tokenizer, tmp_path, monkeypatch, small
):
    monkeypatch.setattr(cache, "SMALL", small)
    path = tmp_path / "rows.jsonl"
    path.write_text('{broken\n{"foo": 1}\n')
    with pytest.raises(DataError, match="fit no schema known here") as caught:
        read(tokenizer, tmp_path / "cache", str(path), max_bad_rows=0.0)
    assert "rows.jsonl:1: not JSON" in str(caught.value)


def test_what_is_to_be_told_of_rows_is_told_at_each_start(tokenizer, tmp_path, large, capsys):
    rows = [{"prompt": f"q{i}", "completion": "a", "label": i % 3 > 0} for i in range(30)]
    name = write(tmp_path / "kto.jsonl", rows)
    for _ in range(2):
        view, _ = read(tokenizer, tmp_path / "cache", name)
        told = capsys.readouterr().out
        assert len(view) == 20 and told.count("10 row(s) have label false") == 1


def test_a_second_start_makes_nothing(tokenizer, tmp_path, large, monkeypatch):
    name = write(tmp_path / "rows.jsonl", some_rows())
    first, _ = read(tokenizer, tmp_path, name)
    first.places("hold_out 1")
    monkeypatch.setattr(cache, "_write", lambda *_: pytest.fail("tokenised again"))
    monkeypatch.setattr(cache, "_places", lambda *_: pytest.fail("hashed again"))
    second, _ = read(tokenizer, tmp_path, name)
    assert (second.places("hold_out 1") == first.places("hold_out 1")).all()


def test_tokenising_draws_no_random_number_of_the_run(tokenizer, tmp_path, large):
    before = torch.get_rng_state()
    read(tokenizer, tmp_path, write(tmp_path / "rows.jsonl", some_rows()))
    assert torch.equal(torch.get_rng_state(), before)


def test_other_content_settings_or_tokenizer_are_another_file(
    tokenizer, tmp_path, large, tiny, monkeypatch
):
    name = write(tmp_path / "rows.jsonl", some_rows())
    folder = tmp_path / "cache"
    first, _ = read(tokenizer, folder, name)
    read(tokenizer, folder, name, max_length=32)
    read(tokenizer, folder, name, long_answers="cut")
    other = chat_template.load_tokenizer(str(tiny / "base_model"))
    other.chat_template = other.chat_template.replace("assistant\n", "assistant: \n")
    read(other, folder, name)
    assert len(files_of(folder)) == 4

    def rendered_today(messages, **settings):  # nothing that is saved tells of it
        return "today" + type(other).apply_chat_template(dated, messages, **settings)

    dated = chat_template.load_tokenizer(str(tiny / "base_model"))
    monkeypatch.setattr(dated, "apply_chat_template", rendered_today)
    read(dated, folder, name)
    assert len(files_of(folder)) == 5
    before = os.stat(name)
    write(Path(name), [{"instruction": "Add 8 and 8.", "output": "7 "}, *some_rows()[1:]])
    os.utime(name, ns=(before.st_atime_ns, before.st_mtime_ns))  # same length, same time
    assert os.stat(name).st_size == before.st_size
    changed, _ = read(tokenizer, folder, name)
    assert len(files_of(folder)) == 6 and changed.fingerprint() != first.fingerprint()
    same = chat_template.load_tokenizer(str(tiny / "base_model"))
    read(same, folder, name)
    assert len(files_of(folder)) == 6


def test_comparisons_and_prompts_come_back_as_they_were(tokenizer, tmp_path, large):
    ranked = [
        {"prompt": f"q{i}", "responses": ["a", "b " * i + "c", "d"], "scores": [1, i, 1]}
        for i in range(20)
    ]
    settings = DataSettings("", data_cache=str(tmp_path / "cache"))
    name = write(tmp_path / "ranked.jsonl", ranked)
    encode = comparisons.Encode(tokenizer, 24, "cut")
    view = cache.load_view(comparisons.COMPARISONS, [name], "train", encode, settings, BadRows())
    listed = comparisons.load_comparisons([name], bad=BadRows())
    expected, counts = tables.encode_all(listed, encode, BadRows())
    assert list(view) == expected and view.counts() == counts and counts.cut_answers
    assert list(view.having("labels", lambda v: len(set(v)) > 1)) == [expected[0], *expected[2:]]

    import pyarrow as pa
    from pyarrow import parquet

    when, price = datetime.datetime(2026, 1, 2, 3, 4, 5), decimal.Decimal("1.50")
    odd = [{"prompt": f"Add {i}.", "when": when, "price": price, "n": i} for i in range(20)]
    parquet.write_table(pa.Table.from_pylist(odd), tmp_path / "odd.parquet")
    encode = prompt_data.Encode(tokenizer, 16, "cut")
    names = [str(tmp_path / "odd.parquet")]
    view = cache.load_view(prompt_data.PROMPTS, names, "train", encode, settings, BadRows())
    assert [prompt.row for prompt in view] == odd
    assert view[3].ids == fitting.encode_prompt(tokenizer, view[3].messages, 16, "cut")[0]


def test_a_folder_with_splits_is_kept_split_by_split(tokenizer, tmp_path, large):
    from datasets import Dataset, DatasetDict

    def rows(text, count):
        return Dataset.from_list([{"prompt": f"{text} {n}", "response": "x"} for n in range(count)])

    name = str(tmp_path / "set")
    DatasetDict(train=rows("a", 30), test=rows("b", 10)).save_to_disk(name)
    for role, count in (("train", 30), ("eval", 10)):
        view, _ = read(tokenizer, tmp_path / "cache", name, role)
        listed = demonstrations.load_conversations([name], split_role=role, bad=BadRows())
        assert [view.item(i) for i in range(len(view))] == listed and len(listed) == count
    assert len(files_of(tmp_path / "cache")) == 2


def test_who_reads_the_prompts_is_part_of_the_name(tokenizer, tmp_path, large, tiny):
    """Reward models whose templates refuse a prompt leave it out, from a kept file as well."""
    from utils.models.scorer import Reader

    config = DataSettings("", data_cache=str(tmp_path / "cache"))
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    name = write(tmp_path / "a.jsonl", [{"prompt": "q"}, {"prompt": turns}] * 5)
    refusing = chat_template.load_tokenizer(str(tiny / "base_model"))
    refusing.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + refusing.chat_template
    )
    for readers, count in (((), 10), ((Reader(refusing, 99, "stop"),), 5)) * 2:
        encode = prompt_data.Encode(tokenizer, 16, "cut", readers)
        bad = BadRows(1.0)
        view = cache.load_view(prompt_data.PROMPTS, [name], "train", encode, config, bad)
        assert len(view.usable()) == count and len(bad) == 10 - count
    assert len(files_of(tmp_path / "cache")) == 2


def test_rows_are_chosen_as_in_memory(tokenizer, tmp_path, large, monkeypatch):
    """Held-out rows, shares and weights: the same rows in the same order from kept files."""
    names = [write(tmp_path / f"{n}.jsonl", some_rows(60 + n)) for n in range(2)]
    settings = DataSettings(
        str(tmp_path),
        data_cache=str(tmp_path),
        data_weights=[2.5, 0.5],
        data_split="2,1,1",
        eval_fraction=0.2,
        max_eval_rows=9,
    )
    encode = demonstrations.Encode(tokenizer, 64, "cut", "drop")
    kept, in_memory = [], []
    for views, small in ((kept, 0), (in_memory, 2**30)):
        monkeypatch.setattr(cache, "SMALL", small)
        views += train_and_held_out(DEMONSTRATIONS, names, encode, settings, 1, BadRows(1.0))
    for one, other in zip(kept, in_memory, strict=True):
        wheres = [[view.item(i).where for i in range(len(view))] for view in (one, other)]
        assert wheres[0] == wheres[1] and one.fingerprint() == other.fingerprint()
    assert len(kept[1]) == 9 and len(kept[0]) > 60


def test_a_full_disk_leaves_nothing_and_names_the_flag(tokenizer, tmp_path, large, monkeypatch):
    name = write(tmp_path / "rows.jsonl", some_rows())
    folder = tmp_path / "cache"

    class Full:
        def __init__(self, file):
            self.file, self.room = file, 4000

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    real = cache.once
    monkeypatch.setattr(cache, "once", lambda path, make: real(path, lambda f: make(Full(f))))
    with pytest.raises(whole_files.CannotWrite, match="No space left.*--data_cache"):
        read(tokenizer, folder, name)
    assert files_of(folder, "") == files_of(folder, ".lock")
    monkeypatch.undo()
    cache.SMALL, kept = 0, cache.SMALL
    try:
        assert len(read(tokenizer, folder, name)[0]) == 38
    finally:
        cache.SMALL = kept


def test_a_damaged_file_is_named(tokenizer, tmp_path, large):
    name = write(tmp_path / "rows.jsonl", some_rows())
    read(tokenizer, tmp_path / "cache", name)
    (kept,) = files_of(tmp_path / "cache")
    path = tmp_path / "cache" / kept
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"{kept}: damaged .*; delete it"):
        read(tokenizer, tmp_path / "cache", name)


def test_two_runs_make_it_once_and_a_killed_one_leaves_no_half(
    tokenizer, tmp_path, large, monkeypatch
):
    """The first is killed while it writes: its workers end with it, so the lock is free, and its
    unfinished file goes. Of two that start then one makes the rows, and both read the same."""
    name, folder = write(tmp_path / "rows.jsonl", some_rows(600)), tmp_path / "cache"
    fork, plain = multiprocessing.get_context("fork"), chat_template.encode_conversation
    told, write_rows = fork.SimpleQueue(), cache._write

    def slowly(*given):
        time.sleep(0.02)
        return plain(*given)

    def counted(*given):
        told.put("made")
        return write_rows(*given)

    def run():
        view, bad = read(tokenizer, folder, name)
        told.put((view.fingerprint(), len(bad)))

    monkeypatch.setattr(chat_template, "encode_conversation", slowly)
    killed = fork.Process(target=run)
    killed.start()
    limit = time.monotonic() + 60
    while not folder.exists() or not files_of(folder, ".writing"):
        assert time.monotonic() < limit and killed.is_alive()
        time.sleep(0.01)
    time.sleep(0.2)  # its workers are at it
    killed.kill()
    killed.join()
    assert not files_of(folder) and files_of(folder, ".writing")

    monkeypatch.setattr(chat_template, "encode_conversation", plain)
    monkeypatch.setattr(cache, "_write", counted)
    both = [fork.Process(target=run) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
    codes = [process.exitcode for process in both]
    for process in both:
        process.kill()  # one that waits for a lock for ever would outlive the test
    assert codes == [0, 0]
    seen = [told.get() for _ in range(3)]
    assert seen.count("made") == 1
    results = {each for each in seen if each != "made"}
    assert len(results) == 1 and results.pop()[1] == 3
    assert len(files_of(folder)) == 1 and not files_of(folder, ".writing")


def test_a_worker_that_is_killed_ends_the_run_with_its_cause(tokenizer, tmp_path, large):
    name = write(tmp_path / "rows.jsonl", some_rows())
    me = os.getpid()

    @dataclasses.dataclass
    class Killed:
        me: int

        def __call__(self, item):
            if os.getpid() != self.me:
                os.kill(os.getpid(), signal.SIGKILL)
            return None, Counts()

    settings = DataSettings("", data_cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="was killed, for want of memory"):
        cache.load_view(DEMONSTRATIONS, [name], "train", Killed(me), settings, BadRows(1.0))
    assert not files_of(tmp_path / "cache")


def test_where_the_usual_folder_cannot_be_written_the_output_folder_takes_it(
    tmp_path, monkeypatch, capsys
):
    from huggingface_hub import constants

    config = DataSettings(str(tmp_path / "run"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    assert cache.folder_for(config) == tmp_path / "home" / "rlhf_rows"
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    assert cache.folder_for(config) == tmp_path / "run" / "data_cache"
    assert "is no folder (--data_cache)" in capsys.readouterr().out


def mapped_kb(folder: Path) -> int:
    """How much of the files below `folder` is this process's resident memory, in KB."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    ours = [n for n, line in enumerate(lines) if str(folder) in line]
    sizes = [next(line for line in lines[n:] if line.startswith("Rss:")) for n in ours]
    return sum(int(size.split()[1]) for size in sizes)


def test_what_was_read_of_a_mapped_file_is_let_go(tokenizer, tmp_path, large, monkeypatch):
    name = write(tmp_path / "rows.jsonl", some_rows())
    view = read(tokenizer, tmp_path / "cache", name)[0].usable()
    monkeypatch.setattr(tables, "FORGET_EVERY", 10)
    rows = [view[i] for i in range(9)]
    assert mapped_kb(tmp_path / "cache") > 0
    rows.append(view[9])
    assert mapped_kb(tmp_path / "cache") == 0
    monkeypatch.setattr(cache, "SMALL", 2**30)
    in_memory = read(tokenizer, tmp_path / "cache", name)[0].usable()
    rows += [view[i] for i in range(10, len(view))]
    assert rows == list(in_memory)


def test_numbers_of_rows_are_arrays(tokenizer, tmp_path, large):
    name = write(tmp_path / "rows.jsonl", some_rows())
    view, _ = read(tokenizer, tmp_path, name)
    doubled = view + view.take([5, 0])
    assert isinstance(doubled.chosen, np.ndarray) and len(doubled) == len(view) + 2
    assert doubled[len(view)] == view[5] and doubled[-1] == view[0]
    assert doubled[1:3] == [view[1], view[2]]
