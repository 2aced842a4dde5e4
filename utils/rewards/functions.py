"""Finding functions of the user's, and calling them so that they cannot hang a run.

User code (a reward function, an environment) may be slow, fail on one row of a thousand or return
what nobody can use. Messages name the row, for the run that ends may be hours old.
"""

import copy
import faulthandler
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import numbers
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

FORMS = "package.module:function or path/to/file.py:function"
SHOWN_TEXT = 200  # characters of a prompt or response in a message
SHOWN_NAMES = 20
SLOW_ROW = 1.0  # seconds; a row that is done sooner is never called slow
SEARCH_EXTRA = 10.0  # seconds that the search for a row may take beyond twice the timeout
GRACE = 10.0  # seconds beyond its time after which a call that blocks Python ends the process


class FunctionError(Exception):
    """A function of the user's raised, was too slow or returned what it should not."""


@dataclass(frozen=True)
class Kind:
    """A kind of function that a user gives: its name in messages, the flag that names it (the one
    of its time limit is called FLAG_timeout), its arguments, and what each row of them is."""

    noun: str
    flag: str
    called_with: tuple[str, ...]
    row: str


REWARD = Kind("reward function", "--reward_function", ("prompts", "responses", "rows"), "response")


# Finding it.


def load(name: str, kind: Kind = REWARD) -> Callable:
    """The function that `name` means: package.module:function or path/to/file.py:function.

    Modules are found as Python finds them and from the current folder, files relative to it; what
    stands beside a file can be imported by it. Raises SystemExit with what is wrong and the flag.
    """

    def refusal(why: str) -> SystemExit:
        return SystemExit(f"{kind.flag} {name!r}: {why}")

    place, _, attribute = name.rpartition(":")
    if not place or not attribute.isidentifier():
        raise refusal(f"names no function; give {FORMS}")
    is_file, path = place.endswith(".py") or os.sep in place, Path(place).expanduser().absolute()
    if is_file and not (path.is_file() and path.suffix == ".py"):
        what = "is a folder" if path.is_dir() else "is not there"
        what = "does not end in .py" if path.is_file() else what
        raise refusal(f"the file {path} {what}; give {FORMS}")
    if not is_file and not all(part.isidentifier() for part in place.split(".")):
        raise refusal(f"{place!r} is neither a module's name nor a file's; give {FORMS}")
    # At the end: a user's file must not take the place of an installed module of the same name.
    folder = str(path.parent if is_file else Path.cwd())
    sys.path += [folder] if folder not in sys.path else []
    try:
        module = _import_file(path) if is_file else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # a script without a main guard may call exit()
        # Only if this very module, or a package it is in, is what Python did not find.
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and not is_file and f"{place}.".startswith(f"{missing}."):
            why = f"there is no module {missing!r}, in {Path.cwd()} or where Python looks"
            raise refusal(f"{why}; give {FORMS}") from None
        where = _failing_line(error) or (path if is_file else place)
        raise refusal(f"importing it failed with {_said(error)} ({where})") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        value = f"{attribute!r} is a value of type {type(function).__name__}, not callable"
        why = value if hasattr(module, attribute) else f"there is no {attribute!r} in {place}"
        raise refusal(f"{why}; callable there: {_callables(module)}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins have none
        return function
    try:
        signature.bind(*kind.called_with)
    except TypeError as error:
        called = ", ".join(kind.called_with)
        raise refusal(f"takes {signature}, but is called with ({called}): {error}") from None
    return function


def _import_file(path: Path) -> ModuleType:
    """The module in a file, under a name that no other module has."""
    module_name = f"user_function_{hashlib.sha1(os.fsencode(path)).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _failing_line(error: BaseException) -> str:
    """`file:line` of the user's own code at which an import failed."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    machinery = ("<frozen importlib", importlib.__file__, __file__)
    frames = traceback.extract_tb(error.__traceback__)
    frames = [f for f in frames if not f.filename.startswith(machinery)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _callables(module: ModuleType) -> str:
    """The public callables that a module defines; where it defines none, those it imports."""
    public = {n: v for n, v in vars(module).items() if callable(v) and not n.startswith("_")}
    own = [n for n, v in public.items() if getattr(v, "__module__", None) == module.__name__]
    names = own or list(public)
    return ", ".join(names[:SHOWN_NAMES]) + (" …" if len(names) > SHOWN_NAMES else "") or "nothing"


# Calling it.


@dataclass
class _Call:
    """How a call went: still running, failed with `error`, or done with `value`."""

    running: bool = True
    value: object = None
    error: BaseException | None = None


@dataclass
class Batch:
    """What a function is called with, lists of one length, and what a message shows of a row."""

    arguments: tuple[list, ...]
    shown: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.arguments[0])

    def row(self, i: int) -> "Batch":
        shown = {label: [texts[i]] for label, texts in self.shown.items()}
        return Batch(tuple([column[i]] for column in self.arguments), shown)

    def show(self, i: int) -> str:
        """Row i, for a message."""
        texts = self.shown.items()
        return "\n".join(f"  {label + ':':<9} {_short(column[i])}" for label, column in texts)


def call(
    function: Callable,
    name: str,
    prompts: list[str],
    responses: list[str],
    rows: list[dict],
    timeout: float,
) -> list[float]:
    """The scores of a batch by one call of `function`: len(responses) finite floats.

    name, timeout: see `returned`. Raises FunctionError.
    """
    batch = Batch((prompts, responses, rows), {"prompt": prompts, "response": responses})
    return checked(returned(function, REWARD, name, batch, timeout), name, batch)


def returned(function: Callable, kind: Kind, name: str, batch: Batch, timeout: float) -> object:
    """What one call of `function` with the batch returns.

    name is what the kind's flag says, for messages. timeout in seconds, 0: none. The function gets
    copies, and runs in a daemon thread: one that is stuck is left behind, and the caller, who ends
    the process, does not wait for it. (In that thread signal.alarm does not work.)

    Raises FunctionError, and only then calls the function again, row by row, to name the row that
    is to blame.
    """
    went = _within(timeout, function, batch)
    if went.running:
        raise FunctionError(_too_slow(function, kind, name, batch, timeout))
    if went.error is not None:
        message = _raised(function, kind, name, batch, timeout, went.error)
        raise FunctionError(message) from went.error
    return went.value


def _within(seconds: float, function: Callable, batch: Batch) -> _Call:
    """Call `function` in a thread of its own and wait at most so many seconds, 0: for ever."""
    went = _Call()
    # Which GPU is current and whether gradients are kept belong to a thread, not to the process.
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    gradients = torch.is_grad_enabled()
    # Copies: a function that changes its arguments must not change the data of later steps.
    # Of each row by itself, as samples of one prompt share theirs.
    arguments = [[copy.deepcopy(row) for row in column] for column in batch.arguments]

    def work() -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)
            with torch.set_grad_enabled(gradients):
                went.value = function(*arguments)
        except BaseException as error:  # exit() too: a thread would swallow it
            went.error = error
        went.running = False

    if seconds:
        # Code that holds Python's lock (a regular expression that backtracks for ever) lets no
        # other thread run, this one included. Then a thread outside Python prints where all stand
        # and ends the process.
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds or None)
    if seconds:
        faulthandler.cancel_dump_traceback_later()
    return went


# What went wrong.


def _raised(function: Callable, kind: Kind, name: str, batch: Batch, timeout: float, error) -> str:
    """The message for an exception, with the first row that raises the same alone, if one does:
    in kind and place, as a function may fail on any single row for a reason of its own (a standard
    deviation over the batch)."""
    fault = type(error), _place(function, error)

    def the_same(alone: _Call) -> bool:
        return alone.error is not None and fault == (
            type(alone.error),
            _place(function, alone.error),
        )

    i, alone = _first_row(function, batch, timeout, timeout or math.inf, the_same)
    head, shown = "", ""
    if alone is not None:
        head, shown, error = f" on row {i + 1} of {len(batch)}", batch.show(i), alone.error
    elif i == len(batch):
        shown = f"  no row of the {i} fails like this alone, only the batch of them does"
    else:
        shown = f"  which row it is was not found: the search was given up at row {i + 1}"
    place = _place(function, error)
    lines = [f"{kind.noun} {name!r} failed{head}: {_said(error)}"]
    lines += [f"  at {place}"] if place else []
    advice = f"mend the function or its data, or set another {kind.flag}"
    return "\n".join([*lines, shown, advice])


def _too_slow(function: Callable, kind: Kind, name: str, batch: Batch, timeout: float) -> str:
    """The message for a timeout: with the first row that alone takes more than its share."""
    share = max(timeout / max(len(batch), 1), SLOW_ROW)
    i, alone = _first_row(function, batch, timeout, share, lambda alone: alone.running)
    if alone is not None:
        shown = f"row {i + 1} alone takes longer than {share:g} s\n{batch.show(i)}"
    elif i == len(batch):
        shown = f"no single row is slow: none takes longer than {share:g} s alone"
    else:
        shown = f"no slow row was found: the search was given up at row {i + 1}"
    return (
        f"{kind.noun} {name!r} took longer than {timeout:g} s for {len(batch)} {kind.row}s\n"
        f"  {shown}\nmake the function faster, or raise {kind.flag}_timeout (0: no limit)"
    )


def _first_row(
    function: Callable, batch: Batch, timeout: float, limit: float, blamed: Callable
) -> tuple[int, _Call | None]:
    """The first row whose call alone, of at most `limit` seconds, is blamed: (its index, the call).

    (len(batch), None) where no row is, (i, None) where the time for the search ended at row i.
    """
    stop = time.monotonic() + 2 * timeout + SEARCH_EXTRA
    for i in range(len(batch)):
        left = stop - time.monotonic()
        if left <= 0:
            return i, None
        alone = _within(min(limit, left), function, batch.row(i))
        if alone.running and left < limit:
            return i, None
        if blamed(alone):
            return i, alone
    return len(batch), None


def _place(function: Callable, error: BaseException) -> str:
    """`file:line in name: source` of the last line in the function's own file that was running."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is `work`
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    own = [f for f in frames if code and f.filename == code.co_filename]
    for frame in reversed(own or frames):
        return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}".rstrip(": ")
    return ""  # a builtin, or it could not be called at all


