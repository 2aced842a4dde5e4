"""DeepSpeed engines: the ZeRO config of a run, one training engine, one frozen model.

Source of the settings: DeepSpeed 0.19 documentation, "DeepSpeed Configuration JSON".
"""

import contextlib
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from utils.distributed import process_group
from utils.distributed.optimizers import OPTIMIZERS

# Numbers, not bytes; the planner reads them too.
REDUCE_BUCKET = int(5e7)
PERSISTENT_BELOW = int(1e5)  # ZeRO-3 leaves smaller weights whole
MAX_LIVE_PARAMETERS = int(1e9)  # whole weights at once under ZeRO-3
Copy = Callable[..., torch.Tensor]  # (tensor, dtype=its own) → a copy on the CPU
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of each weight
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_dtype(name: str, device: torch.device) -> str:
    """`auto` → bf16 where the device computes it natively, else fp32. Raises on a GPU that does
    not know it."""
    on_cpu = device.type == "cpu"
    native = _cpu_has_bf16() if on_cpu else torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return "bf16" if native else "fp32"
    if name == "bf16" and not native and not on_cpu:
        raise SystemExit("dtype=bf16: this GPU does not compute bf16; use --dtype fp16 or fp32")
    return name


def _cpu_has_bf16() -> bool:
    """Matrix products of bf16 in one instruction (AVX-512 BF16, or AMX tiles), and oneDNN, which
    makes them, may use it (ONEDNN_MAX_CPU_ISA)."""
    try:
        flags = set(re.findall(r"avx512_bf16|amx_bf16", Path("/proc/cpuinfo").read_text()))
    except OSError:
        return False
    return bool(flags) and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass(frozen=True)
class Training:
    """How weights are stepped on, as the settings of these names say."""

    learning_rate: float
    lr_schedule: str
    warmup_ratio: float
    weight_decay: float
    adam_beta2: float
    gradient_clipping: float
    offload: str
    optimizer: str = "adamw"


def deepspeed_config(dtype: str, zero_stage: int, offload: str, clipping: float = 0.0) -> dict:
    """The DeepSpeed config of one engine."""
    if zero_stage == 0 and dtype != "fp32":
        # bf16 and fp16 weights need an fp32 copy to step on (a step of 1e-6 is lost on a bf16
        # weight), and DeepSpeed keeps one from ZeRO-1 on.
        zero_stage = 1
    zero = {
        "stage": zero_stage,
        # Communication beside the passes. ZeRO-1 cannot, with accumulation by the caller (DeepSpeed
        # asserts it); ZeRO-2 and 3 reduce after each backward pass, and wait for it at its end.
        # gloo gains nothing from it.
        "overlap_comm": zero_stage >= 2 and torch.cuda.is_available(),
        "contiguous_gradients": True,
        "reduce_bucket_size": REDUCE_BUCKET,
        "allgather_bucket_size": int(2e8),
    }
    if zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": int(5e7),
            # Norms and biases stay whole: gathering 4 kB costs as much latency as 4 MB.
            "stage3_param_persistence_threshold": PERSISTENT_BELOW,
            "stage3_max_live_parameters": MAX_LIVE_PARAMETERS,
            "stage3_max_reuse_distance": int(1e9),
        }
    pin = torch.cuda.is_available()
    if offload in ("optimizer", "all") and zero_stage > 0:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
    if offload == "all" and zero_stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": pin}
    result = {
        # We count the micro-batches: `backward` only adds up, `step` reduces and updates. So
        # neither their size nor their number is DeepSpeed's to know.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": zero,
        # Those of OPTIMIZERS step on GPU and CPU without compiling anything.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
        # On by default, it waits for the device at every forward pass of the module, each token's
        # included, and a graph cannot be captured around it.
        "timers": {"throughput": {"enabled": False}},
    }
    if dtype == "bf16":
        # Without the check a gradient of NaN would be stepped on (ZeRO-1 and 2).
        result["bf16"] = {"enabled": True, "check_grad_overflow": True}
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    elif dtype == "fp16":
        result["fp16"] = {"enabled": True, "initial_scale_power": 16}
    # Set in any case: DeepSpeed's default is a limit of 1.
    result["gradient_clipping"] = 0.0 if _we_clip(zero_stage, dtype) else clipping
    return result


