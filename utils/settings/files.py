"""A YAML or JSON file of settings → one flat dict, as it is written and not as YAML 1.1 guesses."""

import os
import re
from pathlib import Path

import yaml

from utils import strict_json


class ConfigError(Exception):
    """Every problem of a command line, one a line."""


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


def read(path: str) -> dict:
    """The settings in a file; ConfigError that names it where it holds something else."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--config {path!r}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path!r}: not UTF-8 at byte {error.start}") from None
    try:
        if os.path.splitext(path)[1].lower() == ".json":
            values = strict_json.loads(text)
        else:
            values = yaml.load(text, _Loader)
    except RecursionError:
        raise ConfigError(f"--config {path}: nested too deeply") from None
    except (ValueError, TypeError, yaml.YAMLError) as error:
        # PyYAML raises TypeError for what cannot be a name, such as a list.
        raise ConfigError(f"--config {path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"--config {path}: expected `setting: value` lines, found a {type(values).__name__}"
        )
    return values
