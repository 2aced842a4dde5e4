"""What means the same in every step."""

import datetime
import math
import os
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utils import tracking
from utils.settings.fields import Settings, free, rounding, setting


def check_folder(path: str) -> None:
    """ValueError where nothing can be written into a folder at `path`, be it there yet or not."""
    there = next(
        p for p in (Path(path).absolute(), *Path(path).absolute().parents) if os.path.exists(p)
    )
    if not there.is_dir():
        raise ValueError(f"{there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{there} cannot be written to")


def shares_of(data_split: str) -> list[float]:
    """The three shares of --data_split; empty where it shares nothing. ValueError for others."""
    if not data_split.strip():
        return []
    try:
        shares = [float(share) for share in data_split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(math.isfinite(s) and s >= 0 for s in shares) or not sum(shares):
        raise ValueError("--data_split takes three shares, as 2,4,4")
    return shares


def columns_of(columns: list[str]) -> dict[str, str]:
    """{our column: its name in the data} of --columns. ValueError for what is no such list."""
    pairs = [pair.partition("=") for words in columns for pair in words.split(",") if pair.strip()]
    names = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    if len(names) < len(pairs) or not all((*names, *names.values())):
        raise ValueError(
            f"{columns} are not pairs, each of our columns once, as prompt=question,answer=solution"
        )
    return names


def check_patterns(patterns: list[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no pattern: {error}") from None


def check_keep_best(keep_best: str) -> None:
    name, _, direction = keep_best.rpartition(":")
    if not name or direction not in ("min", "max"):
        raise ValueError("not METRIC:min or METRIC:max, e.g. eval/loss:min")


def check_resume(resume: str) -> None:
    if resume not in ("no", "auto") and not Path(resume).is_dir():
        raise ValueError("neither auto, nor no, nor the folder of a checkpoint")


@dataclass
class RunConfig(Settings):
    output_dir: str = free(
        "", "folder for weights, metrics.jsonl and config.yaml", needed=True, check=check_folder
    )
    model_name_or_path: str = setting(
        "", "local folder or hub name of the model to start from", needed=True
    )
    trust_remote_code: bool = free(False, "run Python code that comes with a model (a risk)")
    attn_implementation: str = rounding("auto", "sdpa, eager, …; auto: transformers' choice")
    seed: int = setting(42, "seed of everything random", below=2**63)
    deterministic: bool = rounding(
        False, "GPU kernels that give the same bits each time (slower; a CPU does so anyway)"
    )

    data_schema: str = setting(
        "auto",
        "force the row schema instead of reading the columns; transcript or plain: how texts that "
        "may be a conversation written down (Human: … Assistant: …) are taken; NAME:plain: both",
    )
    columns: list[str] = setting(
        [], "other names of columns, e.g. prompt=question,answer=solution", check=columns_of
    )
    data_weights: list[float] = setting(
        [], "how often each data set's rows come in one epoch", above=0, at_most=10_000
    )
    data_split: str = setting("", "share one data set among the steps, e.g. 2,4,4", check=shares_of)
    eval_fraction: float = setting(
        0.05, "rows held out where a data set has no test split", above=0, below=1
    )
    long_prompts: str = setting(
        "cut",
        "a prompt beyond its limit: cut its oldest exchanges, then the left end of its text (BOS, "
        "system turn and headers stay), or drop the row",
        choices=("cut", "drop"),
    )
    date: str = setting(
        "",
        "the day that chat templates may state, e.g. 2026-01-31; empty: that of the start",
        check=datetime.date.fromisoformat,
    )
    max_eval_rows: int = setting(512, "at most so many held-out rows are used", at_least=1)
    data_cache: str = free(
        "",
        "folder for the tokenised rows of large data sets; else below $HF_HOME",
        check=check_folder,
    )
    max_bad_rows: float = setting(
        0.01,
        "share of the rows that may be unusable: they are left out, counted, and kept in "
        "bad_rows.jsonl; with more the run stops and names them",
        at_most=1,
    )

    max_steps: int = setting(0, "passes of the main loop; 0: as many as the epochs give")
    global_batch_size: int = setting(64, "sequences an optimizer step, over all ranks", at_least=1)
    micro_batch_size: int = rounding(8, "sequences a forward pass, one rank", at_least=1)
    micro_batch_tokens: int = rounding(
        0,
        "tokens a forward pass, one rank, padding included: in place of micro_batch_size, so that "
        "short rows go many at a time and long ones few (a longer row goes alone); 0: off",
    )
    packing: str = rounding(
        "auto",
        "rows of a micro-batch end to end, without padding and without attention across rows; "
        "auto: where device and model can",
        choices=("auto", "on", "off"),
    )
    optimizer: str = setting(
        "adamw",
        "adamw8bit: moments in 8 bits, of bitsandbytes: 6 bytes a weight in place of 12",
        choices=("adamw", "adamw8bit"),
    )
    # Adam moves every weight by about the learning rate.
    learning_rate: float = setting(1e-5, "peak learning rate", above=0, at_most=1)
    lr_schedule: str = setting("cosine", "after warmup", choices=("cosine", "linear", "constant"))
    warmup_ratio: float = setting(0.03, "share of the steps spent warming up", below=1)
    weight_decay: float = setting(0.0, "AdamW weight decay (matrices only)")
    adam_beta2: float = setting(0.95, "AdamW second-moment decay", below=1)
    gradient_clipping: float = setting(1.0, "gradient norm limit; 0: none")
    freeze: list[str] = setting(
        [],
        r"weights that match one of these stay as they are, e.g. embed layers\.[01]\. (of PPO's "
        "models: the actor's)",
        check=check_patterns,
    )
    freeze_bottom_layers: int = setting(
        0,
        "layers, from below, that stay as they are, and with them the embeddings and a head that "
        "is tied to these (of PPO's models: the actor's)",
    )
    gradient_checkpointing: bool = rounding(False, "recompute activations to save memory")
    checkpoint_layers: int = rounding(
        0,
        "those of so many layers, from below (frozen ones keep none in any case); 0: of all",
        only_with="gradient_checkpointing",
    )

    lora_rank: int = setting(
        0, "rank of the adapters trained in place of all weights (docs/adapters.md); 0: none"
    )
    lora_alpha: float = setting(
        16.0, "what adapters add is multiplied by this / rank", above=0, only_with="lora_rank"
    )
    lora_dropout: float = setting(
        0.0, "of what adapters read, steps 1 and 2", below=1, only_with="lora_rank"
    )
    lora_target_modules: list[str] = setting(
        [], "linear layers that get one; none: all but the head", only_with="lora_rank"
    )
    lora_variant: str = setting(
        "lora",
        "rslora: alpha / √rank; dora: direction and size of each row apart",
        choices=("lora", "rslora", "dora"),
        only_with="lora_rank",
    )
    merge_on_save: bool = free(
        False, "write whole models at the end, adapters merged", only_with="lora_rank"
    )
    load_in_4bit: bool = setting(
        False,
        "linear layers of the frozen base, and of models that only judge, in 4 bits (NF4, QLoRA)",
        only_with="lora_rank",
    )
    load_in_8bit: bool = setting(False, "the same in 8 bits (LLM.int8())", only_with="lora_rank")

    dtype: str = setting(
        "auto",
        "weights and matmuls (steps are made on fp32 weights, log-softmax is fp32); auto: bf16 "
        "where the GPU or CPU computes it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    zero_stage: int = rounding(0, "DeepSpeed ZeRO stage", choices=(0, 1, 2, 3))
    offload: str = rounding(
        "none",
        "to CPU memory: optimizer states, or also weights (ZeRO-3)",
        ("none", "optimizer", "all"),
    )
    rollout_gather: str = rounding(
        "auto",
        "ZeRO-3 weights while sampling: whole for the rollout, layer by layer (slow, for models "
        "that do not fit one GPU), or by what memory is free",
        choices=("auto", "rollout", "layer"),
    )

    log_every: int = free(10, "steps between console lines", at_least=1)
    eval_every: int = free(0, "steps between evaluations; 0: only before and after")
    save_every: int = free(0, "steps between checkpoints; 0: none by steps")
    save_every_minutes: float = free(30.0, "minutes between checkpoints; 0: none by the clock")
    save_in_background: str = free(
        "auto",
        "write a checkpoint from a copy in CPU memory while training goes on; auto: where the copy "
        "takes at most half of the free memory",
        choices=("auto", "on", "off"),
    )
    keep_last: int = free(2, "checkpoints that stay, the newest ones; 0: all")
    keep_best: str = free(
        "", "METRIC:min or METRIC:max: keep a checkpoint whenever it is best", check=check_keep_best
    )
    resume: str = free(
        "no", "auto: from the newest whole checkpoint; or the folder of one", check=check_resume
    )
    resume_anyway: bool = free(
        False, "even with settings that change what is learned", only_with="resume"
    )
    overwrite: bool = free(False, "begin anew in a folder that holds a run, which is deleted")
    tensorboard: bool = free(True, "write TensorBoard files under OUTPUT/tensorboard")
    track: str = free(
        "",
        "send metrics and sampled answers there as well",
        ("", *tracking.TRACKERS),
        check=tracking.check,
    )
    max_bad_steps: int = free(
        5,
        "optimizer steps in a row skipped for loss or gradients not finite; one more ends the run",
    )
    timeout_minutes: float = free(
        30.0, "a longer wait in a collective ends the run", above=0, at_most=1e6
    )

    # The setting whose data sets data_weights counts.
    weighted: typing.ClassVar[str] = ""
    trains: typing.ClassVar[bool] = True  # is there a batch that the ranks share?

    def contradictions(self, world_size: int) -> Iterator[str]:
        # With a budget of tokens a rank's rows need not divide into micro-batches.
        micro = 1 if self.micro_batch_tokens else self.micro_batch_size
        size, together = self.global_batch_size, max(micro, 1) * world_size
        if self.trains and size % together:
            yield (
                f"global_batch_size={size} is not divisible by micro_batch_size × ranks = "
                f"{micro} × {world_size} = {together}; set --global_batch_size to a multiple, e.g. "
                f"{-(-size // together) * together}, or lower --micro_batch_size"
            )
        if self.offload == "all" and self.zero_stage != 3:
            yield f"offload=all needs ZeRO-3, not {self.zero_stage}; set --zero_stage 3"
        if self.offload == "optimizer" and self.zero_stage == 0:
            yield "offload=optimizer needs ZeRO; set --zero_stage 1, 2 or 3"
        few = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
        if self.load_in_4bit and self.load_in_8bit:
            yield "load_in_4bit and load_in_8bit are both set; give one of them"
        if getattr(self, few):
            stages = ("zero_stage", "critic_zero_stage", "reference_zero_stage")
            for name in (n for n in stages if getattr(self, n, 0) == 3):
                yield (
                    f"{few}=true: ZeRO-3 would shard packed weights, which are no numbers; set "
                    f"--{name} 2, or leave out --{few}"
                )
        if self.dtype == "fp16" and os.environ.get("DS_ACCELERATOR") == "cpu":
            yield "dtype=fp16 has no CPU kernels worth using; set --dtype bf16 or fp32"
        weights, names = self.data_weights, getattr(self, self.weighted, [])
        if weights and names and len(weights) != len(names):
            yield (
                f"data_weights={weights} has {len(weights)} numbers for {len(names)} data sets of "
                f"--{self.weighted}; give --data_weights one a set"
            )
        if self.overwrite and self.resume == "auto":
            yield "overwrite begins anew and resume=auto goes on; give one of them"
