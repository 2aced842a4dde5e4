"""The page of a run: complete, safe to open, and of one file."""

import html
import json
import os
import re
import time
from html.parser import HTMLParser

import pytest

from evaluation import html_report, run_folder
from step1_sft.config import SFTConfig
from tests.helpers import run_folders
from tests.helpers.evaluated_models import problems_of
from utils.settings import command_line
from utils.terminal import visible

VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """The elements of a page, its text without scripts and styles, and what it would fetch."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.fetched, self.text, self.elements = [], [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.elements.append((tag, given))
        self.ids += [given["id"]] if "id" in given else []
        for name in ("src", "href", "srcset", "data", "action", "xlink:href"):
            value = given.get(name, "#") or "#"
            self.fetched += [] if value.startswith("#") else [value]
        self.text += " " * (tag in ("td", "th", "p", "li"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps that is over, with results of other programs."""
    folder = tmp_path_factory.mktemp("run") / "mine & yours"
    sft = folder / "step1_sft"
    sft.mkdir(parents=True)
    command_line.save(SFTConfig(output_dir=str(sft)), sft, 1)
    lines = [{"step": n, "loss": 3.0 / n, "seconds": 0.5} for n in (1, 2, 3)]
    (sft / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (sft / "result.json").write_text('{"seconds": 12.0}')
    run_folders.ppo(folder / "step3_ppo")
    flags = {"ppo.kl_coef": ["0.2"], "reward_url": ["https://(secret)@host/"]}
    asked = {"recipe": "tiny", "configs": [], "flags": flags}
    (folder / "run.json").write_text(json.dumps(asked))
    (folder / "win_rate.json").write_text(json.dumps({"judge": run_folders.HOSTILE}))
    return folder


@pytest.fixture(scope="module")
def page(run):
    return html_report.render([run])


def test_the_page_is_whole_fetches_nothing_and_names_nothing_twice(page):
    parsed = Page(page)
    assert parsed.open == [] and parsed.fetched == []
    tops = [i for i in parsed.ids if re.fullmatch("[a-z]+", i)]
    assert tops == ["health", "answers", "tokens", "curves", "evaluated", "time", "run"]
    links = [a["href"][1:] for tag, a in parsed.elements if tag == "a" and "href" in a]
    assert set(links) == set(tops)
    policy = next(a["content"] for t, a in parsed.elements if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "url(http" not in page and "@import" not in page
    assert len(page) < 3_000_000


def test_text_of_models_is_shown_as_text(page):
    parsed, shown = Page(page), visible(run_folders.HOSTILE)
    assert parsed.text.count(shown) >= 10
    assert "\x1b" not in page and "\u202e" not in page and "\x00" not in page
    assert sum(tag == "script" for tag, _ in parsed.elements) == 1
    assert "49" not in parsed.text.partition("{{ 7 * 7 }}")[0][-20:]
    assert html.escape(run_folders.HOSTILE[:20]) in page


def test_the_first_screen_says_how_it_went_and_what_changed(page):
    parsed = Page(page)
    top = " ".join(parsed.text.partition("The same prompts")[0].split())
    assert "good verifier rose, score rose" in top and "Held-out score 0.000 → 4.000" in top
    assert "<del>is</del>" in page and "<ins>was</ins>" in page
    assert "<del>三</del>" in page and "<ins>四</ins>" in page
    assert (
        "--ppo.kl_coef 0.2" in parsed.text and "--reward_url https://(secret)@host/" in parsed.text
    )


def test_tokens_carry_their_numbers_and_shares_of_the_largest(page):
    tokens = [a for tag, a in Page(page).elements if a.get("class") == "t"]
    assert [t["data-n"].split() for t in tokens] == [
        "reward 0 advantage 0.5 kl 0".split(),
        "reward -0.5 kl 0.1".split(),
        "reward 2 advantage -1 kl -0.2".split(),
    ]
    assert tokens[1]["style"] == "--reward:-0.25;--kl:0.5;"
    assert tokens[2]["style"] == "--reward:1.0;--advantage:-1.0;--kl:-1.0;"
    kinds = [a["value"] for tag, a in Page(page).elements if a.get("type") == "radio"]
    assert kinds == ["reward", "advantage", "kl"], "there was no critic"


def test_runs_side_by_side_show_where_their_settings_differ(run, tmp_path):
    other = run_folders.ppo(tmp_path / "$_$\u202eother", eos_share=(0.9, 0.05), finished=False)
    config = run_folder.read(other).steps[0].config
    config.kl_coef = 0.7
    command_line.save(config, other, 1)
    text = html_report.render([run, other], refresh=2.0)
    parsed = Page(text)
    assert ("meta", {"http-equiv": "refresh", "content": "120"}) in parsed.elements
    flat = " ".join(parsed.text.split())
    assert "kl_coef 0.05 0.7" in flat and "wrong never stops" in flat
    assert "mine & yours, before" in flat and "other, after" in flat
    assert "mine &amp; yours: score" in text, "both are in one figure"
    assert r"$_$\u202eother: score" in text and "\u202e" not in text


def test_a_page_is_written_once_or_until_the_run_is_over(run, tmp_path, monkeypatch, capsys):
    seen, target = [], tmp_path / "page.html"

    def slept(seconds):
        if not seen:  # the first step begins after the page's program has
            run_folders.ppo(tmp_path / "late/step3_ppo", finished=False)
        elif len(seen) == 1:
            assert "not over yet" in target.read_text()
            (tmp_path / "late/step3_ppo/result.json").write_text('{"seconds": 1}')
        seen.append(seconds)

    monkeypatch.setattr("time.sleep", slept)
    flags = ["x", "--output_dir", tmp_path / "late", "--output_file", target]
    (tmp_path / "late").mkdir()
    monkeypatch.setattr("sys.argv", [str(word) for word in flags] + ["--report_every", "0.5"])
    html_report.main()
    assert seen[:2] == [30.0, 30.0] and len(seen) == 3
    assert "not over yet" not in target.read_text() and str(target) in capsys.readouterr().out


def test_a_run_that_broke_off_is_not_waited_for(run, tmp_path, monkeypatch, capsys):
    run_folders.ppo(tmp_path / "step3_ppo", finished=False)
    waits, log = [], tmp_path / "step3_ppo/log.txt"
    log.touch()

    def now():
        return start + 60 * sum(waits)

    def slept(seconds):
        waits.append(seconds / 60)
        if len(waits) < 3:
            os.utime(log, (now(), now()))

    def written(folders, file, refresh):
        file.touch()
        os.utime(file, (now(), now()))
        return False

    start = time.time()
    monkeypatch.setattr("time.sleep", slept)
    monkeypatch.setattr("time.time", now)
    monkeypatch.setattr(html_report, "write", written)
    flags = ["--output_dir", str(tmp_path), "--report_every", "10"]
    monkeypatch.setattr("sys.argv", ["html_report.py", *flags])
    html_report.main()
    assert len(waits) == 2 + 7, "an hour after the last change, which is not the page"
    assert "nothing was written for 70 minutes" in capsys.readouterr().out


def test_a_page_made_while_the_run_ends_is_made_again(tmp_path, monkeypatch):
    step = tmp_path / "step3_ppo"
    run_folders.ppo(step, finished=False)

    def rendered(folders, refresh):
        (step / "result.json").write_text('{"seconds": 1}')
        return "not over yet"

    monkeypatch.setattr(html_report, "render", rendered)
    assert not html_report.write([tmp_path], tmp_path / "report.html")
    assert html_report.write([tmp_path], tmp_path / "report.html")


def test_what_cannot_be_shown_is_said():
    assert "set either" in problems_of(of=html_report.ReportConfig)
    assert "no such folder" in problems_of("--output_dir", "/no/where", of=html_report.ReportConfig)
    both = problems_of("--compare", "/", "/no/where", of=html_report.ReportConfig)
    assert "/no/where is no folder" in both


def test_the_open_part_names_what_scored_and_an_empty_answer_is_marked(tmp_path):
    folder = run_folders.ppo(tmp_path / "step3_ppo")
    config = run_folder.read(folder).steps[0].config
    config.reward_model, config.reward_function, config.kl_coef = "a/model", ["my.py:longer"], 0.0
    command_line.save(config, folder, 1)
    both = {m: run_folders.answers([text], 0.0) for m, text in (("before", "a"), ("after", ""))}
    (folder / "samples.json").write_text(json.dumps(both))
    flat = " ".join(Page(html_report.render([tmp_path])).text.split())
    opened = flat.rpartition("What was run")[2].partition("Machine and versions")[0]
    assert "scored by the reward model a/model and the reward function my.py:longer" in opened
    assert "--kl_coef 0.0 (not 0.05)" in opened
    assert flat.count("(empty)") == 1
