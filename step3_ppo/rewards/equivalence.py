"""Whether two mathematical expressions are equal, by math-verify.

Called in processes of their own (utils/rewards/sandbox.py), confined and with a time limit: 9**9**9
would never end, and what a model writes is parsed. LaTeX is read by a grammar; sympy's parse_expr,
which evaluates Python, is never given an answer's text.
"""

import logging

from math_verify import LatexExtractionConfig, parse, verify

logging.disable(logging.CRITICAL)  # it logs each expression that it cannot read


def equal(truth: str, answer: str) -> bool:
    """Of LaTeX or plain expressions, without the signs around them."""
    parsed = [
        # Without limits of its own: those are signals, which end no computation in C.
        parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None, raise_on_error=False)
        for text in (truth, answer)
    ]
    return all(parsed) and verify(*parsed, timeout_seconds=None, raise_on_error=False)


equal("x", "1")  # builds its tables, which takes longer than most answers
