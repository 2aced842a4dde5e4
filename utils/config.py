"""One dataclass → flags, --help, YAML or JSON, and every problem in one message.

Precedence: flags, then `--config FILE`, then the defaults in the dataclass. The effective config
is saved as `config.yaml`; `--config config.yaml` repeats the run.
"""

import argparse
import dataclasses
import json
import os
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml


class ConfigError(Exception):
    """Every problem of a command line, one a line."""


def setting(default, help: str, choices: tuple = ()):
    """A dataclass field with its help text; `choices` limits the values."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    """What means the same in every step."""

    output_dir: str = setting("", "folder for weights, metrics.jsonl and config.yaml")
    model_name_or_path: str = setting("", "local folder or hub name of the model to start from")
    trust_remote_code: bool = setting(False, "run Python code that comes with a model (a risk)")
    attn_implementation: str = setting("sdpa", "transformers' attention: sdpa, eager, …")
    seed: int = setting(42, "seed of everything random")

    data_schema: str = setting("auto", "force the row schema instead of reading the columns")
    data_weights: list[float] = setting([], "how often each data set's rows come in one epoch")
    data_split: str = setting("", "share one data set among the three steps, e.g. 2,4,4")
    eval_fraction: float = setting(0.05, "rows held out where a data set has no test split")
    max_eval_rows: int = setting(512, "at most so many held-out rows are used")
    on_bad_rows: str = setting(
        "error",
        "error: name them all and stop; skip: count and write them",
        choices=("error", "skip"),
    )

    max_steps: int = setting(0, "passes of the main loop; 0: as many as the epochs give")
    global_batch_size: int = setting(64, "sequences an optimizer step, over all ranks")
    micro_batch_size: int = setting(8, "sequences a forward pass, one rank")
    learning_rate: float = setting(1e-5, "peak learning rate")
    lr_schedule: str = setting(
        "cosine", "shape after warmup", choices=("cosine", "linear", "constant")
    )
    warmup_ratio: float = setting(0.03, "share of the steps spent warming up")
    weight_decay: float = setting(0.0, "AdamW weight decay (matrices only)")
    adam_beta2: float = setting(0.95, "AdamW second-moment decay")
    gradient_clipping: float = setting(1.0, "gradient norm limit; 0: none")
    gradient_checkpointing: bool = setting(False, "recompute activations to save memory")

    dtype: str = setting(
        "auto",
        "weights and matmuls; auto: bf16 on GPUs that have it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    zero_stage: int = setting(0, "DeepSpeed ZeRO stage", choices=(0, 1, 2, 3))
    offload: str = setting(
        "none",
        "to CPU memory: optimizer states, or also weights (ZeRO-3)",
        choices=("none", "optimizer", "all"),
    )

    rollout_gather: str = setting(
        "rollout",
        "ZeRO-3 weights while sampling: whole for the rollout, or layer by layer (slow, for models "
        "that do not fit one GPU)",
        choices=("rollout", "layer"),
    )

    log_every: int = setting(10, "steps between console lines")
    eval_every: int = setting(0, "steps between evaluations; 0: only before and after")
    save_every: int = setting(0, "steps between saves of the weights; 0: only at the end")
    tensorboard: bool = setting(True, "write TensorBoard files under OUTPUT/tensorboard")
    timeout_minutes: float = setting(30.0, "a collective that waits longer ends the run")

    def problems(self, world_size: int) -> list[str]:
        """What cannot work, one sentence each, with the flag that mends it."""
        found = []
        if not self.output_dir:
            found.append("output_dir is empty; say where to write with --output_dir FOLDER")
        if not self.model_name_or_path:
            found.append(
                "model_name_or_path is empty; set --model_name_or_path to a folder or hub name"
            )
        ranks_micro = self.micro_batch_size * world_size
        if self.micro_batch_size < 1 or self.global_batch_size < 1:
            found.append(
                f"global_batch_size={self.global_batch_size} and micro_batch_size="
                f"{self.micro_batch_size} must be at least 1"
            )
        elif self.global_batch_size % ranks_micro:
            nearest = -(-self.global_batch_size // ranks_micro) * ranks_micro
            found.append(
                f"global_batch_size={self.global_batch_size} is not divisible by micro_batch_size "
                f"× ranks = {self.micro_batch_size} × {world_size} = {ranks_micro}; set "
                f"--global_batch_size to a multiple, e.g. {nearest}, or lower --micro_batch_size"
            )
        if self.offload == "all" and self.zero_stage != 3:
            found.append(f"offload=all needs ZeRO-3, zero_stage={self.zero_stage}; --zero_stage 3")
        if self.offload == "optimizer" and self.zero_stage == 0:
            found.append("offload=optimizer needs ZeRO; set --zero_stage 1, 2 or 3")
        if self.dtype == "fp16" and os.environ.get("DS_ACCELERATOR") == "cpu":
            found.append("dtype=fp16 has no CPU kernels worth using; --dtype bf16 or fp32")
        if not 0 < self.eval_fraction < 1:
            found.append(f"eval_fraction={self.eval_fraction} must lie between 0 and 1")
        if not 0 <= self.adam_beta2 < 1:
            found.append(f"adam_beta2={self.adam_beta2} must lie in [0, 1); set --adam_beta2")
        if not 0 <= self.warmup_ratio < 1:
            found.append(f"warmup_ratio={self.warmup_ratio} must lie in [0, 1)")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed={self.seed} must lie in [0, 2^63); set --seed")
        for name in ("learning_rate", "log_every", "max_eval_rows", "timeout_minutes"):
            if getattr(self, name) <= 0:
                found.append(f"{name}={getattr(self, name)} must be above 0; set --{name}")
        for name in ("max_steps", "eval_every", "save_every", "gradient_clipping", "weight_decay"):
            if getattr(self, name) < 0:
                found.append(f"{name}={getattr(self, name)} must not be negative; set --{name}")
        return found

    def accumulation(self, world_size: int) -> int:
        return self.global_batch_size // (self.micro_batch_size * world_size)


def _kind(annotation) -> tuple[type, bool]:
    """(element type, is it a list) of a field's annotation."""
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True
    if isinstance(annotation, types.UnionType):
        raise TypeError(f"settings have one type, not {annotation}")
    return annotation, False


