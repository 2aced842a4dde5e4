"""What the turns come to: medians, spreads, ratios, floors; as tables and as JSON.

A ratio is the median of the rounds' own ratios, with the least and the greatest of them.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import ROOT, System, take_turns
from utils.report import table


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{brief(self.median)} ({brief(self.low)}–{brief(self.high)})"


def brief(value: float) -> str:
    """Three digits, and all of a large number's whole ones."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def ratio(ours: list[float], theirs: list[float]) -> Spread:
    """How many times ours is of theirs, round by round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def core_share(system: System) -> float:
    """How much of its core the system had while it worked: 1 where nothing else ran on it."""
    return statistics.median(t["core"] for t in system.turns)


def cpu_seconds(system: System) -> list[float]:
    """Of each turn, what it computed, however long it waited for the core. (Of several ranks: of
    the slowest one.)"""
    return [t["core"] * t["seconds"] for t in system.turns]


def machine(cores: list[int], device: str) -> dict:
    """What the figures were measured on."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = {}
        for line in cpuinfo.read_text(encoding="utf-8").split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
        model = (
            f"{fields.get('model name', model)} (family {fields.get('cpu family')}, model "
            f"{fields.get('model')})"
        )
        flags = fields.get("flags", "").split()
        found = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
        model += ", " + " ".join(found)
    here = {
        "cpu": model,
        "cores_of_the_machine": os.cpu_count(),
        "cores_used": cores if device == "cpu" else [],
        "threads_a_rank": 1,
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }
    if device == "cuda":
        here["gpu"] = torch.cuda.get_device_name(0)
        here["gpu_memory"] = torch.cuda.get_device_properties(0).total_memory
    return here


def described(here: dict) -> str:
    used = here.get("gpu") or f"core {', '.join(map(str, here['cores_used']))}, one thread a rank"
    return (
        f"{here['cpu']}; {here['cores_of_the_machine']} cores, used: {used}; torch "
        f"{here['torch']}; load at the start {here['load_at_start']}"
    )


def write(name: str, arguments, here: dict, results: list[dict]) -> Path:
    """OUTPUT/NAME.json: the command, the machine, every turn's numbers and what they come to."""
    path = Path(arguments.output_dir) / f"{name}.json"
    record = {
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": here,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def show(rows: list[dict]) -> str:
    """Rows of named cells as a table; columns in the order of the first row that has them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return table([tuple(row.get(c, "") for c in columns) for row in rows], tuple(columns))


def compare(
    title: str,
    systems: list[System],
    seconds_of: Callable[[System], dict[str, list[float]]],
    floor_of: Callable[[str, dict[str, float]], dict[str, float]],
    peers_of: Callable[[str], list[str]],
    tokens: int,
    arguments,
) -> dict:
    """Let the systems take turns; prints their tables and returns the record of them.

    seconds_of(system) → {phase: seconds of each turn}, "total" among them where the system does all
    of the work; floor_of(dtype, rates) → {phase: least seconds} by the rates of this run
    (sides.rates); peers_of(name) → whom that system's speed is compared with. tokens: of a turn.
    """
    print(f"\n{title}", flush=True)
    where = (systems[0].folder, systems[0].cores, arguments.device)
    rates = System("rates", "benchmarks.sides:rates", {}, *where)
    take_turns([*systems, rates], arguments.repeats)
    names = [n for n in rates.turns[0] if n in ("fp32", "bf16", "memory")]
    rate = {n: spread([t[n] for t in rates.turns]).median for n in names}
    named = {s.name: s for s in systems}
    seconds = {name: seconds_of(s) for name, s in named.items()}
    speeds, phases, record = [], [], []
    for name, system in named.items():
        least = floor_of(dtype_of(name), rate)
        peers = [p for p in peers_of(name) if p in named and p != name]
        faster = {
            phase: {p: ratio(seconds[p][phase], s) for p in peers if phase in seconds[p]}
            for phase, s in seconds[name].items()
        }
        by_cpu = {
            p: ratio(cpu_seconds(named[p]), cpu_seconds(system))
            for p in peers
            if "total" in faster and p in faster["total"]
        }
        phases += phase_rows(name, seconds[name], least, faster)
        speeds.append(speed_row(system, seconds[name], tokens, faster, by_cpu))
        record.append(
            {
                "system": name,
                "facts": system.facts,
                "seconds": seconds[name],
                "share_of_the_core": [t["core"] for t in system.turns],
                "floor_seconds": least,
                "peak_memory": max(t["peak_memory"] for t in system.turns),
                "speed_against": {f: _plain(found) for f, found in faster.items()},
                "speed_against_by_cpu_time": _plain(by_cpu),
            }
        )
    print(show(speeds) + "\n\n" + show(phases))
    shown = [
        f"{n} {r / 1e9:,.0f} {'GB/s' if n == 'memory' else 'GFLOP/s'}" for n, r in rate.items()
    ]
    print(f"this machine in this run: {', '.join(shown)}", flush=True)
    return {"title": title, "tokens": tokens, "rates": rate, "systems": record}


def _plain(found: dict[str, Spread]) -> dict:
    return {name: asdict(value) for name, value in found.items()}


def dtype_of(name: str) -> str:
    """Systems are called WHO-DTYPE, and perhaps more behind a comma."""
    return name.split(",")[0].split("-")[1]


def phase_rows(name: str, seconds: dict, least: dict, faster: dict) -> list[dict]:
    """Seconds of each phase, how many times the floor they are, and the speed against the peers."""
    rows = []
    for phase, values in seconds.items():
        row = {"system": name, "phase": phase, "seconds": spread(values)}
        row["÷ floor"] = f"{row['seconds'].median / least[phase]:.2f}"
        rows.append(row | {f"speed ÷ {p}": r for p, r in faster[phase].items()})
    return rows


def speed_row(system: System, seconds: dict, tokens: int, faster: dict, by_cpu: dict) -> dict:
    """The system's speed and memory. "by CPU time" is the ratio that a busy machine disturbs less;
    where the share of the core is near 1 the two agree."""
    last = "total" if "total" in seconds else next(iter(seconds))
    row = {"system": system.name, "of": last}
    row["tokens/s"] = spread([tokens / s for s in seconds[last]])
    row |= {f"speed ÷ {p}": r for p, r in faster[last].items()}
    row |= {f"by CPU time ÷ {p}": r for p, r in by_cpu.items()}
    row["share of the core"] = f"{core_share(system):.2f}"
    row["once built, MB"] = f"{system.facts['memory'] / 1e6:,.0f}"
    row["peak, MB"] = f"{max(t['peak_memory'] for t in system.turns) / 1e6:,.0f}"
    return row
