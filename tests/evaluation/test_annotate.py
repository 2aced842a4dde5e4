"""What people say of answers is kept through a kill and read by step 2."""

import errno
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from evaluation import annotate, estimates
from evaluation.annotate import Annotations, Judgement
from tests.helpers import run_folders
from tests.helpers.evaluated_models import problems_of
from utils import whole_files
from utils.data import comparisons
from utils.data.rows import BadRows, DataError
from utils.errors import UserError

HOSTILE = run_folders.HOSTILE.replace("\x00", "")  # which no row of data may hold


def write_answers(path, prompts: int):
    """What collect.py --labeller none writes; one answer is hostile."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {n} and {n}?"}],
            "responses": [f"{2 * n}", f"It is {n}.", HOSTILE, "no"],
            "finished": [True, True, False, True],
            "provenance": {"policy": "a secret"},
        }
        for n in range(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def kept(tmp_path):
    rows = annotate.load(str(write_answers(tmp_path / "to_rank.jsonl", 4)))
    return Annotations(rows, tmp_path / "rankings.jsonl", fingerprint="one")


def read_by_step_2(file) -> list:
    bad = BadRows()
    read = comparisons.load_comparisons([str(file)], bad=bad)
    assert len(bad) == 0
    return read


def again(kept, **changed) -> Annotations:
    given = {"rows": kept.rows, "file": kept.file, "seed": kept.seed, "fingerprint": "one"}
    return Annotations(**given | changed)


def ranked(kept, person, row, *ranks, ratings=(0, 0, 0, 0)):
    for column, values in (("ranks", ranks), ("ratings", ratings)):
        for answer, value in enumerate(values):
            if value:
                kept.click(person, row, column, answer, value)


def test_step_2_reads_the_rankings_with_ties(kept):
    ranked(kept, "ana", 1, 2, 1, 1, 3, ratings=(7, 0, 0, 1))
    ranked(kept, "ana", 0, 1, 2, 0, 0)  # not all of them yet
    ranked(kept, "王", 1, 1, 2, 3, 4)
    read = read_by_step_2(kept.file)
    assert [c.scores for c in read] == [(-2.0, -1.0, -1.0, -3.0), (-1.0, -2.0, -3.0, -4.0)]
    assert read[0].responses == tuple(kept.rows[1]["responses"])
    assert read[0].finished == (True, True, False, True)
    lines = [json.loads(line) for line in kept.file.read_text().splitlines()]
    assert [line["annotator"] for line in lines] == ["ana", "王"]
    assert lines[0]["ratings"] == [7, 0, 0, 1] and "ratings" not in lines[1]


def test_scores_of_another_labeller_do_not_outweigh_people(kept):
    kept.rows[0]["scores"] = [9.0, 8.0, 7.0, 6.0]
    ranked(kept, "ana", 0, 4, 3, 2, 1)
    assert read_by_step_2(kept.file)[0].scores == (-4.0, -3.0, -2.0, -1.0)


def test_everything_is_there_after_a_kill(kept):
    ranked(kept, "ana", 0, 1, 2, 3, 4)
    ranked(kept, "ana", 1, 0, 2, 0, 0)
    kept.skip("ben", 2)
    with open(kept.clicks, "a") as file:
        file.write('{"person": "ana", "row": 3, "ra')  # killed while it wrote
    reopened = again(kept)
    assert reopened.judged == kept.judged
    ranked(reopened, "ana", 3, 1, 1, 1, 2)
    assert again(kept).judged == reopened.judged
    assert len(kept.file.read_text().splitlines()) == 2


def test_a_kill_between_a_click_and_the_rankings(kept, monkeypatch):
    ranked(kept, "ana", 0, 1, 2, 3, 4)
    monkeypatch.setattr(kept, "write", lambda: None)
    kept.skip("ana", 0)
    ranked(kept, "ana", 1, 1, 2, 3, 4)
    with open(kept.clicks, "ab") as file:
        file.write('{"person": "王'.encode()[:-1])  # killed within a character
    again(kept)
    assert [c.scores for c in read_by_step_2(kept.file)] == [(-1.0, -2.0, -3.0, -4.0)]
    assert json.loads(kept.file.read_text())["prompt"] == kept.rows[1]["prompt"]


def test_a_file_of_another_program_is_not_replaced(kept, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("mine\n")
    with pytest.raises(UserError, match="would replace it: give another --output_file"):
        again(kept, file=other)
    assert other.read_text() == "mine\n" and not (tmp_path / "other.clicks.jsonl").exists()


def test_what_is_not_saved_does_not_count(kept, monkeypatch):
    for answer in range(4):
        with pytest.raises(UnicodeEncodeError):
            kept.click("\ud800", 0, "ranks", answer, 1)
    ranked(kept, "ana", 0, 1, 2, 3, 4)
    assert len(kept.file.read_text().splitlines()) == 1, "no name keeps others from being saved"

    def full(file, text):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(whole_files, "append", full)
    with pytest.raises(whole_files.CannotWrite, match=r"clicks.jsonl: .*\(--output_file\)"):
        kept.click("ana", 0, "ranks", 0, 4)
    assert kept.of("ana", 0).ranks == [1, 2, 3, 4]


def test_one_counts_while_others_click(kept, monkeypatch):
    """A dict that changes while it is read is an error of Python's."""
    monkeypatch.setattr(whole_files, "append_lines", lambda *given: None)
    monkeypatch.setattr(whole_files, "sync", lambda path: None)
    kept.judged |= {(f"p{n}", 0): Judgement([0] * 4, [0] * 4) for n in range(500)}
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            clicks = [pool.submit(kept.skip, f"q{n}", 0) for n in range(500)]
            while not all(click.done() for click in clicks):
                assert kept.done("ana") == 0
        assert all(click.exception() is None for click in clicks)
    finally:
        sys.setswitchinterval(before)


