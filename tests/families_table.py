"""A table of family × step × ZeRO stage: python -m tests.families_table [FAMILY …] [--ranks N]

Each family starts from the folder that family_folders.py writes, as if downloaded, and walks SFT,
the reward model, PPO with its self-check and the prompt script, all under ZeRO 0 and 3. A cell is
"ok" where the program ended well and its figures say what they must; those under ZeRO-3 must be
those under ZeRO-0. Below the table stands why each other cell is not. Exit code 1 unless all is ok.

"custom code" stands for families that bring their Python files: Baichuan, the first Qwen, ChatGLM,
InternLM 1 and 2. Their published files index past_key_values, which the caches of transformers 5
no longer allow, in its own generate() either; files written for transformers 5 are needed.
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import queue
import random
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.helpers import family_folders  # noqa: E402
from utils import report as reporting  # noqa: E402
from utils.distributed import process_group  # noqa: E402

LIMIT = 600  # seconds a family may take
STEPS = ("sft", "reward", "ppo", "prompts")
COLUMNS = [f"{step} {stage}" for step in STEPS for stage in (0, 3)]
NOT_REACHED = "not reached"  # as an earlier step under the same ZeRO stage failed
# fp32 sums in another order, a few Adam steps later.
CLOSE = 2e-3


def data(folder: Path) -> list[str]:
    """sft.jsonl, pairs.jsonl, prompts.jsonl: one and two questions a row; all their texts."""
    draw = random.Random(0)
    names, things = "Tom Ann Bob Eva Sam 小明 小红".split(), "tea milk rain snow 花 鱼".split()

    def turns(i: int) -> list[dict]:
        """Another question for each i; the answer is told by it."""
        name, thing = names[i % len(names)], things[i // len(names) % len(things)]
        said = [{"role": "user", "content": f"What does {name} like, {i} times?"}]
        said.append({"role": "assistant", "content": f"{name} likes {thing}."})
        if i % 3 == 0:  # an earlier turn
            said += [{"role": "user", "content": f"And {names[i % 5]}?"}]
            said += [{"role": "assistant", "content": f"{names[i % 5]} likes it, too."}]
        return said

    rows = {"sft": [], "pairs": [], "prompts": []}
    for i in range(60):
        rows["sft"].append({"messages": turns(i)})
        said = turns(100 + i)
        worse = {"role": "assistant", "content": draw.choice(["No no no.", "不知道 no."])}
        rows["pairs"].append({"chosen": said, "rejected": [*said[:-1], worse]})
        rows["prompts"].append({"messages": turns(200 + i)[:-1]})
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in found]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return [turn["content"] for row in rows["sft"] for turn in row["messages"]]


def jobs(folder: Path, name: str):
    """(column, program, arguments) of each cell but the prompts', in their order."""
    out = {(s, z): folder / f"{s}{z}" for s in STEPS for z in (0, 3)}
    for stage in (0, 3):
        common = ["--zero_stage", stage, "--dtype", "fp32", "--tensorboard", "false"]
        common += ["--trust_remote_code", str(name == family_folders.CUSTOM).lower()]
        sizes = ["--global_batch_size", 8, "--micro_batch_size", 4, *common]
        rows = ["--eval_fraction", 0.2, "--max_length", 224, *sizes]
        yield (
            f"sft {stage}",
            "step1_sft/main.py",
            ["--model_name_or_path", folder / "base", "--sft_data", folder / "data/sft.jsonl"]
            + ["--output_dir", out["sft", stage], "--max_steps", 6, "--learning_rate", 5e-3]
            + ["--sample_answers", 1, *rows],
        )
        yield (
            f"reward {stage}",
            "step2_reward/main.py",
            ["--model_name_or_path", out["sft", stage], "--max_steps", 6]
            + ["--preference_data", folder / "data/pairs.jsonl", "--learning_rate", 5e-3]
            + ["--output_dir", out["reward", stage], *rows],
        )
        yield (
            f"ppo {stage}",
            "step3_ppo/main.py",
            ["--model_name_or_path", out["sft", stage], "--reward_model", out["reward", stage]]
            + ["--prompt_data", folder / "data/prompts.jsonl", "--output_dir", out["ppo", stage]]
            + ["--preference_data", folder / "data/pairs.jsonl", "--max_steps", 2]
            + ["--prompts_per_rollout", 8, "--max_prompt_length", 160, "--max_response_length", 12]
            + ["--max_eval_rows", 4, "--learning_rate", 1e-4, "--eval_fraction", 0.2]
            + ["--ema_decay", 0.9, *sizes],
        )
        yield (
            f"prompts {stage}",
            "evaluation/prompt_eval.py",
            ["--checkpoints", out["sft", stage], out["ppo", stage] / "actor"]
            + ["--prompts", folder / "data/prompts.jsonl", "--max_prompts", 4]
            + ["--reward_model", out["reward", stage], "--output_dir", out["prompts", stage]]
            + ["--max_new_tokens", 8, "--dtype", "fp32", *common[-2:]],
        )


