"""The words of a command line and the values of a file → values of a setting's type."""

import math
import reprlib
import types
import typing
from decimal import Decimal, InvalidOperation

from utils.settings.secrets import hidden

SHORT = reprlib.Repr()  # a few lines of YAML can stand for gigabytes
SHORT.maxlevel = 2
LARGEST = 2**31  # of whole numbers but the seed: a size beyond it is a slip of the finger
FP32_LARGEST, FP32_SMALLEST = 3.4028234e38, 1.1754944e-38


def kind(annotation) -> tuple[type, bool]:
    """(element type, is it a list) of a field's annotation."""
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True
    if isinstance(annotation, types.UnionType):
        raise TypeError(f"settings have one type, not {annotation}")
    return annotation, False


def convert(value, kind: type, name: str):
    """`value` (a flag's text or a file's value) as `kind`, or ValueError saying what it was."""
    if isinstance(value, (dict, list)):
        shown = SHORT.repr(value)
    else:
        huge = isinstance(value, int) and abs(value) >= 10**30
        shown = "a huge number" if huge else repr(value)
    wrong = ValueError(f"{name}={shown} is not {kind.__name__}")
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false", "1", "0", "yes", "no"):
            return value.lower() in ("true", "1", "yes")
        raise wrong
    if kind is str:
        if not isinstance(value, str):
            whole = isinstance(value, (dict, list)) or value is None
            raise wrong if whole else ValueError(f"{wrong}; put it in quotes")
        if "\0" in value or not _is_utf8(value):
            raise ValueError(f"{name}={shown} holds what is no text: a NUL, or no UTF-8")
        if hidden(value) != value:
            raise ValueError(
                f"{name} holds a token, key or password, which config.yaml and logs would keep; "
                "give it in the environment (HF_TOKEN)"
            )
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong
    try:
        # YAML 1.1 writes 1e-5 as text, so text that is a number counts as one.
        number = Decimal(value)
    except InvalidOperation:
        raise wrong from None
    if not number.is_finite():
        raise ValueError(f"{name}={value!r} is not a finite number")
    if kind is int:
        if abs(number) >= 2**64 or number != number.to_integral_value():
            raise wrong
        if name != "seed" and abs(number) >= LARGEST:
            raise ValueError(f"{name}={shown} is beyond {LARGEST}; set --{name} to less")
        return int(number)
    if abs(number) > FP32_LARGEST or 0 < abs(number) < FP32_SMALLEST:
        raise ValueError(f"{name}={shown} is beyond the range of fp32; set --{name}")
    return float(number)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def split_flags(argv: list[str], problems: list[str]) -> dict[str, list[str]]:
    """`--name value …` and `--name=value` → {name: values}; the last of a repeated flag counts.

    Everything up to the next word that begins with `--` is a value, so -1e-5 is one too. (argparse
    would take it for a flag, and ends the run at the first of several problems.)
    """
    flags: dict[str, list[str]] = {}
    values = None
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = flags[name] = [value] if equals else []
        elif values is None:
            problems.append(f"{word!r} stands before any flag")
        else:
            values.append(word)
    return flags


def flag_value(name: str, words: list[str], kind: type, many: bool):
    """The words after a flag as one value (or a list), ValueError where they do not fit."""
    if many:
        return words
    if kind is bool and not words:
        return True
    if len(words) != 1:
        what = "has no value" if not words else f"has {len(words)} values: {' '.join(words)}"
        raise ValueError(f"--{name} {what}; it takes one")
    return words[0]


def shares_of(data_split: str) -> list[float]:
    """The three shares of --data_split; empty where it shares nothing. ValueError for others."""
    if not data_split.strip():
        return []
    try:
        shares = [float(share) for share in data_split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(math.isfinite(s) and s >= 0 for s in shares) or not sum(shares):
        raise ValueError(f"data_split={data_split!r}: set --data_split to three shares, as 2,4,4")
    return shares


def columns_of(columns: list[str]) -> dict[str, str]:
    """{our column: its name in the data} of --columns. ValueError for what is no such list."""
    pairs = [pair.partition("=") for words in columns for pair in words.split(",") if pair.strip()]
    found = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    if len(found) < len(pairs) or not all((*found, *found.values())):
        raise ValueError(
            f"columns={columns}: set --columns to pairs, each of our columns once, as "
            "prompt=question,answer=solution"
        )
    return found
