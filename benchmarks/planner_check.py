r"""Does the planner tell the truth? Predicted peaks of memory beside measured ones.

    python benchmarks/planner_check.py [--cases sft-20M-fp32-zero0 …] [--output planner_check.json]
    python benchmarks/planner_check.py --device cuda    # Qwen2.5's shapes, bytes by torch's count
    python benchmarks/planner_check.py --device cuda --card_gb 24 \
        --cases ppo-7B-bf16-zero0-shared-4bit-long      # in so much of a larger GPU

Each case trains in processes of its own: real engines (zero.TrainEngine) around random models, two
optimizer steps of SFT or two rollouts of PPO with all its models, rows at their full length.
Measured is the peak of the resident memory (VmHWM) above what the process held before it built its
models, when everything had been imported and run once on a model of a few thousand weights. glibc
is told to give freed memory back, so that the peak is of what was alive.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VOCABULARY = 8192
SIZES = {  # hidden, intermediate, layers
    "warmup": (64, 128, 2),
    "20M": (512, 1408, 4),
    "60M": (768, 2048, 7),
    "90M": (896, 2432, 8),
    "100M": (960, 2560, 8),
    "150M": (1024, 2816, 10),
}
QWEN = {"q0.5B": "qwen2.5-0.5b", "q1.5B": "qwen2.5-1.5b"}  # workload.SHAPES
LARGE = (*QWEN, "7B")  # the last is Llama-2's, docs/shapes/7b
SETTINGS = {
    "sft": {"micro_batch_size": 4, "global_batch_size": 8, "max_length": 256},
    "ppo": {
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "prompts_per_rollout": 16,
        "max_prompt_length": 64,
        "max_response_length": 32,
    },
}
MORE = {  # by a word of a case's name
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing3": {"gradient_checkpointing": True, "checkpoint_layers": 3},
    "frozen4": {"freeze": ["embed", r"layers\.[0-3]\."]},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "lora": {"lora_rank": 8},
    "4bit": {"lora_rank": 8, "load_in_4bit": True},
    "8bit": {"lora_rank": 8, "load_in_8bit": True},
    "nlpo": {"algorithm": "nlpo"},
    # A row of docs/scaling.md, with answers of half the length and adapters of rank 8.
    "long": {
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "prompts_per_rollout": 8,
        "max_prompt_length": 1536,
        "max_response_length": 512,
        "gradient_checkpointing": True,
        "release_decode_memory": True,
        "ema_decay": 0.0,
    },
}
# Of the large shapes: long enough that what is not a weight counts.
LONGER = {
    "sft": {"micro_batch_size": 8, "global_batch_size": 16, "max_length": 512},
    "ppo": SETTINGS["ppo"] | {"max_prompt_length": 128, "max_response_length": 128},
}
CASES_ON_GPU = [
    *(f"{step}-{size}-bf16-zero0" for size in QWEN for step in ("sft", "ppo")),
    "sft-q1.5B-bf16-zero0-checkpointing",
    "ppo-q0.5B-bf16-zero3",
    # The second needs requirements-quantised.txt.
    "ppo-q1.5B-bf16-zero0-shared",
    "ppo-q1.5B-bf16-zero0-shared-4bit",
]
CASES = [
    *(f"sft-{size}-{dtype}-zero0" for size in ("20M", "60M", "150M") for dtype in ("fp32", "bf16")),
    *(f"ppo-{size}-{dtype}-zero0" for size in ("20M", "60M", "90M") for dtype in ("fp32", "bf16")),
    "ppo-100M-fp32-zero0",
    "ppo-100M-fp32-zero0-shared",
    "sft-60M-fp32-zero0-checkpointing",
    "sft-60M-fp32-zero0-checkpointing3",
    "sft-60M-fp32-zero0-frozen4",
    "sft-60M-fp32-zero0-lora",
    "ppo-60M-fp32-zero0-nlpo",
    # These need requirements-quantised.txt.
    "sft-60M-fp32-zero0-adamw8bit",
    "sft-60M-fp32-zero0-4bit",
    "ppo-100M-fp32-zero0-shared-4bit",
    "sft-60M-fp32-zero2-2ranks",
    "sft-60M-bf16-zero2-2ranks",
    "sft-60M-fp32-zero3-2ranks",
    "sft-60M-bf16-zero3-2ranks",
    "ppo-20M-fp32-zero3-2ranks",
    "ppo-20M-bf16-zero2-2ranks",
]


def config_of(case: str, folder: Path):
    """(step, size, dtype, ranks, the step's config) that a case's name means."""
    from step1_sft.config import SFTConfig
    from step3_ppo.config import PPOConfig

    step, size, dtype, stage, *more = case.split("-")
    ranks = 2 if "2ranks" in more else 1
    model = str(folder / size)
    given = (LONGER if size in LARGE else SETTINGS)[step] | {
        "output_dir": str(folder / "run"),
        "model_name_or_path": model,
        "zero_stage": int(stage.removeprefix("zero")),
        "dtype": dtype,
    }
    if "shared" in more:  # four models as adapters on one base
        given |= {"lora_rank": 8, "share_backbone": "actor,critic,reward"}
    for word in more:
        given |= MORE.get(word, {})
    if step == "ppo":
        kind = "adapter" if "shared" in more else "reward"
        given["reward_model"] = str(folder / f"{size}-{kind}")
    return step, size, dtype, ranks, (SFTConfig if step == "sft" else PPOConfig)(**given)


def write_models(folder: Path, size: str, kinds: set[str], device: str) -> None:
    """A random Llama of that size with its tokenizer, Qwen2.5's shapes by name, the large ones in
    bf16. kinds: `reward`: a reward model too; `adapter`: one that stands on the Llama."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        LlamaConfig,
    )

    from benchmarks import workload
    from utils.models import adapters, from_scratch
    from utils.models.adapters import Lora

    words = [f"{a}{b} says {b}{a}." for a in "abcdefghij" for b in "klmnopqrst"]
    tokenizer = from_scratch.train_tokenizer(words * 3, 400)
    if size in QWEN:
        config = workload.model_config(workload.SHAPES[QWEN[size]])
    elif size in LARGE:
        config = AutoConfig.from_pretrained(ROOT / "docs/shapes/7b")
    else:
        hidden, intermediate, layers = SIZES[size]
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            tie_word_embeddings=False,
            bos_token_id=None,
        )
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    dtype = torch.bfloat16 if size in LARGE else torch.float32

    def write(auto_class, name: str) -> None:
        with torch.device(device):
            model = auto_class.from_config(config, dtype=dtype)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    write(AutoModelForCausalLM, size)
    config.num_labels, config.reward_read_at = 1, "stop"  # as step 2 saves them
    if "reward" in kinds:
        write(AutoModelForSequenceClassification, f"{size}-reward")
    if "adapter" in kinds:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
            adapters.put_on(model, str(folder / size), Lora(lora_rank=8))
        state = {name: torch.zeros(p.shape, dtype=dtype) for name, p in adapters.own_of(model)}
        tokenizer.save_pretrained(folder / f"{size}-adapter")
        adapters.save(model, state, folder / f"{size}-adapter")