def read(column: str, folder: Path) -> dict[str, float]:
    """The figures of a cell, checked. Raises AssertionError with what is wrong."""
    step, stage = column.split()
    out = folder / f"{step}{stage}"
    if step == "prompts":
        lines = (out / "0/answers.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 2 * 4, f"{len(rows)} answers"
        assert all(row["tokens"] > 0 and math.isfinite(row["score"]) for row in rows), rows
        return {"score": sum(row["score"] for row in rows[::2])}
    result = json.loads((out / "result.json").read_text())
    if step == "sft":
        before, after = result["eval_loss_before"], result["eval_loss_after"]
        assert after < before - 0.2, f"held-out loss {before} → {after}"
        return {"loss": after}
    if step == "reward":
        assert result["accuracy"] > 0.8, f"accuracy {result['accuracy']}"
        return {"accuracy": result["accuracy"]}
    assert (out / "actor_ema/config.json").exists() and (out / "critic/config.json").exists()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {"kl": lines[-1]["kl"], "score": next(x["score"] for x in lines if "score" in x)}
    assert all(map(math.isfinite, found.values())), found
    return found


def differences(cells: dict, figures: dict) -> None:
    """Mark as failed the steps of ZeRO-3 whose figures are not those of ZeRO-0."""
    for step in STEPS:
        one, other = figures.get(f"{step} 0"), figures.get(f"{step} 3")
        if one and other:
            apart = {
                k: (one[k], other[k])
                for k in one
                if abs(one[k] - other[k]) > CLOSE * (1 + abs(one[k]))
            }
            if apart:
                cells[f"{step} 3"] = f"not ZeRO-0's: {apart}"


def walk(name: str, folder: Path, rank: int, ranks: int, port: int, answers) -> None:
    """One rank of one family: (cells, seconds of each) into `answers`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = open(folder / f"log{rank}.txt", "w")
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    device = process_group.init()
    if rank == 0:
        family_folders.write(folder / "base", name, data(folder / "data"))
    process_group.barrier()
    process_group.init = lambda timeout_minutes=30.0: device
    process_group.shut_down = process_group.barrier
    cells, figures, seconds = {}, {}, {}
    for column, program, argv in jobs(folder, name):
        began = time.time()
        if any(problem for other, problem in cells.items() if other[-1] == column[-1]):
            cells[column] = NOT_REACHED
        else:
            cells[column] = _run(program, argv, rank)
            if rank == 0 and not cells[column]:
                try:
                    figures[column] = read(column, folder)
                except (AssertionError, OSError, KeyError) as error:
                    cells[column] = f"{type(error).__name__}: {error}"
        found = process_group.gather_objects(cells[column])  # all go on together, or none
        cells[column] = next(filter(None, found), "")
        seconds[column] = time.time() - began
    if rank == 0:
        differences(cells, figures)
        answers.put((name, cells, figures, seconds))


def _run(program: str, argv: list, rank: int) -> str:
    """Run a program's main here; what ended it, or nothing."""
    spec = importlib.util.spec_from_file_location(program.replace("/", "_"), ROOT / program)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.argv, world = [program, *map(str, argv)], os.environ["WORLD_SIZE"]
    if program.startswith("evaluation"):
        # A program for one process: each rank is one, as each has joined a group that loads models
        # together, and writes a folder of its own.
        os.environ["WORLD_SIZE"] = "1"
        sys.argv[sys.argv.index("--output_dir") + 1] += f"/{rank}"
    print(f"=== {' '.join(sys.argv)}", flush=True)
    try:
        module.main()
    except SystemExit as ended:
        return "" if not ended.code else str(ended.code)
    except Exception as error:  # whatever a family runs into is what the table shows
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    finally:
        os.environ["WORLD_SIZE"] = world
    return ""


def one_family(context, name: str, folder: Path, ranks: int):
    """Walk a family in processes of its own, so that none finds what another left."""
    answers, port = context.Queue(), process_group.free_port()
    folder.mkdir(parents=True)
    given = [(name, folder, rank, ranks, port, answers) for rank in range(ranks)]
    processes = [context.Process(target=walk, args=arguments) for arguments in given]
    for process in processes:
        process.start()
    try:
        found = answers.get(timeout=LIMIT)
    except queue.Empty:
        found = name, dict.fromkeys(COLUMNS, f"no answer in {LIMIT} s"), {}, {}
    for process in processes:
        process.join(10)
        process.kill()
    if any(found[1].values()):
        print(f"{name}: {folder}/log0.txt", flush=True)
    return found


def show(results: dict[str, dict[str, str]]) -> bool:
    """Print {family: {column: what went wrong, or nothing}} and below it the causes; is all ok?"""
    notes, lines = [], []
    for name, cells in results.items():
        line = [name]
        for column in COLUMNS:
            problem = cells.get(column, "not run")
            if problem == NOT_REACHED:
                line.append("–")
            elif problem:
                notes.append(f"{name}, {column}: {problem[:600]}")
                line.append(f"FAILS ({len(notes)})")
            else:
                line.append("ok")
        lines.append(line)
    print("\n" + reporting.table(lines, ["family", *(f"{c[:-2]} ZeRO-{c[-1]}" for c in COLUMNS)]))
    for number, note in enumerate(notes, 1):
        print(f"({number}) {note}")
    for name, cause in family_folders.ABSENT.items():
        print(f"not in the table: {name}, as {cause}")
    return not notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", default=list(family_folders.NAMES))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--keep", default="", help="folder for what the runs write")
    given = parser.parse_args()
    if unknown := set(given.families) - set(family_folders.NAMES):
        raise SystemExit(f"no families {unknown}; there are {', '.join(family_folders.NAMES)}")
    began = time.time()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["families_preloaded"])
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(given.keep or temporary)
        os.environ |= {
            "HF_MODULES_CACHE": str(root / "modules"),
            "HF_DATASETS_CACHE": str(root / "data"),
        }
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        at_once = max(1, (os.cpu_count() or 1) // given.ranks)
        with ThreadPoolExecutor(at_once) as pool:
            tasks = [
                pool.submit(one_family, context, name, root / name.replace(" ", "_"), given.ranks)
                for name in given.families
            ]
            results = {}
            for task in tasks:
                name, cells, figures, seconds = task.result()
                results[name] = cells
                print(f"{name}: {sum(seconds.values()):.0f} s {figures}", flush=True)
        well = show(results)
    print(f"{time.time() - began:.0f} s, {given.ranks} ranks")
    sys.exit(not well)


if __name__ == "__main__":
    main()
