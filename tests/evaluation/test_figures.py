"""The curves of a run's page."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

import evaluation.metrics_table  # noqa: F401  registers the metrics of all steps
from evaluation import figures, run_folder
from tests.helpers import run_folders
from utils import metrics


def test_figures_are_of_metrics_in_the_table():
    metrics.check(n for group in figures.FIGURES.values() for f in group for n in f.names)
    assert set(figures.FIGURES) == set(run_folder.ORDER)


def test_a_long_curve_keeps_its_means_and_ends():
    points = [(float(n), float(n * n)) for n in range(1001)]
    thin = figures.thinned(points, most=10)
    assert len(thin) == 10 and thin[0] == (50.0, sum(n * n for n in range(101)) / 101)
    weights = [101] * 9 + [1001 - 9 * 101]
    mean = sum(w * y for w, (_, y) in zip(weights, thin, strict=True)) / 1001
    assert mean == pytest.approx(sum(y for _, y in points) / 1001)
    assert figures.thinned(points[:10], most=10) == points[:10]


def test_a_figure_is_svg_in_colours_of_the_page(tmp_path):
    (step,) = run_folder.read(run_folders.ppo(tmp_path / "x")).steps
    figure = figures.Figure("score", "score", ("score", "eval/score", "explained_variance"))
    names = [name for name, *_ in figures.curves(figure, [("a", step)])]
    assert names == ["score", "eval/score"], "what was not recorded is not drawn"
    svg = figures.draw(figure, [("a", step), ("<b>&", step)])
    ElementTree.fromstring(svg)
    assert "var(--series-1)" in svg and "currentColor" in svg
    assert not any(colour in svg for colour in figures.COLOURS)
    assert "&lt;b&gt;&amp;: score" in svg and "<b>" not in svg
    assert figures.draw(figures.Figure("none", "", ("loss",)), [("a", step)]) == ""


def test_proxy_and_gold_are_drawn_over_the_root_of_the_kl(tmp_path):
    (step,) = run_folder.read(run_folders.ppo(tmp_path / "x")).steps
    points = figures.over_kl(step, "eval/verifier")
    assert points[0] == (math.sqrt(0.1), 0.4) and len(points) == 4
    proxy = figures.Figure("", "", ("eval/score", "eval/judge"), over_kl=True)
    assert figures.draw(proxy, [("a", step)]) == "", "a proxy without gold shows nothing"
    (gold,) = [figure for figure in figures.FIGURES["ppo"] if figure.over_kl]
    assert figures.draw(gold, [("a", step)]).count(">keep</text>") == 1


def test_steps_are_whole_numbers(tmp_path):
    (step,) = run_folder.read(run_folders.ppo(tmp_path / "x")).steps
    step.metrics = step.metrics[:3]  # at steps 0, 1 and 2 an axis would have halves
    svg = figures.draw(figures.Figure("entropy", "", ("entropy",)), [("a", step)])
    axis = svg.partition('id="matplotlib.axis_1"')[2].partition('id="matplotlib.axis_2"')[0]
    ticks = [x for x in re.findall(r"<text[^>]*>([^<]*)</text>", axis) if x != "step"]
    assert ticks and all("." not in tick for tick in ticks)
