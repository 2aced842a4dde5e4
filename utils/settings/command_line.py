"""Flags, then `--config FILE`, then the defaults → one dataclass; every problem in one message.

The effective settings are saved as `config.yaml`; `--config config.yaml` repeats the run.
"""

import dataclasses
import difflib
import os
import sys
import textwrap
from pathlib import Path

import yaml

from utils import whole_files
from utils.settings import files
from utils.settings.fields import ConfigError, default_of, type_of, value_of
from utils.settings.secrets import hidden


def help_text(config_class, prog: str, description: str) -> str:
    """What --help prints: every setting with its type, choices and default."""
    entries = [
        ("--config FILE", "YAML or JSON file with any of the settings below"),
        ("--check_config", "stop once the settings are checked"),
    ]
    for f in dataclasses.fields(config_class):
        kind, many = type_of(f)
        shape = "|".join(map(str, f.metadata["choices"])) or kind.__name__
        default = default_of(f)
        shown = "" if default in ("", []) else f" (default {default})"
        entries.append((f"--{f.name} {shape}{' …' * many}", f.metadata["help"] + shown))
    lines = [f"usage: {prog} [--config FILE] [--SETTING VALUE …]", "", description.strip(), ""]
    for name, text in entries:
        lines += [f"  {name}", textwrap.indent(textwrap.fill(text, 72), " " * 24)]
    return "\n".join(lines)


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


def only_word(name: str, words: list[str], kind: type) -> str:
    """The one value of a flag; ValueError where there are more or none."""
    if kind is bool and not words:
        return "true"
    if len(words) != 1:
        what = "has no value" if not words else f"has {len(words)} values: {' '.join(words)}"
        raise ValueError(f"--{name} {what}; it takes one")
    return words[0]


def build(config_class, argv: list[str], world_size: int):
    """The config that `argv` means; ConfigError with all its problems."""
    problems: list[str] = []
    flags = split_flags(argv, problems)
    flags.pop("local_rank", None)  # the deepspeed launcher's
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    fields |= {f.metadata["formerly"]: f for f in fields.values() if f.metadata["formerly"]}
    values = {}

    def take(given: dict, place: str = "") -> None:
        """The settings of a place in a file, or of the command line."""
        for name, value in given.items():
            if name not in fields:
                unknown = f"setting {name!r} in {place}" if place else f"flag --{name}"
                near = difflib.get_close_matches(str(name), fields, n=1)
                meant = f"; did you mean {'' if place else '--'}{near[0]}?" if near else ""
                problems.append(f"unknown {unknown}{meant}")
                continue
            kind, many = type_of(fields[name])
            try:
                value = value if place or many else only_word(name, value, kind)
                values[fields[name].name] = value_of(fields[name], value)
            except ValueError as error:
                problems.append(str(error))

    paths = flags.pop("config", None)
    if paths == []:
        problems.append("--config has no value; it takes a file")
    for path in paths or []:
        try:
            for place, settings in files.layers(path, *config_class.sections):
                take(settings, place)
        except ValueError as error:
            problems.append(str(error))
    take(flags)
    # A saved `resume` gives way to --overwrite and the other way round: flags win.
    if values.get("overwrite") and values.get("resume", "no") != "no":
        said = flags.keys() & {"overwrite", "resume"}
        if said == {"overwrite"}:
            anyway = "resume_anyway" in flags and values["resume_anyway"]
            values |= {"resume": "no", "resume_anyway": anyway}
        elif said == {"resume"}:
            values["overwrite"] = False
    config = config_class(**config_class.completed(values))
    problems += config.problems(world_size)
    if problems:
        raise ConfigError(hidden("\n".join(f"  - {p}" for p in problems)))
    return config


def parse(config_class, description: str):
    """`build` from the command line; a run that cannot work ends here with exit code 2.

    Runs before anything is loaded, so that a wrong flag costs a second and not a night.
    """
    ranks = os.environ.get("WORLD_SIZE", "1")
    if not (ranks.isdecimal() and int(ranks)):
        raise SystemExit(f"WORLD_SIZE={ranks!r} of the environment is no number of ranks")
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(config_class, Path(sys.argv[0]).name, description))
        raise SystemExit(0)
    argv = [word for word in sys.argv[1:] if word != "--check_config"]
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        config = build(config_class, argv, int(ranks))
    except ConfigError as error:
        if is_main:
            # With its folder: every step has a main.py, and run_all.sh asks them all at once.
            program = "/".join(Path(sys.argv[0]).absolute().parts[-2:])
            print(f"{program}: these settings cannot work:\n{error}", file=sys.stderr)
        raise SystemExit(2) from None
    if len(argv) < len(sys.argv) - 1:
        raise SystemExit(0)  # --check_config: the settings can work, and that was the question
    if getattr(config, "trust_remote_code", False) and is_main:
        print(
            "warning: trust_remote_code runs the Python files that come with a model, and they may "
            "do all that you may; read them first",
            file=sys.stderr,
            flush=True,
        )
    return config


def text_of(config, world_size: int) -> str:
    """All settings as YAML; `--config` of it repeats the run."""
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    return f"# {type(config).__name__}, run on {world_size} rank{'s'[: world_size > 1]}\n{text}"


def save(config, folder: str | Path, world_size: int, name: str = "config.yaml") -> None:
    whole_files.write_text(Path(folder) / name, text_of(config, world_size))
