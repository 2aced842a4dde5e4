"""A calculator: `--environment step3_ppo.environments.calculator:replies`.

Where the policy's turn holds `<calc>12*34</calc>` it is told `408`, and speaks again. A turn
without a call is an answer, and ends the episode. Nothing of the policy's text is executed.
"""

import operator
import re

CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
# Digits are ASCII and few, so that no call takes long.
TERM = re.compile(r"\s*(-?[0-9]{1,9})\s*([-+*])\s*(-?[0-9]{1,9})\s*")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
UNREADABLE = "error"


def replies(conversations: list[list[dict]], rows: list[dict]) -> list[str | None]:
    """To each conversation, what its last turn makes the calculator say, or None."""
    return [reply(conversation[-1]["content"]) for conversation in conversations]


def reply(text: str) -> str | None:
    """The result of the first call in a text, `error` for one that cannot be read, or None."""
    call = CALL.search(text)
    if call is None:
        return None
    term = TERM.fullmatch(call[1])
    return str(OPERATORS[term[2]](int(term[1]), int(term[3]))) if term else UNREADABLE
