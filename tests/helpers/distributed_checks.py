"""What must hold under each ZeRO stage, run on every rank by test_distributed.py.

arguments: base model folder
"""

import sys

import torch

from tests.helpers.engine_builder import RATE, engine_of
from utils.distributed import process_group, zero
from utils.generation import sampling as generation
from utils.generation.engine import synced
from utils.generation.engines.native import NativeEngine
from utils.kernels import vocabulary_head
from utils.models import language_model
from utils.models.ema import EMA

DECAY = 0.9


def whole(module):
    """Every weight whole, on every rank, gathered by another way than the code under test."""
    import deepspeed

    named = list(module.named_parameters())
    if not hasattr(named[0][1], "ds_id"):
        return {n: p.detach().clone() for n, p in named}
    with deepspeed.zero.GatheredParameters([p for _, p in named]):
        return {n: p.detach().clone() for n, p in named}


def train_one_step(engine, ids, step):
    mask = torch.ones_like(ids, dtype=torch.bool)
    rows = ids[process_group.rank() :: process_group.world_size()].roll(step, 1)
    wanted = mask[: len(rows)]
    logprobs, _ = language_model.wanted_logprobs(engine, rows, wanted, wanted)
    assert not vocabulary_head.of(engine.module).changes_logits
    engine.backward(-logprobs.sum(), normaliser=ids.numel())
    return engine.step()


def check_average(engine, ids, name: str) -> dict[str, torch.Tensor]:
    """Σ (1−d) d^(n−i) w_i + d^n w_0, in float64 from the whole weights; → the last of these."""
    ema = EMA(engine.module, DECAY)
    history = [whole(engine.module)]
    for step in range(4):
        metrics = train_one_step(engine, ids, step)
        assert metrics["grad_norm"] > 0, name
        ema.update()
        history.append(whole(engine.module))
    moved = max((history[-1][k] - history[0][k]).abs().max().item() for k in history[0])
    assert moved > 1e-2, f"{name}: weights moved by {moved}"
    averaged = ema.state_dict(lambda whole, _: zero.to_cpu(whole, torch.float32))
    if not process_group.is_main():
        assert averaged == {}
        return history[-1]
    assert averaged.keys() == history[0].keys()
    assert averaged["model.embed_tokens.weight"].shape[0] == 576
    for key, value in averaged.items():
        expected = DECAY**4 * history[0][key].double()
        for i in range(1, 5):
            expected += (1 - DECAY) * DECAY ** (4 - i) * history[i][key].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7, msg=name)
    return history[-1]


def check_generator(engine, ids, now: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The generator is the model, with the weights of now; → its logits."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    with synced(NativeEngine(), engine) as native:
        plain = native.generator
        assert not plain.training
        for key, p in plain.named_parameters():
            assert torch.equal(p, now[key]), f"{name}: generator's {key} is stale"
        # Ranks stop at different lengths: no collective may wait inside.
        stop = 1 + process_group.rank() * 7
        generation.generate(plain, ids, mask, max_new_tokens=stop, stop_id=-1, pad_id=0)
        with torch.no_grad():
            return plain(**language_model.forward_inputs(plain, ids, mask)).logits


def check_layer_by_layer(engine, ids, name: str) -> None:
    """The same tokens, with ranks that stop at different lengths going in step."""
    mask, greedy = torch.ones_like(ids, dtype=torch.bool), []
    for one in (NativeEngine(), NativeEngine("layer")):
        with synced(one, engine):
            model = one.generator
            first = generation.generate(model, ids, mask, max_new_tokens=1, stop_id=-1, pad_id=0)
            stop = first[0, 0].item() if process_group.rank() == 0 else -1
            greedy.append(
                generation.generate(
                    model,
                    ids[:1],
                    mask[:1],
                    max_new_tokens=9,
                    stop_id=stop,
                    pad_id=0,
                    in_step=one.in_step,
                )
            )
    assert torch.equal(*greedy), name


def check(folder: str, stage: int, dtype: str, offload: str) -> None:
    settings = dict(learning_rate=RATE, lr_schedule="constant")
    # 512 rows before
    engine = engine_of(folder, stage, dtype, offload, total_steps=9, tokens=530, **settings)
    name = f"stage {stage}, {dtype}, offload {offload}"
    ids = torch.randint(10, 300, (4, 12), generator=torch.Generator().manual_seed(0))
    now = check_average(engine, ids, name)
    # What is saved is what is trained.
    state = zero.whole_state_dict(engine.module)
    if process_group.is_main():
        for key, value in now.items():
            assert torch.equal(state[key], value), f"{name}: {key}"
    expected = check_generator(engine, ids, now, name)
    check_layer_by_layer(engine, ids, name)
    # Training goes on after it.
    engine.module.eval()
    with torch.no_grad():
        mask = torch.ones_like(ids, dtype=torch.bool)
        got = engine(**language_model.forward_inputs(engine.module, ids, mask)).logits
    engine.module.train()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=name)
    assert all(p.requires_grad for p in engine.module.parameters()), name
    assert train_one_step(engine, ids, 4)["grad_norm"] > 0, name


def main() -> None:
    folder = sys.argv[1]
    for stage, dtype, offload in (
        (0, "fp32", "none"),
        (1, "fp32", "none"),
        (2, "fp32", "optimizer"),
        (3, "fp32", "none"),
        (3, "fp32", "all"),
        (0, "bf16", "none"),
        (2, "bf16", "none"),
        (3, "bf16", "none"),
    ):
        check(folder, stage, dtype, offload)
        print(f"held: stage {stage}, {dtype}, offload {offload}")


if __name__ == "__main__":
    main()
