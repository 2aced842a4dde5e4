"""How long training stands still for one checkpoint, with and without the background writer.

    python benchmarks/checkpoint_pause.py [--hidden 512] [--layers 10] [--rounds 3]

Trains a random Llama and saves after every sixth step, in turn with --save_in_background off and
on. Training stands still while it saves and seals; beside that the writer's CPU seconds and what
the steps take longer while it writes. Time in which a thread waits for a core is not counted, so
these are the figures of a machine with a core for training and one for the writer.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

STEPS_A_CHECKPOINT = 6


def engine_of(arguments, folder: Path):
    """(engine, tokenizer, config, device) of a random Llama with the embedded task's tokenizer."""
    from utils.data import chat_template, toy_tasks
    from utils.distributed import process_group, zero
    from utils.models import from_scratch, language_model

    device = process_group.init()
    torch.set_num_threads(1)  # training has one core; what other threads take is the writer's
    toy_tasks.write(folder / "data", 0, demonstrations=240, prompts=20, held_out=5)
    from_scratch.build(
        folder / "base",
        from_scratch.texts_of([str(folder / "data/sft.jsonl")]),
        vocab_size=512,
        hidden_size=arguments.hidden,
        layers=arguments.layers,
        heads=8,
        intermediate_size=4 * arguments.hidden,
        max_positions=arguments.tokens,
        seed=0,
    )
    base = str(folder / "base")
    from utils.settings.run_config import RunConfig

    config = RunConfig(
        output_dir=str(folder / "out"),
        model_name_or_path=base,
        micro_batch_size=arguments.rows,
        dtype=arguments.dtype,
        save_every=0,
        save_every_minutes=0.0,
    )
    tokenizer = chat_template.load_tokenizer(base)
    common = dict(dtype=arguments.dtype, zero_stage=0)
    model = language_model.load(config, base, tokenizer=tokenizer, **common)
    engine = zero.TrainEngine(model, config.pick(zero.Training), total_steps=10**6, **common)
    return engine, tokenizer, config, device


def checkpoints_of(engine, tokenizer, config, how: str):
    import dataclasses

    from utils.checkpoints.checkpoints import Checkpoints, Saving
    from utils.checkpoints.model_folder import ModelFolder

    class Quiet:
        def say(self, text: str) -> None:
            pass

    config = dataclasses.replace(
        config, save_in_background=how, output_dir=f"{config.output_dir}/{how}"
    )
    run = Checkpoints(config.pick(Saving), {}, None, Quiet())
    run.follow({"model": engine}, {}, {".": ModelFolder(engine.module, tokenizer, "")}, "")
    return run


def timed(action) -> float:
    """Seconds, but those in which this thread was ready and other work had the cores."""
    began = time.perf_counter() - _seconds_without_a_core()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - _seconds_without_a_core() - began


def _seconds_without_a_core() -> float:
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def measure(arguments, folder: Path) -> list[tuple[float, ...]]:
    """For each round the seconds of a step, that training stood still for a checkpoint without
    the thread and with it, that the steps beside the thread took longer, and its CPU seconds."""
    engine, tokenizer, config, device = engine_of(arguments, folder)
    runs = {how: checkpoints_of(engine, tokenizer, config, how) for how in ("off", "on")}
    ids = torch.randint(10, 300, (arguments.rows, arguments.tokens), device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)

    def train() -> None:
        out = engine(input_ids=ids, attention_mask=mask.long(), labels=ids)
        engine.backward(out.loss, normaliser=1)
        engine.step()

    number, found = 0, []
    for _ in range(2):
        train()
    for _ in range(arguments.rounds + 1):
        calm, beside, pause, cpu = [], [], {}, {}
        for how, run in runs.items():
            cpu[how] = time.thread_time() - time.process_time()
            number += 1
            pause[how] = timed(lambda run=run, number=number: run.save(number))
            for _ in range(STEPS_A_CHECKPOINT):
                writing = run._writing()
                (beside if writing else calm).append(timed(train))
                number += 1
                pause[how] += timed(lambda run=run, number=number: run.after_step(number, {}))
            pause[how] += timed(run.seal)  # where the disk is slower than six steps
            cpu[how] += time.process_time() - time.thread_time()
        step = statistics.median(calm)
        longer = sum(beside) - step * len(beside)
        found.append((step, pause["off"], pause["on"], longer, cpu["on"] - cpu["off"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--folder", default=None, help="on the disk to measure; default: /tmp's")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from utils.distributed import process_group, program

    program.quiet_libraries()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(arguments, Path(folder))
        size = sum(p.stat().st_size for p in Path(folder, "out").rglob("*") if p.is_file()) / 4
    print(f"one checkpoint: {size / 1e6:.0f} MB; the first of each kind also takes its memory")
    print("a step s | stands still off s | on s | in steps: off | on | beside, longer s | writer s")
    for step, off, on, longer, cpu in found:
        shares = f"{off / step:.3f} | {on / step:.3f}"
        print(f"{step:.3f} | {off:.3f} | {on:.3f} | {shares} | {longer:.3f} | {cpu:.3f}")
    process_group.shut_down()


if __name__ == "__main__":
    main()