def test_clicks_at_the_same_time_are_all_kept(kept, monkeypatch):
    monkeypatch.setattr(whole_files, "sync", lambda path: time.sleep(0.05))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda answer: kept.click("ana", 0, "ranks", answer, answer + 1), range(4)))
    assert kept.of("ana", 0).ranks == again(kept).of("ana", 0).ranks == [1, 2, 3, 4]


def test_a_rank_taken_back_takes_the_ranking_back(kept):
    ranked(kept, "ana", 0, 1, 2, 3, 4)
    assert len(kept.file.read_text().splitlines()) == 1
    kept.skip("ana", 0)
    assert kept.file.read_text() == "" and kept.done("ana") == 0
    kept.click("ana", 0, "ranks", 0, 4)
    assert json.loads(kept.file.read_text())["ranks"] == [4, 2, 3, 4]


def test_clicks_of_other_answers_or_orders_are_refused(kept):
    ranked(kept, "ana", 0, 1, 2, 3, 4)
    for other in ({"fingerprint": "two"}, {"seed": 7}):
        with pytest.raises(UserError, match="is of other answers, or another --seed"):
            again(kept, **other)
    assert again(kept).done("ana") == 1


def test_orders_are_blind_and_stay_as_they_are(kept):
    orders = {(p, r): kept.order(p, r) for p in ("ana", "ben") for r in range(4)}
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders.values())
    assert len(set(map(tuple, orders.values()))) > 3
    assert orders == {(p, r): again(kept).order(p, r) for p, r in orders}
    places = [Annotations.order(kept, f"p{n}", 0).index(0) for n in range(400)]
    assert all(70 <= places.count(k) <= 130 for k in range(4)), "each place as likely"


