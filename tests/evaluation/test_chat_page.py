"""The chat in a browser."""

import json

import pytest

from tests.helpers import browser, evaluated_models, run_folders
from utils.terminal import visible

chromium, policy = browser.chromium, evaluated_models.policy


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
        lengths = set()
        while len(page.locator("[data-testid=bot]").all()) < 2:
            lengths |= {len(x) for x in page.locator("[data-testid=bot]").all_inner_texts()}
        page.wait_for_timeout(1500)
        asked = page.locator("[data-testid=user]").all_inner_texts()
        assert [text.strip() for text in asked] == [visible(line)] * 2
        answers = page.locator("[data-testid=bot]").all_inner_texts()
        assert len(lengths) > 1, "it came at once"
        assert answers[0] == answers[1] and len(answers[0]) > 10, "the same model, greedily"

        with page.expect_response(lambda r: "conversations.jsonl" in r.url or r.ok):
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


@pytest.mark.browser
def test_hostile_answers_are_text(chromium):
    gradio = pytest.importorskip("gradio")
    from evaluation import chat_page, web

    with gradio.Blocks() as page:
        turns = [chat_page.bubble("assistant", run_folders.HOSTILE)]
        gradio.Chatbot(turns, render_markdown=False, allow_tags=False)
    _, address, _ = page.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, theme=web.theme()
    )
    with browser.opened(chromium, address) as (shown, wrong):
        shown.wait_for_selector("[data-testid=bot]")
        assert shown.locator("[data-testid=bot]").inner_text() == visible(run_folders.HOSTILE)
        assert wrong == []
    page.close()
