"""The words in which two answers differ."""

from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.differences import changed

texts = st.text(alphabet=st.sampled_from("ab  é\n.,三只猫ねこ\x1b\u202e-_7"), max_size=25)


@given(texts, texts)
@settings(max_examples=150, deadline=None)
def test_the_parts_are_the_texts_and_what_is_unmarked_is_the_same(before, after):
    ours, theirs = changed(before, after)
    assert "".join(part for part, _ in ours) == before
    assert "".join(part for part, _ in theirs) == after
    same = ["".join(part for part, new in parts if not new) for parts in (ours, theirs)]
    assert same[0] == same[1]


def test_words_and_chinese_characters_are_marked_one_by_one():
    ours, theirs = changed("The cat sat.", "The dog sat.")
    assert ours == [("The ", False), ("cat", True), (" sat.", False)]
    assert theirs[1] == ("dog", True)
    assert changed("三只猫", "三只狗")[1] == [("三只", False), ("狗", True)]
    assert changed("", "new")[0] == [] and changed("same", "same")[0] == [("same", False)]
