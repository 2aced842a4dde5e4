"""Programs that a policy writes, by unit tests, each in a confined process (utils/rewards).

    --reward_function step3_ppo.rewards.code:all_tests         1 where every test passes, else 0
    --reward_function step3_ppo.rewards.code:share_of_tests    the share of them that pass

The program is the last ```python block of the answer, or the last block, or the answer. A row has

- `inputs` and `outputs`, lists: what the program reads and must write; with `fn_name`, the
  arguments of that function and what it must return. Also as one JSON text in `input_output` (APPS,
  TACO) or `reward_model.ground_truth` (verl's PRIME);
- or `test_list` (MBPP) or `tests`, a list of Python sources; or `test` and `entry_point`
  (HumanEval). Each runs after the answer, with the same globals, and passes unless it raises.

With inputs and outputs the answer never sees what is expected. Tests in Python share a process with
the answer: exit(0) and printing do not pass them, but a program written to cheat them can.
"""

import json
import math
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from step3_ppo.rewards.rows import columns, given, parsed
from utils.rewards import sandbox

BLOCK = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:```|\Z)", re.S)
CLOSE = 1e-6  # relative and absolute, of numbers with a point
# Puts what a function returns where prints of the answer cannot get: the answer's go nowhere.
CALL = """
import json as _json, os as _os, sys as _sys
_out = _os.dup(1)
_os.dup2(2, 1)
def _call(name):
    found = globals().get(name) or getattr(globals()["Solution"](), name)
    _os.write(_out, _json.dumps(found(*_json.loads(_sys.stdin.read()))).encode())
"""
LIMITS = sandbox.Limits()


def all_tests(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """1 where the answer's program passes all of the row's tests, else 0."""
    return _scores(responses, rows, _all)


def share_of_tests(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """The share of the row's tests that the answer's program passes."""
    return _scores(responses, rows, _share)


def all_tests_unconfined(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """all_tests for machines that cannot confine programs: what a model writes runs with all your
    rights, under the limits of time and memory alone."""
    return _scores(responses, rows, _all, confine=False)


def _all(verdicts: list[Callable[[], bool]]) -> float:
    return float(all(verdict() for verdict in verdicts))  # the first that fails ends it


def _share(verdicts: list[Callable[[], bool]]) -> float:
    return sum(verdict() for verdict in verdicts) / len(verdicts)


def _scores(responses: list[str], rows: list[dict], judge: Callable, confine=True) -> list[float]:
    if confine and sandbox.refusal():
        raise RuntimeError(
            f"{sandbox.refusal()}; use another machine, or accept that programs of a model run "
            "with all your rights: --reward_function step3_ppo.rewards.code:all_tests_unconfined"
        )
    tests = [list(tests_of(row)) for row in rows]  # a bad row is told before anything runs
    programs = [program_of(response) for response in responses]

    def score(item: tuple[str, list[Test]]) -> float:
        program, own = item
        return judge([lambda test=test: test.passes(program, confine) for test in own])

    return sandbox.each(score, list(zip(programs, tests, strict=True)))


def program_of(response: str) -> str:
    """The answer's program; one that was cut at the length limit has no end of its block."""
    blocks = BLOCK.findall(response)
    python = [text for language, text in blocks if language.lower() in ("python", "py", "python3")]
    return (python or [text for _, text in blocks] or [response])[-1]


@dataclass(frozen=True)
class Written:
    """A program reads a text and must write another."""

    given: str
    expected: str

    def passes(self, program: str, confine: bool) -> bool:
        ended = sandbox.run_program([program], self.given, LIMITS, confine=confine)
        return ended.code == 0 and same_text(ended.output, self.expected)


@dataclass(frozen=True)
class Returned:
    """A function must return something for its arguments."""

    function: str
    arguments: list
    expected: object

    def passes(self, program: str, confine: bool) -> bool:
        sources = [CALL, program, f"_call({self.function!r})"]
        given = json.dumps(self.arguments)
        ended = sandbox.run_program(sources, given, LIMITS, name="answer", confine=confine)
        accepted = [self.expected]
        if isinstance(self.expected, (list, tuple)) and len(self.expected) == 1:
            accepted += self.expected  # in APPS it is often in a list of its own
        try:
            result = json.loads(ended.output)
        except (ValueError, RecursionError):
            return False
        return ended.code == 0 and any(same_value(result, one) for one in accepted)


@dataclass(frozen=True)
class Asserted:
    """Python that must not raise."""

    source: str

    def passes(self, program: str, confine: bool) -> bool:
        # Written at the end only: a program that exits before has not passed.
        word = secrets.token_hex(16)
        sources = [CALL, program, self.source, f"_os.write(_out, {word.encode()!r})"]
        ended = sandbox.run_program(sources, "", LIMITS, name="answer", confine=confine)
        return ended.code == 0 and ended.output == word


Test = Written | Returned | Asserted


def tests_of(row: dict) -> Iterator[Test]:
    """The row's tests, one at least. Raises ValueError with what it has."""
    own = row.get("reward_model")
    whole = own.get("ground_truth") if isinstance(own, dict) else None
    whole = whole if given(whole) else row.get("input_output")
    pairs = parsed(whole, "the row's tests") if given(whole) else row
    if not isinstance(pairs, dict):
        raise ValueError(
            f"the row's tests are no JSON object of inputs and outputs: {pairs!r:.200}"
        )
    inputs, outputs = pairs.get("inputs"), pairs.get("outputs")
    if given(inputs):
        if not all(isinstance(x, (list, tuple)) for x in (inputs, outputs or ())):
            found = f"{inputs!r:.80} and {outputs!r:.80}"
            raise ValueError(f"inputs and outputs must be lists, not {found}")
        if len(inputs) != len(outputs or ()):
            raise ValueError(f"{len(inputs)} inputs for {len(outputs or ())} outputs")
        for one, expected in zip(inputs, outputs, strict=True):
            if given(pairs.get("fn_name")):
                yield Returned(pairs["fn_name"], *_called(one, expected))
            else:
                yield Written(_text(one), _text(expected))
        return
    for name in ("test_list", "tests"):
        if given(row.get(name)):
            sources = row[name]
            yield from map(Asserted, [sources] if isinstance(sources, str) else sources)
            return
    if given(row.get("test")):
        entry = row.get("entry_point")
        yield Asserted(row["test"] + (f"\ncheck({entry})\n" if given(entry) else ""))
        return
    raise ValueError(
        "the row has no tests: no inputs and outputs (by themselves, in input_output or in "
        f"reward_model.ground_truth), test_list, tests or test; it has {columns(row)}"
    )


def _text(value: object) -> str:
    """Lines of APPS may come as a list."""
    return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _called(one: object, expected: object) -> tuple[list, object]:
    """Arguments and result: a list and a value, or, as in verl's PRIME, JSON texts, one argument a
    line."""
    if not isinstance(one, str):
        return list(one), expected
    return [parsed(line, "an argument") for line in one.splitlines()], parsed(expected, "a result")


def same_text(written: str, expected: str) -> bool:
    """Line by line, word by word; words that are numbers with a point may differ by CLOSE."""
    mine, theirs = (
        [line.split() for line in text.strip().splitlines()] for text in (written, expected)
    )
    return list(map(len, mine)) == list(map(len, theirs)) and all(
        a == b or ("." in a + b and _near(a, b))
        for line, other in zip(mine, theirs, strict=True)
        for a, b in zip(line, other, strict=True)
    )


def _near(a: str, b: str) -> bool:
    try:
        return math.isclose(float(a), float(b), rel_tol=CLOSE, abs_tol=CLOSE)
    except ValueError:
        return False


def same_value(a: object, b: object) -> bool:
    """As JSON has it: tuples are lists, keys texts; floats may differ by CLOSE."""
    if isinstance(a, list) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        b = {str(key): value for key, value in b.items()}
        return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)
    if isinstance(a, float) or isinstance(b, float):
        numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
        try:
            return numbers and math.isclose(a, b, rel_tol=CLOSE, abs_tol=CLOSE)
        except OverflowError:  # an integer beyond any float
            return False
    return type(a) is type(b) and a == b