def _we_clip(zero_stage: int, dtype: str) -> bool:
    # Without a ZeRO optimizer DeepSpeed clips but does not return the norm, so we do both.
    return zero_stage == 0 and dtype == "fp32"


def lr_factor(step: int, total: int, warmup: int, shape: str) -> float:
    """Learning rate of optimizer step `step` (from 0), as a share of the peak."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if shape == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else 1.0 - done


class TrainEngine:
    """A DeepSpeed engine with gradients normalised by what the caller says.

    `backward(loss_sum, normaliser)` adds the gradient of loss_sum / normaliser, where the
    normaliser counts the whole optimizer step: all ranks, all micro-batches. DeepSpeed averages
    gradients over ranks, which the factor `world_size` takes back.
    """

    def __init__(
        self, model: nn.Module, how: Training, *, dtype: str, zero_stage: int, total_steps: int
    ):
        import deepspeed

        decayed = [p for p in model.parameters() if p.requires_grad and rank_of(p) >= 2]
        others = [p for p in model.parameters() if p.requires_grad and rank_of(p) < 2]
        groups = [
            {"params": decayed, "weight_decay": how.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = OPTIMIZERS[how.optimizer]
        self.adamw = self.optimizer.make(
            [g for g in groups if g["params"]], lr=how.learning_rate, betas=(0.9, how.adam_beta2)
        )
        warmup = math.ceil(how.warmup_ratio * total_steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda step: lr_factor(step, total_steps, warmup, how.lr_schedule)
        )
        self.zero_stage = zero_stage
        self.world_size = process_group.world_size()
        # How what the optimizer steps on is divided: moments in 8 bits fit one way alone.
        self.layout = f"ZeRO-{zero_stage} (offload {how.offload}) on {self.world_size} ranks"
        if zero_stage == 0:
            self.layout = f"ZeRO-0 in {dtype}" + f" on {self.world_size} ranks" * (dtype != "fp32")
        self._norm = None
        if _we_clip(zero_stage, dtype):
            limit = how.gradient_clipping or float("inf")

            def clip(optimizer, args, kwargs):
                params = [p for g in optimizer.param_groups for p in g["params"]]
                self._norm = float(nn.utils.clip_grad_norm_(params, limit))
                if not math.isfinite(self._norm):
                    for p in params:
                        p.grad = None  # AdamW passes over these: weights and moments stay

            self.adamw.register_step_pre_hook(clip)
        with contextlib.redirect_stdout(io.StringIO()):  # a dozen lines of memory in bf16
            self.engine, _, _, _ = deepspeed.initialize(
                model=model,
                optimizer=self.adamw,
                lr_scheduler=self.schedule,
                config=deepspeed_config(dtype, zero_stage, how.offload, how.gradient_clipping),
                dist_init_required=False,
            )
        # transformers loads models in eval mode, in which gradient checkpointing does nothing.
        self.engine.train()

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def __call__(self, *args, **kwargs):
        return self.engine(*args, **kwargs)

    def backward(self, loss_sum: torch.Tensor, normaliser: float) -> None:
        self.engine.backward(loss_sum * (self.world_size / normaliser), scale_wrt_gas=False)

    def step(self) -> dict[str, float]:
        """One optimizer step, or none where the gradient of any rank is not finite.

        Returns `grad_norm` (before clipping), `learning_rate` and `skipped` (0 or 1, the same on
        every rank). The learning rate's schedule goes on either way.
        """
        learning_rate = self.engine.get_lr()[0]
        self._norm = None
        self.engine.step()
        norm = self._norm if self._norm is not None else self.engine.get_global_grad_norm()
        norm = float("nan") if norm is None else float(norm)
        applied = self.engine.was_step_applied()
        if not applied:
            self.schedule.step()  # DeepSpeed holds it back
        skipped = not applied or (self._norm is not None and not math.isfinite(norm))
        return {"grad_norm": norm, "learning_rate": learning_rate, "skipped": float(skipped)}

    def masters(self) -> list[torch.Tensor]:
        """The fp32 tensors that AdamW steps on, on this rank: flat partitions of many weights, in
        the order of its groups, or under ZeRO-0 the weights themselves."""
        for name in (
            "fp32_partitioned_groups_flat",  # ZeRO-3
            "single_partition_of_fp32_groups",  # ZeRO-1 and 2
            "fp32_groups_flat_partition",  # BF16_Optimizer
        ):
            if hasattr(self.engine.optimizer, name):
                return getattr(self.engine.optimizer, name)
        return [p for p in self.module.parameters() if p.requires_grad]

    def moments_to_come(self, device: torch.device) -> int:
        """Bytes on `device` that the moments will take at the first step, and keep. 0 for those
        that are there already, or are kept elsewhere (--offload).

        Gradients are not counted: they are gone after each step, or there from the start.
        """
        state = self.adamw.state
        coming = [t for t in self.masters() if not state.get(t)]
        each = self.optimizer.state_bytes
        return round(sum(each * t.numel() for t in coming if t.device == device))


def rank_of(parameter: nn.Parameter) -> int:
    # Under ZeRO-3 a parameter is a flat shard; its real shape stays in ds_shape.
    return len(getattr(parameter, "ds_shape", parameter.shape))


def size_of(p: nn.Parameter) -> int:
    """How many numbers a weight has, be it a shard (ZeRO-3) or in 4 bits, two of them in a byte."""
    packed = getattr(p, "quant_state", None)
    return packed.shape.numel() if packed is not None else getattr(p, "ds_numel", p.numel())


def frozen(model: nn.Module, *, dtype: str, zero_stage: int, device, offload: str = "none"):
    """A model for inference only: whole on the device, or sharded over the ranks with ZeRO-3.

    Returns a callable with `model`'s forward. Dropout is off.
    """
    model.requires_grad_(False).eval()
    if zero_stage < 3:
        return model.to(device)
    import deepspeed

    settings = deepspeed_config(dtype, 3, offload)
    settings["zero_optimization"].pop("offload_optimizer", None)
    engine = deepspeed.initialize(model=model, config=settings, dist_init_required=False)[0]
    engine.eval()
    return engine


@contextlib.contextmanager
def sharded_loading(dtype: str, zero_stage: int, offload: str):
    """Inside, `from_pretrained` shards each weight over the ranks as it is read (ZeRO-3)."""
    if zero_stage < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # transformers keeps only a weak reference to it.
    settings = HfDeepSpeedConfig(deepspeed_config(dtype, 3, offload))
    try:
        yield settings
    finally:
        unset_hf_deepspeed_config()


@contextlib.contextmanager
def gathered(parameters):
    """Whole weights inside, on every rank, for reading (a no-op without ZeRO-3)."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=None):
        yield


