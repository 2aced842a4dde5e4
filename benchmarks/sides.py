"""Our sides of the throughput benchmarks, plain `generate`, and the machine's own speed.

Each function is run by benchmarks.worker in a process of its own.
"""

import importlib
import sys
import time

import torch

from utils import report as reporting
from utils.data import prompts as prompt_data
from utils.data import tables


def step(turns, module: str, argv: list[str]) -> None:
    """A step's own main() as users run it. A turn is one pass of its loop, through the line that
    logs it; the numbers logged come with it."""
    log = reporting.Report.log
    begun = False

    def log_and_wait(report, step, metrics, show=()):
        nonlocal begun
        log(report, step, metrics, show)
        if not begun:
            begun = True
            turns.ready()
        else:
            turns.done(metrics={k: float(v) for k, v in metrics.items()})

    reporting.Report.log = log_and_wait
    sys.argv = [module, *argv]
    importlib.import_module(module).main()


def rollout(turns, argv: list[str]) -> None:
    """The rollouts of step 3 without its updates: generate, and score by a reward function that
    takes no time. A turn is one `collect`."""
    from step3_ppo import old_logprobs
    from step3_ppo import rollout as rollouts
    from step3_ppo.config import PPOConfig
    from step3_ppo.models import build
    from utils.data import chat_template, rows
    from utils.distributed import process_group, program, zero
    from utils.settings import command_line

    config = command_line.build(PPOConfig, argv, world_size=1)
    program.quiet_libraries()
    device = process_group.init()
    torch.manual_seed(config.seed)
    tokenizer = chat_template.load_tokenizer(config.model_name_or_path)
    bad = rows.BadRows()
    loaded = prompt_data.load_prompts(config.prompt_data, split_role="train", bad=bad)
    encode = prompt_data.Encode(tokenizer, config.max_prompt_length, "cut")
    prompts, _ = tables.encode_all(loaded, encode, bad)
    prompts = prompts[: config.prompts_per_rollout]
    models = build(config, tokenizer, zero.resolve_dtype(config.dtype, device), device)
    if config.logprobs_from == "auto":
        config.logprobs_from = old_logprobs.choose(models, prompts, config, device, print)
    turns.ready()
    turn = 0
    while True:
        found, seconds = rollouts.collect(models, prompts, config, device, noise_step=turn)
        turns.done(seconds_generate=seconds["seconds_generate"], tokens=answered(found))
        turn += 1


def answered(rollout) -> int:
    return int(rollout.response_mask.sum())


def generate(
    turns,
    folder: str,
    prompts: list[list[int]],
    new_tokens: int,
    dtype: str,
    cache: str | None = None,
) -> None:
    """`generate` of plain transformers, sampling, on the whole batch at once. cache: "static" is
    the one with which it compiles its decode step on a GPU by itself."""
    from transformers import AutoModelForCausalLM

    from utils.distributed import program, zero

    program.quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=zero.DTYPES[dtype]).to(device).eval()
    ids = torch.tensor(prompts, device=device)
    sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    sampling |= {"cache_implementation": cache} if cache else {}
    turns.ready()
    while True:
        started = time.perf_counter()
        with torch.no_grad():
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **sampling
            )
        answers = whole[:, ids.shape[1] :].cpu()
        seconds = time.perf_counter() - started
        stopped = (answers == model.config.eos_token_id).long()
        tokens = int((stopped.cumsum(1) - stopped == 0).sum())
        turns.done(seconds_generate=seconds, tokens=tokens)


def rates(turns) -> None:
    """What the machine gives at best: GEMM in fp32 and bf16 (floating-point operations a second)
    and, of a GPU, its memory (bytes a second). The floors are measured against these."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 512
    pairs = {
        name: [torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)]
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }

    def fastest(work, seconds: float = 0.4) -> float:
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            started = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return best

    turns.ready()
    while True:
        found = {
            name: 2 * size**3 / fastest(lambda a=a, b=b: a @ b) for name, (a, b) in pairs.items()
        }
        if device == "cuda":
            big = torch.empty(2**30, dtype=torch.uint8, device=device)
            copy = torch.empty_like(big)
            found["memory"] = 2 * big.numel() / fastest(lambda: copy.copy_(big))  # noqa: B023
        turns.done(**found)
