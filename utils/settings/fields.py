"""What a setting is: a dataclass field that says its meaning, its bounds and what a resume may do.

One walk over the fields finds every value that cannot work, each with the flag that mends it.
"""

import dataclasses
import functools
import operator
import reprlib
import typing
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal, InvalidOperation

from utils.settings.secrets import hidden

BOUNDS = {
    "above": operator.gt,
    "at_least": operator.ge,
    "below": operator.lt,
    "at_most": operator.le,
}
LARGEST = 2**31  # the bound of whole numbers that give none: a larger size is a typing error
FP32_LARGEST, FP32_SMALLEST = 3.4028234e38, 1.1754944e-38
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
SHORT = reprlib.Repr()  # a few lines of YAML can stand for gigabytes
SHORT.maxlevel, SHORT.maxstring = 2, 80


class ConfigError(Exception):
    """Every problem of a command line, one a line."""


def setting(
    default,
    help: str,
    choices: tuple = (),
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    needed: bool = False,
    check: Callable | None = None,
    only_with: str = "",
    formerly: str = "",
    on_resume: str = "learned",
):
    """A dataclass field with its help text.

    choices: the only values it takes. above, at_least (0 by default), below, at_most: bounds of a
    number, or of each number of a list. needed: it must not be empty. check(value): raises
    ValueError, with the reason, where a value that is not empty cannot work. only_with: "other" or
    "other=value", without which the setting would be ignored. formerly: a name that older files and
    command lines know it by. on_resume: what a resumed run does
    with another value than its checkpoint's: refuse it, since it changes what is "learned"; go on
    and say that the results differ by "rounding"; or take it ("free").
    """
    metadata = {name: value for name, value in locals().items() if name != "default"}
    if type(default) in (int, float) and not choices:
        if above is None and at_least is None:
            metadata["at_least"] = 0
        if type(default) is int and below is None and at_most is None:
            metadata["below"] = LARGEST
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# Shorter to read where many settings stand below each other.
free = functools.partial(setting, on_resume="free")
rounding = functools.partial(setting, on_resume="rounding")


class Settings:
    """Base class of the dataclasses of settings."""

    # The sections of a --config file that hold settings of this class, the weakest first.
    sections: typing.ClassVar[tuple[str, ...]] = ()

    def problems(self, world_size: int) -> list[str]:
        """What cannot work, one sentence each, with the flag that mends it."""
        of_fields = [p for f in dataclasses.fields(self) for p in self._problems_of(f)]
        return of_fields + list(self.contradictions(world_size))

    def contradictions(self, world_size: int) -> Iterable[str]:
        """What several settings together, or the number of ranks, make impossible."""
        return ()

    @classmethod
    def completed(cls, values: dict) -> dict:
        """The given `values` with those that follow from them."""
        return values

    def pick(self, record: type, **more):
        """A dataclass `record` of `more` and of those settings here that it has fields of."""
        names = {field.name for field in dataclasses.fields(record)} - more.keys()
        own = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return record(**own, **more)

    def on_resume(self) -> dict[str, str]:
        """{setting: what a resumed run does with another value}, see setting()."""
        return {
            name: f.metadata["on_resume"]
            for f in dataclasses.fields(self)
            for name in (f.name, f.metadata["formerly"])
            if name
        }

    @classmethod
    def defaults(cls) -> dict:
        return {f.name: default_of(f) for f in dataclasses.fields(cls)}

    def _problems_of(self, f: dataclasses.Field) -> Iterator[str]:
        name, value, limits = f.name, getattr(self, f.name), f.metadata
        values = value if isinstance(value, list) else [value]
        if limits["needed"] and not any(str(one).strip() for one in values):
            yield f"{name} is empty; set --{name} ({limits['help']})"
        broken = {
            word: limits[word]
            for word, holds in BOUNDS.items()
            if limits[word] is not None and not all(holds(one, limits[word]) for one in values)
        }
        if broken:
            bounds = " and ".join(f"{word.replace('_', ' ')} {n}" for word, n in broken.items())
            yield f"{name}={value} must be {bounds}; set --{name} ({limits['help']})"
        if limits["check"] and value:
            try:
                limits["check"](value)
            except ValueError as error:
                yield f"{name}={value!r}: {error}; set --{name}"
        other, _, wanted = limits["only_with"].partition("=")
        if other and value != default_of(f):
            now = getattr(self, other)
            if now != wanted if wanted else now == default_of(self.__dataclass_fields__[other]):
                yield (
                    f"{name}={value} is read only with --{other} {wanted or '…'} (now {now!r}); "
                    f"set that, or leave out --{name}"
                )


def default_of(f: dataclasses.Field):
    return f.default if f.default is not dataclasses.MISSING else f.default_factory()


def type_of(f: dataclasses.Field) -> tuple[type, bool]:
    """(element type, is it a list) of a field."""
    elements = typing.get_args(f.type)
    return (elements[0], True) if elements else (f.type, False)


def value_of(f: dataclasses.Field, given):
    """The value of setting `f` that a flag's text or a file means; ValueError says why none."""
    kind, many = type_of(f)
    if not many:
        value = convert(given, kind, f.name)
        if f.metadata["choices"] and value not in f.metadata["choices"]:
            shown = ", ".join(str(choice) or "(nothing)" for choice in f.metadata["choices"])
            raise ValueError(f"{f.name}={value} is not one of {shown}")
        return value
    if given == "":
        return []  # a file may say so that there is none; older ones do where one name was taken
    values = [convert(v, kind, f.name) for v in (given if isinstance(given, list) else [given])]
    if kind is str and not all(v.strip() for v in values):
        raise ValueError(f"{f.name}={values} holds an empty name")
    return values


def convert(value, kind: type, name: str):
    """`value`, a flag's text or a file's value, as bool, str, int or float; else ValueError."""
    shown = SHORT.repr(value)
    wrong = ValueError(f"{name}={shown} is not {kind.__name__}")
    if kind is str:
        if isinstance(value, (bool, int, float)):
            raise ValueError(f"{wrong}; put it in quotes")
        if not isinstance(value, str):
            raise wrong
        if "\0" in value or value.encode("utf-8", "replace").decode("utf-8") != value:
            raise ValueError(f"{name}={shown} holds what is no text: a NUL, or no UTF-8")
        if hidden(value) != value:
            raise ValueError(
                f"{name} holds a token, key or password, which config.yaml and logs would keep; "
                "give it in the environment (HF_TOKEN)"
            )
        return value
    if kind is bool:
        value = BOOLEANS.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong
    try:
        # YAML 1.1 writes 1e-5 as text, so text that is a number counts as one.
        number = Decimal(value)
    except InvalidOperation:
        raise wrong from None
    if not number.is_finite():
        raise ValueError(f"{name}={shown} is not a finite number")
    if kind is int:
        if abs(number) >= 2**64 or number != number.to_integral_value():
            raise wrong
        return int(number)
    if abs(number) > FP32_LARGEST or 0 < abs(number) < FP32_SMALLEST:
        raise ValueError(f"{name}={shown} is beyond the range of fp32; set --{name}")
    return float(number)


def check_url(url: str) -> None:
    if not url.startswith(("http://", "https://")):
        raise ValueError("no address that begins with http:// or https://")