def _convert(value, kind: type, name: str):
    """`value` (a flag's text or a YAML value) as `kind`, or ValueError saying what it was."""
    shown = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    wrong = ValueError(f"{name}={shown} is not {kind.__name__}")
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false", "1", "0", "yes", "no"):
            return value.lower() in ("true", "1", "yes")
        raise wrong
    if kind is str:
        if isinstance(value, (dict, list)) or value is None:
            raise wrong
        return str(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong
    if kind is int and not isinstance(value, float):
        try:
            whole = int(value)
        except ValueError:
            pass  # perhaps 1e6
        else:
            if abs(whole) >= 2**64:
                raise wrong
            return whole
    try:
        # YAML 1.1 reads 1e-5 as text, so text that is a number counts as one.
        number = float(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"{name}={value!r} is not a finite number")
    if kind is int:
        try:
            return _whole(number)
        except ValueError:
            raise wrong from None
    return number


def _whole(number: float) -> int:
    if not number.is_integer():
        raise ValueError(f"{number} is not whole")
    return int(number)


def help_text(config_class, prog: str, description: str) -> str:
    """What --help prints: every setting with its type, choices and default."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="YAML or JSON file with any of the settings below")
    parser.add_argument(
        "--check_config", help="stop once the settings are checked", action="store_true"
    )
    hints = typing.get_type_hints(config_class)
    for f in dataclasses.fields(config_class):
        kind, many = _kind(hints[f.name])
        default = f.default_factory() if many else f.default
        shown = "" if default in ("", []) else f" (default {default})"
        shape = "|".join(map(str, f.metadata["choices"])) or kind.__name__
        parser.add_argument(
            f"--{f.name}",
            nargs="*" if many else None,
            metavar=shape,
            help=f.metadata["help"].replace("%", "%%") + shown,
        )
    return parser.format_help()


def _split_flags(argv: list[str], problems: list[str]) -> dict[str, list[str]]:
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


def _flag_value(name: str, words: list[str], kind: type, many: bool):
    """The words after a flag as one value (or a list), ValueError where they do not fit."""
    if many:
        return words
    if kind is bool and not words:
        return True
    if len(words) != 1:
        what = "has no value" if not words else f"has {len(words)} values: {' '.join(words)}"
        raise ValueError(f"--{name} {what}; it takes one")
    return words[0]


def _read_config_file(path: str) -> dict:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--config {path!r}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path!r}: not UTF-8 at byte {error.start}") from None
    try:
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"--config {path}: expected `setting: value` lines, found a {type(values).__name__}"
        )
    return values


def build(config_class, argv: list[str], world_size: int):
    """The config that `argv` means; ConfigError with all its problems."""
    problems: list[str] = []
    flags = _split_flags(argv, problems)
    flags.pop("local_rank", None)  # the deepspeed launcher's
    path = flags.pop("config", None)
    from_file = {}
    if path is not None:
        try:
            from_file = _read_config_file(_flag_value("config", path, str, many=False))
        except (ConfigError, ValueError) as error:
            problems.append(str(error))
    hints = typing.get_type_hints(config_class)
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    problems += [f"unknown flag --{name}" for name in flags if name not in fields]
    problems += [f"unknown setting {key!r} in {path[0]}" for key in from_file if key not in fields]
    values = {}
    for source, is_flag in ((from_file, False), (flags, True)):
        for name, given in source.items():
            if name not in fields:
                continue
            kind, many = _kind(hints[name])
            try:
                value = _flag_value(name, given, kind, many) if is_flag else given
                if many:
                    words = value if isinstance(value, list) else [value]
                    values[name] = [_convert(v, kind, name) for v in words]
                else:
                    values[name] = _convert(value, kind, name)
                choices = fields[name].metadata["choices"]
                if choices and values[name] not in choices:
                    shown = ", ".join(str(c) or "(nothing)" for c in choices)
                    raise ValueError(f"{name}={values.pop(name)} is not one of {shown}")
            except ValueError as error:
                problems.append(str(error))
    config = config_class(**values)
    problems += config.problems(world_size)
    if problems:
        raise ConfigError("\n".join(f"  - {p}" for p in problems))
    return config


def parse(config_class, description: str):
    """`build` from the command line; a run that cannot work ends here with exit code 2.

    Runs before anything is loaded, so that a wrong flag costs a second and not a night.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(config_class, Path(sys.argv[0]).name, description))
        raise SystemExit(0)
    argv = [word for word in sys.argv[1:] if word != "--check_config"]
    try:
        config = build(config_class, argv, world_size)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(
                f"{Path(sys.argv[0]).name}: these settings cannot work:\n{error}", file=sys.stderr
            )
        raise SystemExit(2) from None
    if len(argv) < len(sys.argv) - 1:
        raise SystemExit(0)  # --check_config: the settings can work, and that was the question
    return config


def save(config, folder: str | Path, world_size: int, main: bool = True) -> None:
    """Write `config.yaml` into `folder` (on the main rank); `--config` of it repeats the run."""
    if not main:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    header = f"# {type(config).__name__}, run on {world_size} rank{'s' if world_size > 1 else ''}\n"
    (folder / "config.yaml").write_text(header + text, encoding="utf-8")