# In the process that is measured.


def status(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}")


def train_sft(config, dtype: str, device) -> None:
    """Two optimizer steps on random rows of --max_length."""
    import torch

    from step1_sft.main import response_loss
    from utils.distributed import process_group, zero
    from utils.models import freezing, language_model
    from utils.models.adapters import Lora
    from utils.models.freezing import Freezing

    model = language_model.load(
        config,
        config.model_name_or_path,
        dtype=dtype,
        zero_stage=config.zero_stage,
        lora=config.pick(Lora),
    )
    freezing.apply(model, config.pick(Freezing))
    engine = zero.TrainEngine(
        model,
        config.pick(zero.Training, learning_rate=1e-5),
        dtype=dtype,
        zero_stage=config.zero_stage,
        total_steps=2,
    )
    shape = (config.micro_batch_size, config.max_length)
    ids = torch.randint(10, 300, shape, device=device)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    mask[0, -1] = False  # rows of one length would need no attention mask
    together = config.micro_batch_size * process_group.world_size()
    for _ in range(2):
        for _ in range(config.global_batch_size // together):
            loss, count = response_loss(engine, ids, mask, mask)
            engine.backward(loss, normaliser=count)
        engine.step()


def train_ppo(config, dtype: str, device) -> None:
    """Two rollouts of random prompts of --max_prompt_length, with their updates."""
    import torch

    from step3_ppo import rollout as rollouts
    from step3_ppo.checks.watch import Watch
    from step3_ppo.experience import make_experience
    from step3_ppo.models import build
    from step3_ppo.state import State
    from step3_ppo.update import train_on
    from utils.data import chat_template
    from utils.run import BadSteps

    tokenizer = chat_template.load_tokenizer(config.model_name_or_path)
    models = build(config, tokenizer, dtype, device)
    state, watch = (
        State(kl_coef=config.kl_coef),
        Watch(config, print, BadSteps(0, print, lambda: None)),
    )
    generator = torch.Generator().manual_seed(0)
    # One prompt is a token shorter, so that there is something to mask.
    lengths = [config.max_prompt_length - (i == 0) for i in range(config.rollout_size())]
    prompts = [
        rollouts.Prompt((), "", {}, torch.randint(10, 300, (n,), generator=generator).tolist())
        for n in lengths
    ]
    for step in range(2):
        rollout, _ = rollouts.collect(models, prompts, config, device, noise_step=step)
        experience, _ = make_experience(rollout, config, state)
        train_on(models, experience, config, device, step, watch)


def measure(case: str, folder: Path, card_gb: float) -> None:
    """Trains the warmup model, then the case's; rank 0 prints the bytes of the second's peak.
    card_gb: of a smaller card, beyond which this GPU then gives no memory."""
    import torch

    from utils.distributed import process_group
    from utils.distributed.program import quiet_libraries

    quiet_libraries()
    device = process_group.init()
    step, size, dtype, _, config = config_of(case, folder)
    train = train_sft if step == "sft" else train_ppo
    if card_gb:
        there = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(card_gb * 1e9 / there, device)
    train(config_of(case.replace(size, "warmup"), folder)[-1], dtype, device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        process_group.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before, peak = status("VmRSS"), lambda device: status("VmHWM")
    train(config, dtype, device)
    if process_group.is_main():
        print("measured", peak(device) - before, flush=True)
    process_group.shut_down()
    process_group.end_process()


# In the process that compares.


def run_case(case: str, folder: Path, device: str, card_gb: float) -> dict:
    """{case, predicted, measured, ratio, phase}, bytes."""
    from utils.distributed import process_group
    from utils.planner import plan as planner

    step, size, dtype, ranks, config = config_of(case, folder)
    found = planner.plan(config.workload(), dtype, ranks, device)
    port = str(process_group.free_port())
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "DS_ACCELERATOR": device,
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        }
        command = [sys.executable, __file__, "--measure", case, "--folder", str(folder)]
        command += ["--card_gb", str(card_gb)]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [p.communicate(timeout=900) for p in processes]
    finally:
        for p in processes:
            p.kill()
    if any(p.returncode for p in processes):
        raise SystemExit(f"{case} failed:\n" + "\n".join(err[-3000:] for _, err in outputs))
    line = next(x for x in outputs[0][0].splitlines() if x.startswith("measured "))
    measured = int(line.split()[1])
    ratio = found.peak / measured
    return {
        "case": case,
        "predicted": found.peak,
        "measured": measured,
        "ratio": ratio,
        "phase": found.worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", help="default: all of the device")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--card_gb", type=float, default=0.0, help="a smaller GPU than there is")
    parser.add_argument("--output", default="planner_check.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    cases = asked.cases or (CASES if asked.device == "cpu" else CASES_ON_GPU)
    if asked.measure:
        measure(asked.measure, Path(asked.folder), asked.card_gb)
        return
    from utils.distributed.program import quiet_libraries

    quiet_libraries()
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"warmup": set()}
        for case in cases:
            step, size, *words = case.split("-")
            if step == "ppo":
                for model in (size, "warmup"):
                    kind = "adapter" if "shared" in words else "reward"
                    sizes.setdefault(model, set()).add(kind)
            sizes.setdefault(size, set())
        for size, kinds in sizes.items():
            write_models(folder, size, kinds, asked.device)
        print("| case | predicted, MB | measured, MB | ratio | predicted peak in | seconds |")
        print("| --- | --- | --- | --- | --- | --- |")
        for case in cases:
            started = time.time()
            found = run_case(case, folder, asked.device, asked.card_gb)
            results.append(found)
            predicted, measured = (found[x] / 1e6 for x in ("predicted", "measured"))
            print(
                f"| {case} | {predicted:.0f} | {measured:.0f} | {found['ratio']:.3f} | "
                f"{found['phase']} | {time.time() - started:.0f} |",
                flush=True,
            )
    Path(asked.output).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
