"""What a method gained and what it forgot: held-out tasks by skill, checkpoint beside checkpoint.

python evaluation/benchmarks.py --checkpoints output/step1_sft output/step3_ppo/actor \\
    --prompts held_out.jsonl

Prompts of the embedded task are judged by its program. With --lm_eval_tasks those of
lm-evaluation-harness follow, where it is installed.
"""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import numpy as np
import torch

from evaluation import pages, prompt_eval, questions
from utils import whole_files
from utils.confidence import interval_by_prompt
from utils.data import toy_tasks
from utils.distributed import program, zero
from utils.models import value_heads
from utils.report import table
from utils.settings import command_line
from utils.settings.fields import setting
from utils.terminal import visible


@dataclass
class BenchmarksConfig(prompt_eval.PromptEvalConfig):
    """Answers come about as in prompt_eval.py."""

    show_answers: bool = setting(False, "print each answer as it comes")
    lm_eval_tasks: list[str] = setting(
        [], "tasks of lm-evaluation-harness: names, or YAML files of your own"
    )
    lm_eval_limit: int = setting(0, "rows of each such task; 0: all")

    def contradictions(self, world_size: int) -> Iterator[str]:
        yield from super().contradictions(world_size)
        if not self.prompts and not self.lm_eval_tasks:
            yield "nothing to measure; set --prompts (of the embedded task) or --lm_eval_tasks"
        if self.reward_model:
            yield (
                "reward_model is not read here; leave out --reward_model, or see "
                "evaluation/win_rate.py"
            )
        if self.lm_eval_tasks and importlib.util.find_spec("lm_eval") is None:
            yield (
                "lm_eval_tasks needs lm-evaluation-harness, which is not installed: "
                "pip install -r requirements-eval.txt, or leave out --lm_eval_tasks"
            )


def by_skill(asked, results) -> dict[str, dict]:
    """{skill: {"prompts": n, "checkpoints": {name: [share right, low, high]}, "changes": {name:
    [change to the first checkpoint, low, high]}}}, with intervals by prompt; "all" comes last."""
    right = {
        name: np.array(
            [toy_tasks.verify(q.row, a.answer) for q, (a,) in zip(asked, groups, strict=True)],
            float,
        )
        for name, groups in results.items()
    }
    skills = np.array([question.row["family"] for question in asked])
    first = next(iter(right.values()))
    found = {}
    for skill in [*sorted(set(skills)), "all"]:
        chosen = np.flatnonzero((skills == skill) | (skill == "all"))
        found[str(skill)] = {
            "prompts": len(chosen),
            "checkpoints": {n: share(x[chosen], chosen) for n, x in right.items()},
            "changes": {n: change(first[chosen], x[chosen], chosen) for n, x in right.items()},
        }
    return found


def share(values: np.ndarray, prompts: np.ndarray) -> list[float]:
    return [float(values.mean()), *interval_by_prompt(values, prompts)]


def change(before: np.ndarray, after: np.ndarray, prompts: np.ndarray) -> list[float]:
    """Of shares, prompt by prompt: [mean, low, high]. Computed of (1 + change) / 2, a share too."""
    half = share((1 + after - before) / 2, prompts)
    return [2 * x - 1 for x in half]


def verdict(changed: list[float]) -> str:
    if changed[1] > 0:
        return "gained"
    return "forgot" if changed[2] < 0 else ""


def skill_table(found: dict[str, dict]) -> str:
    names = list(next(iter(found.values()))["checkpoints"])
    lines = []
    for skill, row in found.items():
        cells = [visible(skill), row["prompts"], f"{row['checkpoints'][names[0]][0]:.3f}"]
        for name in names[1:]:
            changed = row["changes"][name]
            cells.append(f"{row['checkpoints'][name][0]:.3f}")
            cells.append("{:+.3f} ({:+.3f} to {:+.3f}) {}".format(*changed, verdict(changed)))
        lines.append(tuple(cells))
    header = ["skill", "prompts", visible(names[0])]
    for name in names[1:]:
        header += [visible(name), "change"]
    return table(lines, tuple(header)) + "\n(…): 95 % interval of the change, by prompt"


def of_harness(config, checkpoint: str) -> dict[str, dict]:
    """{task: {metric: value}} as lm-evaluation-harness measures a checkpoint."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    value_heads.check_not_there(checkpoint, config.trust_remote_code)
    folders = sorted({str(Path(t).parent) for t in config.lm_eval_tasks if t.endswith(".yaml")})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = zero.DTYPES[zero.resolve_dtype(config.dtype, device)]
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": checkpoint,
            "dtype": str(dtype).removeprefix("torch."),
            "trust_remote_code": config.trust_remote_code,
        },
        tasks=[Path(t).stem if t.endswith(".yaml") else t for t in config.lm_eval_tasks],
        task_manager=TaskManager(include_path=folders or None),
        device=device.type,
        batch_size=config.batch_size,
        limit=config.lm_eval_limit or None,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
        bootstrap_iters=1000,
        log_samples=False,
    )
    return {
        task: {k: v for k, v in row.items() if isinstance(v, (int, float))}
        for task, row in found["results"].items()
    }


def harness_table(found: dict[str, dict[str, dict]]) -> str:
    """found: {checkpoint: {task: {metric: value}}}."""
    tasks = next(iter(found.values()))
    lines = []
    for task, row in tasks.items():
        for metric in [m for m in row if "_stderr" not in m]:
            error = metric.replace(",", "_stderr,")
            cells = [visible(task), visible(metric)]
            for each in found.values():
                value, se = each[task][metric], each[task].get(error)
                cells.append(f"{value:.4g}" + ("" if se is None else f" ± {se:.3g}"))
            lines.append(tuple(cells))
    return table(lines, ("task", "metric", *map(visible, found))) + "\n±: one standard error"


def main() -> None:
    config = command_line.parse(BenchmarksConfig, __doc__)
    program.quiet_libraries()
    summary, shown = {"settings": dataclasses.asdict(config)}, []
    if config.prompts:
        asked = questions.load(config.prompts, config.max_prompts)
        if other := [q.where for q in asked if not toy_tasks.is_task(q.row)]:
            raise SystemExit(
                f"prompts: {other[0]} is no task of utils/data/toy_tasks.py ({len(other)} in all), "
                "whose program alone judges here; set --prompts to such, or see "
                "evaluation/win_rate.py"
            )
        prompt_eval.refuse_prompts(config, asked)
        results, seconds = {}, {}
        for path in config.checkpoints:
            results[path], seconds[path] = prompt_eval.answer_all(config, path, asked)
        prompt_eval.write(config, asked, results, pages.summary_table(results, seconds))
        summary["skills"] = by_skill(asked, results)
        shown.append(skill_table(summary["skills"]))
    if config.lm_eval_tasks:
        summary["lm_eval"] = {path: of_harness(config, path) for path in config.checkpoints}
        shown.append(harness_table(summary["lm_eval"]))
    print("\n\n".join(shown), flush=True)
    if config.output_dir:
        text = json.dumps(summary, indent=2, ensure_ascii=False)
        whole_files.write_text(Path(config.output_dir) / "benchmarks.json", text + "\n")
        print(f"written: {config.output_dir}/benchmarks.json", flush=True)


if __name__ == "__main__":
    program.run(main)
