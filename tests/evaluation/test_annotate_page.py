"""People rank in a browser; a kill loses nothing; step 2 trains on what they said."""

import json
import time

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


def drag(page, answer: int, upon: int, finger: bool) -> None:
    """The list's item of `answer` over the upper half of that of `upon`, in a few moves."""
    centre = "(e) => { const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y]; }"
    handle = page.locator(f"#order li[data-place='{answer}'] .handle")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    _, top = page.locator(f"#order li[data-place='{upon}']").evaluate(centre)
    path = [(x, y + (top + 4 - y) * part / 8) for part in range(1, 9)]
    if not finger:
        page.mouse.move(x, y)
        page.mouse.down()
        for at in path:
            page.mouse.move(*at)
        page.mouse.up()
        return
    session = page.context.new_cdp_session(page)
    touches = [("touchStart", (x, y)), *(("touchMove", at) for at in path), ("touchEnd", None)]
    for kind, at in touches:
        points = [{"x": at[0], "y": at[1]}] if at else []
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


def wait_for(file, lines: int) -> None:
    until = time.monotonic() + 20
    while not file.exists() or len(file.read_text().splitlines()) < lines:
        assert time.monotonic() < until, file.read_text()
        time.sleep(0.05)


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
@pytest.mark.parametrize("finger", [False, True])
def test_answers_are_dragged_killed_reopened(chromium, tmp_path, finger):
    answers, rankings = write_answers(tmp_path / "to_rank.jsonl", 3), tmp_path / "rankings.jsonl"
    clicks = rankings.with_suffix(".clicks.jsonl")
    flags = ["--answers", answers, "--output_file", rankings]
    how = {"width": 390, "scheme": "dark", "has_touch": True} if finger else {}
    with (
        browser.served("annotate.py", *flags) as (process, address),
        browser.opened(chromium, address, **how) as (page, wrong),
    ):
        begin(page, "ana")
        shown = [page.input_value(f"#answer{k} textarea") for k in range(4)]
        listed = page.locator("#order bdi").all_inner_texts()
        assert [x.strip() for x in listed] == [x.strip() for x in shown], "markup is text here too"
        drag(page, 2, 0, finger)
        wait_for(clicks, 1 + 4)
        assert chosen(page) == ["2", "3", "1", "4"]
        first = page.locator("#order li").first
        assert first.get_attribute("data-place") == "2" and first.get_attribute("data-rank") == "1"
        process.kill()
        assert wrong == []
    texts = {visible(x): x for x in json.loads(answers.read_text().splitlines()[0])["responses"]}
    (said,) = [json.loads(x) for x in rankings.read_text().splitlines()]
    ranks = dict(zip(said["responses"], said["ranks"], strict=True))
    assert [ranks[texts[text]] for text in shown] == [2, 3, 1, 4]
    with (
        browser.served("annotate.py", *flags) as (_, address),
        browser.opened(chromium, address, **how) as (page, _),
    ):
        begin(page, "ana")
        page.click("#back")
        page.wait_for_timeout(800)
        order = "(items) => items.map((e) => [e.dataset.place, e.dataset.rank].join(':')).join(' ')"
        assert page.locator("#order li").evaluate_all(order) == "2:1 0:2 1:3 3:4"
        page.locator("#rank0 input").first.click()  # a tie with the best
        wait_for(clicks, 1 + 5)
        assert page.locator("#order li").evaluate_all(order) == "0:1 2:1 1:3 3:4"
        page.locator("#order li[data-place='3'] b").click()
        page.wait_for_timeout(500)
        assert len(clicks.read_text().splitlines()) == 6, "nothing was moved"


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
