"""People rank in a browser; a kill loses nothing; step 2 trains on what they said."""

import json

import pytest

from tests.evaluation.test_annotate import HOSTILE, write_answers
from tests.helpers import browser
from tests.helpers.jobs import reward
from tests.helpers.running import run_ranks
from utils.terminal import visible

chromium = browser.chromium


def begin(page, name):
    page.wait_for_selector("#name input, #name textarea")
    page.fill("#name input, #name textarea", name)
    page.click("#begin")
    page.wait_for_selector("#answer0 textarea")
    page.wait_for_timeout(800)
    page.evaluate("document.activeElement.blur()")


def press(page, file, *keys):
    """Each key, once what the one before did is on the disk."""
    for key in keys:
        before = file.read_text() if file.exists() else ""
        page.keyboard.press(key)
        for _ in range(100):
            if file.read_text() != before:
                break
            page.wait_for_timeout(50)


def chosen(page) -> list:
    js = "k => document.querySelector(`#rank${k} input:checked`)?.value ?? null"
    return [page.evaluate(js, k) for k in range(4)]


@pytest.mark.browser
def test_four_answers_ranked_killed_reopened(chromium, tmp_path):
    answers, rankings = write_answers(tmp_path / "to_rank.jsonl", 3), tmp_path / "rankings.jsonl"
    clicks = rankings.with_suffix(".clicks.jsonl")
    flags = ["--answers", answers, "--output_file", rankings]
    with (
        browser.served("annotate.py", *flags) as (process, address),
        browser.opened(chromium, address, width=390, scheme="dark") as (page, wrong),
    ):
        begin(page, "ana")
        shown = [page.input_value(f"#answer{k} textarea") for k in range(4)]
        assert visible(HOSTILE) in shown
        press(page, clicks, *"2113")
        page.keyboard.press("Enter")
        page.wait_for_function(
            "document.querySelector('#status textarea').value.includes('2 of 3')"
        )
        page.wait_for_timeout(500)
        press(page, clicks, "4", "1")
        process.kill()
        assert wrong == []
    texts = {visible(x): x for x in json.loads(answers.read_text().splitlines()[0])["responses"]}
    (said,) = [json.loads(x) for x in rankings.read_text().splitlines()]
    ranks = dict(zip(said["responses"], said["ranks"], strict=True))
    assert [ranks[texts[text]] for text in shown] == [2, 1, 1, 3]
    with (
        browser.served("annotate.py", *flags) as (_, address),
        browser.opened(chromium, address) as (page, _),
    ):
        begin(page, "ana")
        assert "prompt 2 of 3; ana has ranked 1" in page.input_value("#status textarea")
        assert chosen(page) == ["4", "1", None, None], "half a ranking is kept too"
        press(page, clicks, "2", "3")
        page.click("#back")
        page.wait_for_timeout(800)
        assert chosen(page) == ["2", "1", "1", "3"]
    assert len(rankings.read_text().splitlines()) == 2


@pytest.mark.browser
def test_step_2_trains_on_what_people_ranked(chromium, tiny, tmp_path):
    answers, rankings = write_answers(tmp_path / "to_rank.jsonl", 24), tmp_path / "rankings.jsonl"
    clicks = rankings.with_suffix(".clicks.jsonl")
    flags = ["--answers", answers, "--output_file", rankings]
    with (
        browser.served("annotate.py", *flags) as (_, address),
        browser.opened(chromium, address) as (page, _),
    ):
        begin(page, "ana")
        for n in range(24):
            press(page, clicks, *"1324")
            page.keyboard.press("Enter")
            page.wait_for_timeout(300 if n < 23 else 0)
    data = ["--preference_data", rankings]
    run_ranks([reward(tiny, tiny / "base_model", tmp_path / "reward", *data)], 1)
    assert json.loads((tmp_path / "reward/result.json").read_text())["pairs"] > 0