def test_the_next_prompt_is_one_that_is_not_done(kept):
    assert kept.next_row("ana") == 0
    ranked(kept, "ana", 0, 1, 2, 3, 4)
    kept.skip("ana", 1)
    assert kept.next_row("ana") == 2 and kept.next_row("ben") == 0
    ranked(kept, "ana", 2, 0, 1, 0, 0)
    assert kept.next_row("ana", 2) == 3 and kept.next_row("ana", 3) == 2
    for row in (2, 3):
        ranked(kept, "ana", row, 1, 2, 3, 4)
    assert kept.next_row("ana", 3) == 3


def test_agreement_is_of_prompts_that_several_have_ranked(kept):
    assert np.isnan(kept.agreement()[0])
    ranked(kept, "ana", 0, 1, 2, 3, 4)
    ranked(kept, "ana", 1, 4, 3, 2, 1)
    assert kept.agreement()[1] == 0
    ranked(kept, "ben", 0, 1, 1, 3, 3)
    ranked(kept, "cyd", 1, 4, 3, 2, 1)
    ranked(kept, "ben", 1, 1, 0, 0, 0)  # not all of them
    none = [np.nan] * 4
    said = [[1, 2, 3, 4, 4, 3, 2, 1], [1.5, 1.5, 3.5, 3.5, *none], [*none, 4, 3, 2, 1]]
    assert kept.agreement() == (estimates.krippendorff_alpha(np.array(said)), 2)
    ranked(kept, "ben", 0, 1, 2, 3, 4)
    assert kept.agreement() == (1.0, 2)


def test_places_of_ranks_with_ties():
    assert annotate.places([1, 1, 5]) == annotate.places([1, 1, 2]) == [1.5, 1.5, 3.0]
    assert annotate.places([3, 1, 2]) == [3.0, 1.0, 2.0] and annotate.places([2, 2]) == [1.5, 1.5]


def test_answers_that_cannot_be_ranked_are_all_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = ['{"prompt": "a", "responses": ["x", "y"]}', "", "{", '{"prompt": "a"}']
    lines += ['{"prompt": "a", "responses": ["x"]}', '{"prompt": [3], "responses": ["x", "y"]}']
    lines += ['{"prompt": "a", "responses": "xy"}', '{"prompt": "a", "responses": ["\\ud800", ""]}']
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        annotate.load(str(path))
    assert [str(p).split(":")[1] for p in caught.value.problems] == list("345678")
    path.write_text(lines[0])
    assert annotate.load(str(path))[0]["responses"] == ["x", "y"]
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no answers"):
        annotate.load(str(path))


def test_two_processes_do_not_write_the_same_rankings(tmp_path, monkeypatch):
    answers, file = write_answers(tmp_path / "to_rank.jsonl", 2), tmp_path / "new/rankings.jsonl"
    served = []
    monkeypatch.setattr("evaluation.annotate_page.serve", lambda *_: served.append(start()))

    def start():
        flags = ["--answers", str(answers), "--output_file", str(file)]
        monkeypatch.setattr("sys.argv", ["annotate.py", *flags])
        config = annotate.AnnotateConfig(answers=str(answers), output_file=str(file))
        monkeypatch.setattr(annotate.command_line, "parse", lambda *_: config)
        if served or file.parent.exists():  # the second one, while the first serves
            with pytest.raises(UserError, match=r"another annotate.py writes .*rankings.jsonl"):
                annotate.main()
            return
        annotate.main()

    start()
    assert served == [None]
    with annotate.only_writer(file):
        pass  # free again


def test_annotate_lists_its_problems():
    message = problems_of("--answers", "/no/file", "--port", "-1", of=annotate.AnnotateConfig)
    assert "/no/file is no file" in message and "port=-1" in message
    same = problems_of("--answers", __file__, "--output_file", __file__, of=annotate.AnnotateConfig)
    assert "is the file of the answers" in same
    here = os.path.relpath(__file__)
    same = problems_of("--answers", __file__, "--output_file", here, of=annotate.AnnotateConfig)
    assert "is the file of the answers" in same