@torch.no_grad()
def fill(p: nn.Parameter, whole: torch.Tensor) -> None:
    """Give a weight, maybe sharded, these numbers, the same on every rank. A collective then."""
    if not hasattr(p, "ds_id"):
        p.data.copy_(whole)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
        p.data.copy_(whole)


def local(p: torch.Tensor) -> torch.Tensor:
    """What this rank owns of a weight: its ZeRO-3 shard, or all of it."""
    return getattr(p, "ds_tensor", p).detach()


def all_gathered(shards: list[torch.Tensor], parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Whole tensors of the parameters' shapes by one collective; shards: this rank's part of each,
    of one dtype and on the device that communicates."""
    mine, world = torch.cat([shard.flatten() for shard in shards]), process_group.world_size()
    whole = mine
    if world > 1:
        whole = mine.new_empty(world * mine.numel())
        # Its new name since torch 2.13, which warns of the old one.
        all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        all_gather(whole, mine)
    parts = whole.view(world, -1).split([shard.numel() for shard in shards], dim=1)
    # A parameter lies cut in `world` equal pieces, the last one padded.
    return [
        part.reshape(-1)[: p.ds_numel].view(p.ds_shape)
        for p, part in zip(parameters, parts, strict=True)
    ]


def to_cpu(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return tensor.detach().to("cpu", dtype or tensor.dtype, copy=True)


@torch.no_grad()
def whole_state_dict(
    module: nn.Module, copy: Copy = to_cpu, parameters=None
) -> dict[str, torch.Tensor]:
    """Whole weights on the CPU of rank 0 (an empty dict elsewhere); every rank must call it.

    One weight at a time is whole, so the peak is the largest weight and not the model. parameters:
    names and weights, where not all of the module's are wanted.
    """
    state = {}
    for name, p in parameters or module.named_parameters():
        with gathered([p]):
            if process_group.is_main():
                state[name] = copy(p)
    if process_group.is_main():
        persistent = module.state_dict(keep_vars=True)
        for name, b in module.named_buffers():
            if name in persistent:
                state[name] = copy(b)
    return state
