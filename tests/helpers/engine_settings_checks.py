"""What DeepSpeed makes of a training engine's settings, run by test_zero.py."""

import sys

import torch
from deepspeed.accelerator import get_accelerator

from benchmarks import zero_gathers
from tests.helpers.generation_checks import big_llama
from tests.helpers.plan_checks import tensor_bytes
from utils.distributed import zero
from utils.generation.weights import in_eval_mode
from utils.settings.run_config import RunConfig


def no_waiting():
    """No forward pass waits for the device, however many steps have been taken: a captured graph
    cannot, and a queue that is emptied at every token is no queue."""
    accelerator, waits = get_accelerator(), []
    ids = torch.ones(1, 4, dtype=torch.int64)
    for stage in (0, 2, 3):
        engine = zero_gathers.engine_of(big_llama(), stage)
        for _ in range(3):  # DeepSpeed's timer does not look at the first two
            engine.backward(engine(input_ids=ids).logits.sum(), normaliser=1)
            engine.step()
        real, accelerator.synchronize = accelerator.synchronize, lambda *_: waits.append(1)
        engine(input_ids=ids)
        with in_eval_mode(engine) as model:
            model(input_ids=ids)
        accelerator.synchronize = real
        assert not waits, f"ZeRO-{stage}: {len(waits)} of 2 forward passes wait for the device"
        assert not engine.engine.tput_timer.started
    print("held: no waiting")


def overlapped():
    """Where there is a GPU, DeepSpeed accepts communication beside the passes for ZeRO-2 and 3, and
    several micro-batches make the step that they make without."""
    real, cuda = zero.deepspeed_config, torch.cuda.is_available

    def settings_of_a_gpu(*args):
        torch.cuda.is_available = lambda: True
        try:
            return real(*args)
        finally:
            torch.cuda.is_available = cuda

    ids = torch.randint(3, 2048, (3, 1, 6), generator=torch.Generator().manual_seed(7))
    for stage in (0, 1, 2, 3):
        steps = []
        for settings in (real, settings_of_a_gpu):
            zero.deepspeed_config = settings
            engine = zero_gathers.engine_of(big_llama(), stage)
            zero.deepspeed_config = real
            for row in ids:
                logits = engine(input_ids=row).logits
                engine.backward(logits.square().sum(), normaliser=row.numel())
            norm = engine.step()["grad_norm"]
            with zero.gathered(engine.module.parameters()):
                steps.append([norm, [p.detach().clone() for p in engine.module.parameters()]])
        overlaps = engine.engine._config.zero_config.overlap_comm
        assert overlaps is (stage >= 2), f"ZeRO-{stage}: overlap_comm {overlaps}"
        (norm, expected), (again, weights) = steps
        assert norm == again > 0 and all(map(torch.equal, weights, expected)), f"ZeRO-{stage}"
    print("held: overlapped")


def moments():
    """What AdamW's first steps keep, counted tensor by tensor, is what was said to come; and
    nothing comes to a device that the optimizer is not on."""
    ids = torch.ones(1, 4, dtype=torch.int64)
    for dtype, stage in (("fp32", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3)):
        how, model = RunConfig().pick(zero.Training), big_llama().to(zero.DTYPES[dtype])
        engine = zero.TrainEngine(model, how, dtype=dtype, zero_stage=stage, total_steps=9)
        said = engine.moments_to_come(torch.device("cpu"))
        assert engine.moments_to_come(torch.device("meta")) == 0
        before = tensor_bytes()
        for _ in range(2):
            engine.backward(engine(input_ids=ids).logits.sum(), normaliser=1)
            engine.step()
        kept = sum(n for at, n in tensor_bytes().items() if at not in before)
        assert said > 1e6 and abs(kept / said - 1) < 1e-3, (dtype, stage, kept, said)
        assert engine.moments_to_come(torch.device("cpu")) == 0
        del engine
    print("held: moments")


def main() -> None:
    for name in sys.argv[1:]:
        globals()[name]()


if __name__ == "__main__":
    main()
