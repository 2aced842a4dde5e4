"""A YAML or JSON file of settings, read as it is written and not as YAML 1.1 guesses.

It holds `setting: value` lines, or sections of them: one file for the whole pipeline, of which each
program reads what stands outside the sections, then `all`, then its own section.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from utils import strict_json

# Programs read `all` and the section of their step; `run` is read by run_all.sh itself, `scratch`
# is the shape of a model from random weights. run_all.sh lets programs read more on top: `later_…`
# in rounds after the first, and of the sections in `methods` those of the method that it runs.
SECTIONS = tuple(
    "all run scratch sft collect reward ppo preference later_ppo later_preference methods".split()
)
METHODS = "methods."


class _Loader(yaml.SafeLoader):
    """Numbers, true, false and null are what they look like; all else is text.

    YAML 1.1 would read `no` as false, 010 as 8, 1:30 as 90 and a date as a date; and of a name
    that stands twice it would take the last without a word.
    """

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node, deep=False):
        pairs = [(self.construct_object(key, deep=True), key.start_mark) for key, _ in node.value]
        seen = set()
        for name, mark in pairs:
            if isinstance(name, (str, int, float)) and name in seen:
                raise yaml.YAMLError(f"{name!r} stands there twice, again in line {mark.line + 1}")
            seen.add(name if isinstance(name, (str, int, float)) else None)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|false|True|False|TRUE|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


def layers(word: str, *sections: str) -> list[tuple[str, dict]]:
    """What `--config word` says to a program that reads these sections: (place, settings), weakest
    first. What stands in no section is for programs that read `all`, or no section.

    `FILE:SECTION:SECTION` reads more sections on top. ValueError where there is no such file.
    """
    path, more = word, []
    while ":" in path[1:] and is_section(last := path.rpartition(":")[2]):
        path, more = path.rpartition(":")[0], [last, *more]
    values = read(path)
    known = {name: v for name, v in values.items() if name in SECTIONS and isinstance(v, dict)}
    outside = {name: v for name, v in values.items() if name not in known}
    outside = {name: v for name, v in outside.items() if name not in SECTIONS or v is not None}
    for name, v in known.pop("methods", {}).items():
        if not isinstance(v, dict):
            raise ValueError(f"--config {path!r}: {METHODS}{name} holds no settings but {v!r}")
        known[METHODS + str(name)] = v
    found = [(path, outside)] if not sections or "all" in sections else []
    return found + [(f"{path}, {n}", known[n]) for n in (*sections, *more) if n in known]


def with_sections(path: str, names: Sequence[str]) -> str:
    """The word of --config for a file of which these sections are read on top."""
    return ":".join([path, *(n if n in SECTIONS else METHODS + n for n in names)])


def is_section(name: str) -> bool:
    return name in SECTIONS or name.startswith(METHODS)


def methods_in(path: str) -> set[str]:
    """The names in section `methods` of a file."""
    return set(map(str, read(path).get("methods") or ()))


def read(path: str) -> dict:
    """What a file holds; ValueError that names it where that is no mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix.lower() == ".json":
            values = strict_json.loads(text)
        else:
            values = yaml.load(text, _Loader)
    except OSError as error:
        raise ValueError(f"--config {path!r}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path!r}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"--config {path!r}: nested too deeply") from None
    except (ValueError, TypeError, yaml.YAMLError) as error:
        # PyYAML raises TypeError for what cannot be a name, such as a list.
        raise ValueError(f"--config {path!r}: {error}") from None
    if values is not None and not isinstance(values, dict):
        kind = type(values).__name__
        raise ValueError(f"--config {path!r}: expected `setting: value` lines, found a {kind}")
    return values or {}
