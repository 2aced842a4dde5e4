"""The chat in a browser."""

import html
import inspect
import json
import time

import pytest

from evaluation import chat_page
from tests.helpers import browser, evaluated_models, run_folders
from utils.terminal import visible

chromium, policy = browser.chromium, evaluated_models.policy


def test_a_turn_keeps_its_indentation():
    """gradio cleans each text by inspect.cleandoc."""
    said = "def f(x):\n    if x < 1:\n\treturn '&lt;'  # \u202e\n    return x"
    content = chat_page.bubble("assistant", said)["content"]
    assert html.unescape(inspect.cleandoc(content)) == visible(said)


@pytest.mark.browser
def test_a_turn_streams_into_both_columns_and_markup_stays_text(chromium, policy, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(policy)
    flags = ["--checkpoint", policy, other, "--web", "--dtype", "fp32", "--max_new_tokens", 60]
    with (
        browser.served("chat.py", *flags, "--temperature", 0) as (process, address),
        browser.opened(chromium, address) as (page, wrong),
    ):
        page.wait_for_selector("#line textarea")
        line = "<b>Hi</b> dog! <img src=x onerror=alert(1)> \u202eabc & &amp;"
        page.fill("#line textarea", line)
        page.press("#line textarea", "Enter")
        answers, until = [], time.monotonic() + 90
        # The same model, greedily: both columns end alike.
        while len(answers) < 2 or answers[0] != answers[1] or len(answers[0]) <= 10:
            answers = page.locator("[data-testid=bot]").all_inner_texts()
            assert time.monotonic() < until, answers
        asked = page.locator("[data-testid=user]").all_inner_texts()
        assert [text.strip() for text in asked] == [visible(line)] * 2

        page.click("#save")
        page.wait_for_selector("#file a")
        with page.expect_download() as download:
            page.click("#file a")
        rows = [json.loads(x) for x in open(download.value.path(), encoding="utf-8")]
        assert [row["messages"][0]["content"] for row in rows] == [line, line]

        page.fill("#line textarea", f"/save {tmp_path}/stolen")
        page.press("#line textarea", "Enter")
        page.wait_for_selector("#remark textarea")
        assert not (tmp_path / "stolen").exists(), "a visitor chose a file of this machine"
        page.click("#reset")
        page.wait_for_function("!document.querySelector('[data-testid=bot]')")
        assert wrong == [] and process.poll() is None


class Slow:
    """A speaker whose answer is hostile, and comes in two parts."""

    name, parts = "slow", (run_folders.HOSTILE[:30], run_folders.HOSTILE[30:])

    def stream(self, messages, config, temperature):
        yield self.parts[0]
        time.sleep(2.0)
        yield self.parts[1]


@pytest.mark.browser
def test_hostile_answers_are_text(chromium):
    pytest.importorskip("gradio")
    from evaluation import chat, web

    page = chat_page.build(chat.ChatConfig(checkpoint=["slow"]), [Slow()])
    _, address, _ = page.queue().launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, theme=web.theme()
    )
    with browser.opened(chromium, address) as (shown, wrong):
        shown.wait_for_selector("#line textarea")
        shown.fill("#line textarea", "hi")
        shown.press("#line textarea", "Enter")
        seen, until = [], time.monotonic() + 60
        while visible(run_folders.HOSTILE) not in seen:
            seen += shown.locator("[data-testid=bot]").all_inner_texts()
            assert time.monotonic() < until, seen[-1:]
        assert visible(Slow.parts[0]) in seen, "it came at once"
        # What is typed while an answer comes stays, and what is sent is answered after it.
        shown.fill("#line textarea", "first")
        shown.press("#line textarea", "Enter")
        shown.wait_for_function("document.querySelectorAll('[data-testid=bot]').length > 1")
        shown.fill("#line textarea", "second")
        shown.press("#line textarea", "Enter")
        users = "[...document.querySelectorAll('[data-testid=user]')].map(e => e.innerText.trim())"
        shown.wait_for_function(f"{users}.join() === 'hi,first,second'")
        shown.wait_for_function("document.querySelector('#line textarea').value === ''")
        shown.fill("#line textarea", "not sent ye")
        seen = "[...document.querySelectorAll('[data-testid=bot]')].at(-1).innerText"
        shown.wait_for_function(f"{seen}.includes({json.dumps(Slow.parts[1][-9:])})")
        shown.wait_for_timeout(500)
        assert shown.input_value("#line textarea") == "not sent ye"
        # A reset while an answer comes.
        shown.fill("#line textarea", "hi again")
        shown.press("#line textarea", "Enter")
        shown.wait_for_function("document.querySelectorAll('[data-testid=bot]').length > 3")
        shown.click("#reset")
        shown.wait_for_timeout(4000)  # longer than the answer takes
        assert shown.locator("[data-testid=bot], [data-testid=user]").count() == 0
        assert wrong == []
    page.close()