def _said(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text[:1000]}" if text else type(error).__name__


def _short(text: str) -> str:
    """repr of a text, of the beginning where it is long."""
    if len(text) <= SHOWN_TEXT:
        return repr(text)
    return f"{text[:SHOWN_TEXT]!r}… ({len(text)} characters)"


def checked(result: object, name: str, batch: Batch) -> list[float]:
    """What a function returned as floats; FunctionError where it is no score a response."""
    advice = f"return a list of {len(batch)} finite numbers, one a response"
    problem = ""
    if isinstance(result, (torch.Tensor, np.ndarray)):
        if result.ndim != 1:
            problem = f"an array of shape {tuple(result.shape)}"
        result = result.tolist()
    elif not isinstance(result, (list, tuple)):
        problem = f"{_short(str(result))} of type {type(result).__name__}"
    if not problem and len(result) != len(batch):
        problem = f"{len(result)} scores for {len(batch)} responses"
    if problem:
        raise FunctionError(f"reward function {name!r} returned {problem}; {advice}")
    scores = []
    for i, value in enumerate(result):
        try:
            scores.append(_score(value))
        except ValueError as problem:
            raise FunctionError(
                f"reward function {name!r} returned {problem} for row {i + 1} of {len(batch)}\n"
                f"{batch.show(i)}\n{advice}"
            ) from None
    return scores


def _score(value: object) -> float:
    """A value as a float; ValueError that says what it is where it is no finite number."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{_short(str(value))} of type {type(value).__name__}")
    try:
        score = float(value)
    except OverflowError:
        raise ValueError("an integer beyond the range of fp32") from None
    if not math.isfinite(score):
        raise ValueError(f"{score}, not a finite number,")
    if abs(score) > torch.finfo(torch.float32).max:  # scores are kept in fp32
        raise ValueError(f"{score}, beyond the range of fp32,")
    return score
