"""One dataclass → flags, --help, YAML or JSON, and every problem in one message.

Precedence: flags, then `--config FILE`, then the defaults in the dataclass. The effective config
is saved as `config.yaml`; `--config config.yaml` repeats the run.
"""

import argparse
import dataclasses
import datetime
import os
import sys
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from utils import whole_files
from utils.settings import files as config_file
from utils.settings import values as config_values
from utils.settings.files import ConfigError
from utils.settings.secrets import hidden


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
    attn_implementation: str = setting("auto", "sdpa, eager, …; auto: transformers' choice")
    seed: int = setting(42, "seed of everything random")
    deterministic: bool = setting(
        False, "GPU kernels that give the same bits each time (slower; a CPU does so anyway)"
    )

    data_schema: str = setting(
        "auto",
        "force the row schema instead of reading the columns; transcript or plain: how texts that "
        "may be a conversation written down (Human: … Assistant: …) are taken; NAME:plain: both",
    )
    columns: list[str] = setting(
        [], "columns that have other names in the data, e.g. prompt=question,answer=solution"
    )
    data_weights: list[float] = setting([], "how often each data set's rows come in one epoch")
    data_split: str = setting("", "share one data set among the three steps, e.g. 2,4,4")
    eval_fraction: float = setting(0.05, "rows held out where a data set has no test split")
    long_prompts: str = setting(
        "cut",
        "a prompt beyond its limit: cut its oldest exchanges, then the left end of its text (BOS, "
        "system turn and headers stay), or drop the row",
        choices=("cut", "drop"),
    )
    date: str = setting(
        "", "the day that a chat template may state, YYYY-MM-DD; empty: the day the run began"
    )
    max_eval_rows: int = setting(512, "at most so many held-out rows are used")
    data_cache: str = setting(
        "", "folder for the tokenised rows of large data sets; else below $HF_HOME"
    )
    max_bad_rows: float = setting(
        0.01,
        "share of the rows that may be unusable: they are left out, counted, and kept in "
        "bad_rows.jsonl; with more the run stops and names them",
    )

    max_steps: int = setting(0, "passes of the main loop; 0: as many as the epochs give")
    global_batch_size: int = setting(64, "sequences an optimizer step, over all ranks")
    micro_batch_size: int = setting(8, "sequences a forward pass, one rank")
    micro_batch_tokens: int = setting(
        0,
        "tokens a forward pass, one rank, padding included: in place of micro_batch_size, so that "
        "short rows go many at a time and long ones few (a longer row goes alone); 0: off",
    )
    packing: str = setting(
        "auto",
        "rows of a micro-batch end to end, without padding and without attention across rows; "
        "auto: where device and model can",
        choices=("auto", "on", "off"),
    )
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
        "weights and matmuls (steps are made on fp32 weights, log-softmax is fp32); auto: bf16 "
        "where the GPU or CPU computes it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    zero_stage: int = setting(0, "DeepSpeed ZeRO stage", choices=(0, 1, 2, 3))
    offload: str = setting(
        "none",
        "to CPU memory: optimizer states, or also weights (ZeRO-3)",
        choices=("none", "optimizer", "all"),
    )

    rollout_gather: str = setting(
        "auto",
        "ZeRO-3 weights while sampling: whole for the rollout, layer by layer (slow, for models "
        "that do not fit one GPU), or by what memory is free",
        choices=("auto", "rollout", "layer"),
    )

    log_every: int = setting(10, "steps between console lines")
    eval_every: int = setting(0, "steps between evaluations; 0: only before and after")
    save_every: int = setting(0, "steps between checkpoints; 0: none by steps")
    save_every_minutes: float = setting(30.0, "minutes between checkpoints; 0: none by the clock")
    save_in_background: str = setting(
        "auto",
        "write a checkpoint from a copy in CPU memory while training goes on; auto: where the copy "
        "takes at most half of the free memory",
        choices=("auto", "on", "off"),
    )
    keep_last: int = setting(2, "checkpoints that stay, the newest ones; 0: all")
    keep_best: str = setting(
        "", "METRIC:min or METRIC:max: a checkpoint whenever it is better than ever, which stays"
    )
    resume: str = setting(
        "no", "auto: go on from OUTPUT's newest whole checkpoint; or the folder of one"
    )
    resume_anyway: bool = setting(False, "go on with settings that change what is learned")
    overwrite: bool = setting(False, "begin anew in a folder that holds a run, which is deleted")
    tensorboard: bool = setting(True, "write TensorBoard files under OUTPUT/tensorboard")
    max_bad_steps: int = setting(
        5,
        "optimizer steps in a row skipped for loss or gradients not finite; one more ends the run",
    )
    timeout_minutes: float = setting(30.0, "a collective that waits longer ends the run")

    # The setting whose data sets data_weights counts.
    weighted: typing.ClassVar[str] = ""

    def problems(self, world_size: int) -> list[str]:
        """What cannot work, one sentence each, with the flag that mends it."""
        found = []
        if not self.output_dir.strip():
            found.append("output_dir is empty; say where to write with --output_dir FOLDER")
        elif problem := folder_problem(self.output_dir):
            found.append(f"output_dir={self.output_dir!r}: {problem}; set --output_dir")
        if self.data_cache and (problem := folder_problem(self.data_cache)):
            found.append(f"data_cache={self.data_cache!r}: {problem}; set --data_cache")
        if not self.model_name_or_path.strip():
            found.append(
                "model_name_or_path is empty; set --model_name_or_path to a folder or hub name"
            )
        # With a budget of tokens a rank's rows need not divide into micro-batches.
        by_tokens = self.micro_batch_tokens > 0
        ranks_micro = (1 if by_tokens else self.micro_batch_size) * world_size
        if self.micro_batch_size < 1 or self.global_batch_size < 1:
            found.append(
                f"global_batch_size={self.global_batch_size} and micro_batch_size="
                f"{self.micro_batch_size} must be at least 1"
            )
        elif by_tokens and self.global_batch_size % world_size:
            found.append(
                f"global_batch_size={self.global_batch_size} is not divisible by ranks="
                f"{world_size}; set --global_batch_size to a multiple"
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
        if not 0 <= self.max_bad_rows <= 1:
            found.append(f"max_bad_rows={self.max_bad_rows} must lie in [0, 1]; it is a share")
        if not 0 <= self.adam_beta2 < 1:
            found.append(f"adam_beta2={self.adam_beta2} must lie in [0, 1); set --adam_beta2")
        if not 0 <= self.warmup_ratio < 1:
            found.append(f"warmup_ratio={self.warmup_ratio} must lie in [0, 1)")
        found += seed_problems(self.seed) + self._problems_of_shares()
        try:
            if self.date:
                datetime.date.fromisoformat(self.date)
        except ValueError:
            found.append(f"date={self.date!r} is no day; set --date to one, as 2026-01-31")
        for name in ("learning_rate", "log_every", "max_eval_rows", "timeout_minutes"):
            if getattr(self, name) <= 0:
                found.append(f"{name}={getattr(self, name)} must be above 0; set --{name}")
        # Adam moves every weight by about the learning rate; a million minutes are two years.
        for name, most in (("learning_rate", 1.0), ("timeout_minutes", 1e6)):
            if getattr(self, name) > most:
                found.append(f"{name}={getattr(self, name)} is above {most}; set --{name} to less")
        for name in (
            "max_steps",
            "eval_every",
            "save_every",
            "micro_batch_tokens",
            "save_every_minutes",
            "keep_last",
            "gradient_clipping",
            "weight_decay",
            "max_bad_steps",
        ):
            if getattr(self, name) < 0:
                found.append(f"{name}={getattr(self, name)} must not be negative; set --{name}")
        return found + self._problems_of_resuming()

    def _problems_of_resuming(self) -> list[str]:
        found = []
        name, _, direction = self.keep_best.rpartition(":")
        if self.keep_best and (not name or direction not in ("min", "max")):
            found.append(
                f"keep_best={self.keep_best!r} is not METRIC:min or METRIC:max, e.g. "
                "--keep_best eval/loss:min"
            )
        if self.resume not in ("no", "auto") and not Path(self.resume).is_dir():
            found.append(f"resume={self.resume!r} is no folder; --resume auto, no or a checkpoint")
        if self.overwrite and self.resume == "auto":
            found.append("overwrite begins anew and resume=auto goes on; give one of them")
        if self.resume_anyway and self.resume == "no":
            found.append("resume_anyway says how to go on; it needs --resume auto or a checkpoint")
        return found

    def _problems_of_shares(self) -> list[str]:
        found, names = [], getattr(self, self.weighted, [])
        if not all(0 < weight <= 1e4 for weight in self.data_weights):
            found.append(f"data_weights={self.data_weights} must lie in (0, 10000]")
        if self.data_weights and names and len(self.data_weights) != len(names):
            found.append(
                f"data_weights={self.data_weights} has {len(self.data_weights)} numbers for "
                f"{len(names)} data sets of --{self.weighted}; give --data_weights one a set"
            )
        for read, given in (
            (config_values.shares_of, self.data_split),
            (config_values.columns_of, self.columns),
        ):
            try:
                read(given)
            except ValueError as error:
                found.append(str(error))
        return found

    def pick(self, record: type, **more):
        """A dataclass whose fields are some of these settings, and `more`, with their values."""
        names = {field.name for field in fields(record)} - more.keys()
        return record(**{name: getattr(self, name) for name in names}, **more)

    def accumulation(self, world_size: int) -> int:
        return self.global_batch_size // (self.micro_batch_size * world_size)


def seed_problems(seed: int) -> list[str]:
    return [] if 0 <= seed < 2**63 else [f"seed={seed} must lie in [0, 2^63); set --seed"]


def folder_problem(path: str) -> str | None:
    """Why nothing can be written into a folder at `path`, be it there yet or not; else None."""
    there = next(
        p for p in (Path(path).absolute(), *Path(path).absolute().parents) if os.path.exists(p)
    )
    if not there.is_dir():
        return f"{there} is no folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written to"
    return None


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
        kind, many = config_values.kind(hints[f.name])
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


def build(config_class, argv: list[str], world_size: int):
    """The config that `argv` means; ConfigError with all its problems."""
    problems: list[str] = []
    flags = config_values.split_flags(argv, problems)
    flags.pop("local_rank", None)  # the deepspeed launcher's
    path = flags.pop("config", None)
    from_file = {}
    if path is not None:
        try:
            from_file = config_file.read(config_values.flag_value("config", path, str, many=False))
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
            kind, many = config_values.kind(hints[name])
            try:
                value = config_values.flag_value(name, given, kind, many) if is_flag else given
                if many:
                    words = value if isinstance(value, list) else [value]
                    values[name] = [config_values.convert(v, kind, name) for v in words]
                    if kind is str and any(not v.strip() for v in values[name]):
                        raise ValueError(f"{name}={values.pop(name)} holds an empty name")
                else:
                    values[name] = config_values.convert(value, kind, name)
                choices = fields[name].metadata["choices"]
                if choices and values[name] not in choices:
                    shown = ", ".join(str(c) or "(nothing)" for c in choices)
                    raise ValueError(f"{name}={values.pop(name)} is not one of {shown}")
            except ValueError as error:
                problems.append(str(error))
    # A saved `resume` gives way to --overwrite and the other way round: flags win.
    if values.get("overwrite") and values.get("resume", "no") != "no":
        said = flags.keys() & {"overwrite", "resume"}
        if said == {"overwrite"}:
            values |= {"resume": "no", "resume_anyway": "resume_anyway" in flags}
        elif said == {"resume"}:
            values["overwrite"] = False
    config = config_class(**values)
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
    world_size = int(ranks)
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(config_class, Path(sys.argv[0]).name, description))
        raise SystemExit(0)
    argv = [word for word in sys.argv[1:] if word != "--check_config"]
    try:
        config = build(config_class, argv, world_size)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            # With its folder: every step has a main.py, and run_all.sh asks them all at once.
            program = "/".join(Path(sys.argv[0]).absolute().parts[-2:])
            print(f"{program}: these settings cannot work:\n{error}", file=sys.stderr)
        raise SystemExit(2) from None
    if len(argv) < len(sys.argv) - 1:
        raise SystemExit(0)  # --check_config: the settings can work, and that was the question
    if getattr(config, "trust_remote_code", False) and os.environ.get("RANK", "0") == "0":
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
