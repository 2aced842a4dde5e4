"""What must hold under each ZeRO stage, run on every rank by test_distributed.py.

arguments: base model folder
"""

import sys

import torch

from step1_sft.config import SFTConfig
from utils.data import chat_template
from utils.distributed import checkpoint, process_group, zero
from utils.distributed.hybrid_engine import HybridEngine
from utils.models import generation, language_model, vocabulary_head
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


def check(folder: str, stage: int, dtype: str, offload: str) -> None:
    config = SFTConfig(
        model_name_or_path=folder,
        zero_stage=stage,
        dtype=dtype,
        offload=offload,
        output_dir="-",
        micro_batch_size=2,
        learning_rate=1e-2,
        lr_schedule="constant",
    )
    tokenizer = chat_template.load_tokenizer(folder)
    tokenizer.add_tokens(
        [f"<new {i}>" for i in range(530 - len(tokenizer))], special_tokens=True
    )  # 512 rows before
    model = language_model.load(config, folder, dtype=dtype, zero_stage=stage, tokenizer=tokenizer)
    engine = zero.TrainEngine(
        model, config, dtype=dtype, zero_stage=stage, learning_rate=1e-2, total_steps=9
    )
    name = f"stage {stage}, {dtype}, offload {offload}"
    ids = torch.randint(10, 300, (4, 12), generator=torch.Generator().manual_seed(0))

    # EMA: Σ (1−d) d^(n−i) w_i + d^n w_0, in float64 from the whole weights.
    ema = EMA(engine.module, DECAY)
    history = [whole(engine.module)]
    for step in range(4):
        metrics = train_one_step(engine, ids, step)
        assert metrics["grad_norm"] > 0, name
        ema.update()
        history.append(whole(engine.module))
    moved = max((history[-1][k] - history[0][k]).abs().max().item() for k in history[0])
    assert moved > 1e-2, f"{name}: weights moved by {moved}"
    averaged = ema.state_dict(torch.float32)
    if process_group.is_main():
        assert averaged.keys() == history[0].keys()
        assert averaged["model.embed_tokens.weight"].shape[0] == 576
        for key, value in averaged.items():
            expected = DECAY**4 * history[0][key].double()
            for i in range(1, 5):
                expected += (1 - DECAY) * DECAY ** (4 - i) * history[i][key].double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7, msg=name)
    else:
        assert averaged == {}

    # What is saved is what is trained.
    state = checkpoint.whole_state_dict(engine.module)
    if process_group.is_main():
        for key, value in history[-1].items():
            assert torch.equal(state[key], value), f"{name}: {key}"

    # The generator is the model, with the weights of now, and training goes on after it.
    mask = torch.ones_like(ids, dtype=torch.bool)
    with HybridEngine(engine).generating() as plain:
        assert not plain.training
        for key, p in plain.named_parameters():
            assert torch.equal(p, history[-1][key]), f"{name}: generator's {key} is stale"
        # Ranks stop at different lengths: no collective may wait inside.
        stop = 1 + process_group.rank() * 7
        generation.generate(plain, ids, mask, max_new_tokens=stop, stop_id=-1, pad_id=0)
        with torch.no_grad():
            expected = plain(**language_model.forward_inputs(plain, ids, mask)).logits
    # Layer by layer: the same tokens, with ranks that stop at different lengths going in step.
    hybrid, greedy = HybridEngine(engine, "layer"), []
    for one in (HybridEngine(engine), hybrid):
        with one.generating() as model:
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
                    all_finished=one.all_finished,
                )
            )
    assert torch.equal(*greedy), name
    engine.module.eval()
    with torch.no_grad():
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
