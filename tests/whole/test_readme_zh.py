"""README.zh.md says what README.md says: the same headings, commands, figures, flags and links."""

import re
from collections import Counter

import pytest

from tests.helpers.running import ROOT

ENGLISH, CHINESE = ((ROOT / name).read_text() for name in ("README.md", "README.zh.md"))
OUTSIDE = [re.sub(r"```.*?```", "", text, flags=re.S) for text in (ENGLISH, CHINESE)]
# What both pages have alike outside of their blocks.
ALIKE = {
    "levels of headings": r"^(#+) ",
    "bullets and rows of tables": r"^(-|\|) ",
    "links": r"\]\(((?!README)[^)]+)\)",
    "flags": r"--[a-z][a-z_0-9.]+",
    "code": r"`([^`]+)`",
    "decimal numbers": r"\d+\.\d+(?! M)",  # of millions, which Chinese counts in 万
}


def test_blocks_of_commands_and_output_are_the_same():
    assert ENGLISH.split("```")[1::2] == CHINESE.split("```")[1::2]


@pytest.mark.parametrize("what", ALIKE)
def test_both_pages_have_alike(what):
    found = [re.findall(ALIKE[what], text, re.M) for text in OUTSIDE]
    found = [[" ".join(one.split()) for one in each] for each in found]
    if what in ("levels of headings", "bullets and rows of tables"):
        assert found[0] == found[1]
    else:
        assert Counter(found[0]) == Counter(found[1])


def test_the_pages_name_each_other():
    assert "(README.zh.md)" in ENGLISH and "(README.md)" in CHINESE
