"""The page of a run in a browser: no network, no errors, any width, light and dark, keys."""

import pytest

from evaluation import html_report
from tests.helpers import browser, run_folders

chromium = browser.chromium


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_folders.ppo(folder / "step3_ppo")
    html_report.write([folder], folder / "report.html")
    return f"file://{folder}/report.html"


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_nothing_is_wrong(chromium, page_file, width, scheme):
    with browser.opened(chromium, page_file, width, scheme, offline=True) as (page, wrong):
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) == 0 and wrong == []
        ink = page.evaluate("getComputedStyle(document.body).color")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert contrast(ink, paper) > 7
        for name in ("--good", "--doubt", "--bad", "--muted"):
            colour = page.evaluate(
                "n => {const e = document.createElement('i'); e.style.color = `var(${n})`;"
                "document.body.append(e); return getComputedStyle(e).color}", name,
            )  # fmt: skip
            assert contrast(colour, paper) > 4.5, name


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours as "rgb(r, g, b)"."""

    def light(colour: str) -> float:
        parts = [int(x) / 255 for x in colour.strip("rgb()").split(",")]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted([light(one), light(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.browser
def test_figures_zoom_and_tokens_tell_their_numbers_by_keys(chromium, page_file):
    with browser.opened(chromium, page_file, offline=True) as (page, wrong):
        page.focus("figure")
        page.keyboard.press("Enter")
        box = "document.querySelector('.stage svg').getAttribute('viewBox').split(' ').map(Number)"
        whole = page.evaluate(box)
        page.keyboard.press("+")
        page.keyboard.press("ArrowRight")
        near = page.evaluate(box)
        assert near[2] == pytest.approx(0.7 * whole[2]) and near[0] > whole[0]
        page.keyboard.press("0")
        assert page.evaluate(box) == whole
        page.keyboard.press("Escape")
        assert not page.evaluate("document.querySelector('dialog').open")

        page.focus(".sequence")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        told = page.inner_text("output").split()
        assert told == ['"<|im_end|>"', "reward", "2", "advantage", "-1", "kl", "-0.2"]
        shade = "getComputedStyle(document.querySelectorAll('.t')[2]).boxShadow"
        by_advantage = page.evaluate(shade)
        page.check("input[value=reward]")
        assert page.evaluate(shade) != by_advantage
        assert wrong == []


@pytest.mark.browser
def test_the_page_prints(chromium, page_file):
    with browser.opened(chromium, page_file, offline=True) as (page, _):
        assert len(page.pdf()) > 50_000
