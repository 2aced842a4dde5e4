"""What benchmarks/gpu.sh measured, in one place: OUTPUT/gpu.json and OUTPUT/gpu.md.

    python -m benchmarks.gpu_report OUTPUT [--device cpu]

Reads what its parts wrote: OUTPUT/SHAPE/NAME_throughput.json, TRL's in OUTPUT/SHAPE/trl, and
OUTPUT/planner.json. Ends with exit code 1 where one of ours is missing, or where on a GPU a phase
took less than its floor, so that one of the two is wrong.
"""

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

from benchmarks import figures
from benchmarks.measure import ROOT

PARTS = ("rollout", "ppo", "sft", "reward")
FLOORS = (
    "The floor of a decode is reading weights, keys and values or its arithmetic, whichever takes "
    "longer; of anything else it is the arithmetic, so the share is the MFU. By the rates measured:"
)


def read(folder: Path) -> dict:
    """{"shapes": {shape: {part: {system: its record and its rates}}}, "planner": […]}, and what is
    not there as "missing"."""
    shapes, missing = {}, []
    for place in sorted(p for p in folder.iterdir() if p.is_dir()):
        found = shapes[place.name] = {}
        for part in PARTS:
            files = [place / f"{part}_throughput.json", place / f"trl/{part}_throughput.json"]
            found[part] = {}
            for file in (f for f in files if f.exists()):
                (result,) = json.loads(file.read_text(encoding="utf-8"))["results"]
                for system in result["systems"]:
                    shared = {"rates": result["rates"], "tokens": result["tokens"]}
                    found[part][system["system"]] = system | shared
            if not any(name.startswith("ours") for name in found[part]):
                missing.append(f"{place.name}/{part}")
    planner = folder / "planner.json"
    if not planner.exists():
        missing.append("planner")
    checked = json.loads(planner.read_text(encoding="utf-8")) if planner.exists() else []
    return {"shapes": shapes, "planner": checked, "missing": missing}


def impossible(shapes: dict) -> list[str]:
    """Phases that were faster than can be (by more than the rates' own spread)."""
    return [
        f"{shape}/{part} {name}, {phase}: {seconds(system, phase):.3g} s, and the floor is "
        f"{least:.3g}"
        for shape, parts in shapes.items()
        for part, systems in parts.items()
        for name, system in systems.items()
        for phase, least in system["floor_seconds"].items()
        if phase in system["seconds"] and seconds(system, phase) < 0.9 * least
    ]


def seconds(system: dict, phase: str) -> float:
    return statistics.median(system["seconds"][phase])


def of_floor(system: dict, phase: str) -> str:
    """How much of what the device can give at best a phase reached: MFU where arithmetic is the
    floor, a share of the bandwidth where memory is."""
    return f"{system['floor_seconds'][phase] / seconds(system, phase):.1%}"


def rows_of_decode(shape: str, systems: dict) -> list[dict]:
    rows = []
    for name, system in systems.items():
        row = {"shape": shape, "system": name}
        row["tokens/s"] = figures.brief(system["tokens"] / seconds(system, "generate"))
        for peer, label in (("generate-bf16", "÷ generate"), ("compiled-bf16", "÷ compiled")):
            if peer in systems and peer != name:
                row[label] = (
                    f"{seconds(systems[peer], 'generate') / seconds(system, 'generate'):.2f}"
                )
        rows.append(row | {"of the floor": of_floor(system, "generate")})
    return rows


def rows_of_steps(shape: str, systems: dict) -> list[dict]:
    """PPO by phase, or a step that has but one: seconds, share of the floor, speed ÷ TRL's."""
    rows, theirs = [], systems.get("trl-bf16")
    for name, system in systems.items():
        for phase in system["seconds"]:
            row = {"shape": shape, "system": name, "phase": phase}
            row["seconds"] = figures.brief(seconds(system, phase))
            row["of the floor"] = of_floor(system, phase)
            if theirs and theirs is not system:
                row["÷ TRL"] = f"{seconds(theirs, phase) / seconds(system, phase):.2f}"
            if phase == "total":
                row["tokens/s"] = figures.brief(system["tokens"] / seconds(system, phase))
                row["peak, GB"] = f"{system['peak_memory'] / 1e9:.1f}"
            rows.append(row)
    return rows


def markdown(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(c, "")) for c in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def written(found: dict, here: dict, commit: str, left_out: list[str], walk: bool) -> str:
    """The report for people."""
    text = ["# bash benchmarks/gpu.sh" + (" --walk" if walk else ""), ""]
    text += [f"{time.strftime('%Y-%m-%d')}, commit {commit}: {figures.described(here)}", ""]
    if walk:
        text += ["**A walk without a GPU, on tiny shapes: these figures say nothing.**", ""]
    text += [f"- {line}" for line in left_out] + [""] * bool(left_out)
    tables = {
        "Decode (W: 32 prompts × 64 tokens → 128 new ones)": ("rollout", rows_of_decode),
        "Step 3 (W)": ("ppo", rows_of_steps),
        "Step 1": ("sft", rows_of_steps),
        "Step 2": ("reward", rows_of_steps),
    }
    for title, (part, rows_of) in tables.items():
        rows = [row for name, s in found["shapes"].items() for row in rows_of(name, s[part])]
        text += [f"## {title}", "", markdown(rows) if rows else "nothing measured", ""]
    text.append(FLOORS)
    for name, parts in found["shapes"].items():
        for system in list(parts["rollout"].values())[:1]:
            rates = (
                f"{figures.brief(r / 1e9)} {'GB/s' if n == 'memory' else f'GFLOP/s in {n}'}"
                for n, r in system["rates"].items()
            )
            text.append(f"{name}: {', '.join(rates)}.")
    rows = [
        {
            "case": case["case"],
            "predicted, MB": f"{case['predicted'] / 1e6:,.0f}",
            "measured, MB": f"{case['measured'] / 1e6:,.0f}",
            "ratio": f"{case['ratio']:.3f}",
            "predicted peak in": case["phase"],
        }
        for case in found["planner"]
    ]
    return "\n".join([*text, "", "## Planner", "", markdown(rows) if rows else "nothing measured"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    asked = parser.parse_args()
    found, here = read(asked.folder), figures.machine([0], asked.device)
    head = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True).stdout.strip() or "unknown"
    told = asked.folder / "left_out.txt"
    left_out = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    walk = asked.device == "cpu"
    # (On a CPU our products are not those of the rate.)
    faults = [f"gpu.sh: MISSING: {name}" for name in found["missing"]]
    faults += [] if walk else [f"gpu.sh: IMPOSSIBLE: {x}" for x in impossible(found["shapes"])]
    left_out += faults
    record = {"date": time.strftime("%Y-%m-%d %H:%M"), "commit": commit, "machine": here}
    record |= {"walk": walk, "left_out": left_out} | found
    path = asked.folder / "gpu.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    report = written(found, here, commit, left_out, walk)
    (asked.folder / "gpu.md").write_text(report + "\n", encoding="utf-8")
    print("\n" + report)
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
