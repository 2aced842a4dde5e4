"""The state of an engine as flat spans of named weights: fp32 master weights, AdamW's moments.

DeepSpeed keeps these in flat partitions whose layout depends on the ZeRO stage and the number of
ranks. Here every rank says which elements of which weight it holds, so saving needs no all-gather,
and any stage on any number of ranks can load it, to the last bit.
"""

import json
import random
from dataclasses import dataclass

import numpy as np
import torch

from utils.checkpoints.manifest import Damaged
from utils.distributed import optimizers, process_group
from utils.distributed.zero import MOMENTS
from utils.models import adapters
from utils.models.ema import EMA

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass
class Span:
    """Elements from `start` of the flattened weight `name`: kind → (n,) view of where they live.

    `step`, where there is one, is AdamW's count, of one element. everywhere: each rank holds the
    same, so they share the writing. in_blocks: the optimizer's state that the tensors are of, where
    these are moments in 8 bits; its count of steps is no tensor, and `step` a copy of it.
    """

    name: str
    start: int
    tensors: dict[str, torch.Tensor]
    everywhere: bool
    in_blocks: dict | None = None


def spans_of(engine, create=lambda name: False) -> list[Span]:
    """The spans of a zero.TrainEngine or an EMA on this rank. Moments that AdamW has not made yet
    are left out, or made (as zeros) where `create(name)` asks for it."""
    if isinstance(engine, EMA):
        return _spans_of_average(engine)
    optimizer, masters, rank = engine.engine.optimizer, engine.masters(), process_group.rank()
    spans, in_blocks = [], optimizers.in_blocks(engine.adamw)
    for name, p in adapters.own_of(engine.module):
        sharded = hasattr(p, "ds_id")
        if not p.requires_grad:  # not in the optimizer: the weight as the model has it
            own = p.ds_tensor if sharded else p
            start = own.numel() * rank if sharded else 0
            spans.append(_span(name, start, {"weight": own.detach()}, p, sharded))
            continue
        if sharded:
            group, offset, count = optimizer.grad_position[optimizer.get_param_id(p)]
            flat, start = masters[group], count * rank
        elif hasattr(p, "_hp_mapping"):
            if p._hp_mapping is None:
                continue  # all of it lies in other ranks' partitions
            flat = masters[p._hp_mapping.param_group_index]
            here = p._hp_mapping.get_hp_fragment_address()
            offset, count = here.start, here.numel
            start = p._hp_mapping.lp_fragment_address.start
        else:
            flat, offset, count, start = p, 0, p.numel(), 0
        state = {} if in_blocks else engine.adamw.state.get(flat, {})
        if not (in_blocks or state) and create(name):
            state = engine.adamw.state[flat] = {
                # As torch's fused AdamW makes them at its first step.
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        kinds = {"weight": flat.detach()} | {k: state[k] for k in MOMENTS if k in state}
        tensors = {k: t.view(-1).narrow(0, offset, count) for k, t in kinds.items()}
        span = _span(name, start, tensors, p, sharded or hasattr(p, "_hp_mapping"))
        if "step" in state:
            span.tensors["step"] = state["step"].view(1)
        spans.append(span)
    spans = [span for span in spans if span.tensors["weight"].numel()]
    return spans + (_moments_in_blocks(engine, create) if in_blocks else [])


def _moments_in_blocks(engine, create) -> list[Span]:
    """Moments in 8 bits, with a scale for each block of what the optimizer steps on at once. Under
    ZeRO that is a partition of many weights, which only the same stage on the same ranks has."""
    spans, whole = [], engine.layout == "ZeRO-0 in fp32"
    for i, flat in enumerate(engine.masters()):
        name = f"moments {i}" if whole else f"moments {i} of rank {process_group.rank()}"
        if not engine.adamw.state.get(flat) and create(name):
            optimizers.make_state(engine.adamw, flat)
        if state := engine.adamw.state.get(flat):
            tensors = {k: state[k].view(-1) for k in optimizers.STATE if k in state}
            tensors["step"] = torch.tensor([state["step"]])
            spans.append(Span(name, 0, tensors, everywhere=whole, in_blocks=state))
    return spans


def _span(name: str, start: int, tensors: dict, p, partitioned: bool) -> Span:
    """A span without the padding that a shard may end with."""
    whole = getattr(p, "ds_numel", p.numel())
    kept = {k: t.view(-1)[: max(0, whole - start)] for k, t in tensors.items()}
    return Span(name, start, kept, everywhere=not partitioned)


def _spans_of_average(ema: EMA) -> list[Span]:
    spans, rank = [], process_group.rank()
    for name, p in adapters.own_of(ema.module):
        shadow, sharded = ema.shadow[name], hasattr(p, "ds_id")
        start = shadow.numel() * rank if sharded else 0
        spans.append(_span(name, start, {"average": shadow}, p, sharded))
    return [span for span in spans if span.tensors["average"].numel()]


def to_write(part: str, spans: list[Span]) -> dict[str, torch.Tensor]:
    """The tensors of `spans` that this rank writes, by the keys that manifest.Reader finds."""
    rank, world_size = process_group.rank(), process_group.world_size()
    return {
        f"{part}|{span.name}|{kind}|{0 if kind == 'step' else span.start}": t
        for i, span in enumerate(spans)
        if not span.everywhere or i % world_size == rank
        for kind, t in span.tensors.items()
    }


@torch.no_grad()
def _fill(part: str, spans: list[Span], reader) -> None:
    """Copy what `reader` has into the spans."""
    for span in spans:
        for kind, t in span.tensors.items():
            if kind == "step":
                # One count serves a flat group. A weight that got no gradient under ZeRO-0 has
                # counted fewer steps, and has no moments that it would matter to.
                if reader.has(part, span.name, kind):
                    t.copy_(torch.maximum(t.cpu(), reader.read(part, span.name, kind, 0, 1)))
                if span.in_blocks is not None:
                    span.in_blocks["step"] = int(t)
            elif kind not in MOMENTS or reader.has(part, span.name, kind):
                t.copy_(reader.read(part, span.name, kind, span.start, t.numel()))


def restore(engine, part: str, reader, record: dict | None) -> None:
    """Weights, moments, schedule, counters and loss scale of `part` into a fresh engine; the
    weights of an EMA."""
    if not isinstance(engine, EMA):
        was, now = record.get("moments", "in fp32"), moments_of(engine)
        if was != now:
            raise Damaged(
                f"its moments are {was}, and this run's would be {now}: go on with the same "
                "--optimizer, and in 8 bits with the same --zero_stage, --offload and ranks"
            )
    kinds = ("exp_avg", "state1")
    spans = spans_of(engine, create=lambda name: any(reader.has(part, name, k) for k in kinds))
    _fill(part, spans, reader)
    if isinstance(engine, EMA):
        return
    publish(engine.engine.optimizer)
    inner, scaler = engine.engine, getattr(engine.engine.optimizer, "loss_scaler", None)
    for name in COUNTERS:
        setattr(inner, name, record["counters"][name])
    for name, value in record["loss_scale"].items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
    schedule = engine.schedule
    schedule.last_epoch, schedule._step_count = record["schedule"], record["schedule"] + 1
    # The rate is a function of the step, so it need not be stored; --resume_anyway may change it.
    for group, peak, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = peak * factor(record["schedule"])
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def moments_of(engine) -> str:
    """What must be alike in the run that wrote the moments and in the one that reads them."""
    return f"in 8 bits, {engine.layout}" if optimizers.in_blocks(engine.adamw) else "in fp32"


def record_of(engine) -> dict | None:
    """What `restore` needs beside the tensors."""
    if isinstance(engine, EMA):
        return None
    scaler = getattr(engine.engine.optimizer, "loss_scaler", None)
    dynamic = getattr(scaler, "dynamic", False)
    return {
        "counters": {name: getattr(engine.engine, name) for name in COUNTERS},
        "loss_scale": {name: getattr(scaler, name) for name in SCALER} if dynamic else {},
        "schedule": engine.schedule.last_epoch,
        "moments": moments_of(engine),
    }


def publish(optimizer) -> None:
    """Master weights → the weights that the model computes with, as after an optimizer step."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):  # ZeRO-1, 2
        optimizer.update_lp_params()


# The random number generators of this rank.


def random_state() -> dict[str, torch.Tensor]:
    """Python's, NumPy's, torch's and this rank's GPU's generators as tensors."""
    kind, keys, *rest = np.random.get_state()
    text = json.dumps([random.getstate(), [kind, keys.tolist(), *rest]])
    state = {
        "python": torch.tensor(list(text.encode()), dtype=torch.uint8),
        "torch": torch.get_rng_state(),
    }
    if process_group.device().type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(process_group.device())
    return {f"random|{process_group.rank()}|{name}|0": t for name, t in state.items()}


def restore_random(reader, saved_ranks: int) -> None:
    """Set this rank's generators; where fewer ranks were saved, some start from the same state."""
    rank = str(process_group.rank() % saved_ranks)
    text = bytes(reader.whole("random", rank, "python").tolist())
    (version, numbers, gauss), (kind, keys, *rest) = json.loads(text)
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(reader.whole("random", rank, "torch"))
    if process_group.device().type == "cuda" and reader.has("random", rank, "cuda"):
        torch.cuda.set_rng_state(reader.whole("random", rank, "cuda"), process_group.device())
