"""Parity with TRL 1.12, number by number and update by update: PPO, GRPO, Dr. GRPO, DAPO, GSPO,
CISPO and RLOO; DPO, IPO, KTO, SimPO, ORPO and more; and PPO's learning curves.

    python benchmarks/parity_trl.py [--output_dir output/parity_trl] [--skip_learning]

Any Python 3.10 to 3.13 with venv will do: the benchmark makes benchmarks/.venv_trl (1.7 GB) from
benchmarks/requirements_trl.txt and goes on in there, on the CPU. Prints tables, writes
results.json and learning.png. Exit code 1: a number differs that should not.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

from benchmarks import trl_environment


def go_on_inside(python: Path) -> None:
    """Replace this process by the same command under `python`."""
    # Both sides in fp32 on the CPU: rounding is then all that equal arithmetic may differ by.
    environment = os.environ | trl_environment.VARIABLES | trl_environment.ON_CPU
    environment.setdefault("OMP_NUM_THREADS", "1")
    os.execve(python, [str(python), str(Path(__file__).resolve()), *sys.argv[1:]], environment)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", default="output/parity_trl")
    parser.add_argument("--skip_learning", action="store_true", help="only the numbers (a minute)")
    parser.add_argument(
        "--from",
        dest="sources",
        action="append",
        default=[],
        metavar="FOLDER",
        help="a finished run_all.sh output folder whose data, SFT and reward model are used; "
        "repeat it for more seeds",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="seeds made here (default 42 1 2, less those of --from)",
    )
    parser.add_argument("--max_steps", type=int, default=0, help="rollouts (default: the recipe's)")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if Path(sys.prefix).resolve() != trl_environment.VENV.resolve():
        go_on_inside(trl_environment.make_environment())

    from benchmarks import parity_methods, parity_numbers, parity_preferences
    from benchmarks.parity_rows import HEADER, KINDS, summary
    from utils.distributed import process_group
    from utils.distributed.program import quiet_libraries
    from utils.report import table

    quiet_libraries()
    output = Path(arguments.output_dir).resolve()
    numbers = output / "numbers"
    numbers.mkdir(parents=True, exist_ok=True)
    parity_numbers.make_models(numbers)
    parts = (parity_numbers, parity_methods, parity_preferences)
    recorded = [part.record(numbers) for part in parts]
    device = process_group.init()
    of_ppo, *others = (p.run(numbers, r, device) for p, r in zip(parts, recorded, strict=True))
    process_group.shut_down()
    rest = {name: rows for tables in others for name, rows in tables.items()}
    differing = {name for name, rows in rest.items() if not all(row.agrees for row in rows)}
    for name, rows in (of_ppo | {name: rest[name] for name in differing}).items():
        print(f"\n{name}\n" + table([row.cells() for row in rows], HEADER))
    print("\nlargest relative errors\n" + table(summary(rest), ("method", *KINDS)))
    failed, results = [], {"numbers": {}}
    for name, rows in (of_ppo | rest).items():
        failed += [f"{row.quantity.strip()} ({name})" for row in rows if not row.agrees]
        results["numbers"][name] = [vars(row) | {"agrees": row.agrees} for row in rows]
    if not arguments.skip_learning:
        from benchmarks import parity_learning

        curves = parity_learning.run(
            output, arguments.sources, arguments.seeds, arguments.max_steps
        )
        print("\n" + parity_learning.closing_table(curves))
        parity_learning.plot(curves, output / "learning.png")
        results["learning"] = curves
    text = json.dumps(results, indent=2, ensure_ascii=False)
    (output / "results.json").write_text(text + "\n", encoding="utf-8")
    print(f"\nwritten: {output}/results.json")
    if failed:
        print(f"differs and should not: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
