"""What the calculator says, and to what."""

import pytest

from step3_ppo.environments.calculator import replies


@pytest.mark.parametrize(
    "text, said",
    [
        ("<calc>123+456</calc>", "579"),
        ("Let me see. <calc> 12 * 34 </calc> and so on", "408"),
        ("<calc>5-9</calc>", "-4"),
        ("<calc>-5--9</calc>", "4"),
        ("<calc>999999999*999999999</calc>", "999999998000000001"),
        ("<calc>1+1</calc><calc>2+2</calc>", "2"),
        ("<calc>1+1", None),
        ("579", None),
        ("", None),
        ("<calc></calc>", "error"),
        ("<calc>1+2+3</calc>", "error"),
        ("<calc>9**9</calc>", "error"),
        ("<calc>1\n+1</calc>", "2"),
        ("<calc>１+１</calc>", "error"),
        ("<calc>1" + "0" * 9 + "+1</calc>", "error"),
        ("<calc>__import__('os')</calc>", "error"),
    ],
)
def test_a_call_is_replied_to_and_nothing_else(text, said):
    conversation = [{"role": "user", "content": "<calc>1+1</calc>"}]
    assert replies([[*conversation, {"role": "assistant", "content": text}]], [{}]) == [said]
