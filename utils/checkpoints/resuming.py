"""What an output folder holds, and from which checkpoint a run goes on: --resume, --overwrite."""

import dataclasses
import datetime
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from utils.checkpoints import manifest
from utils.distributed import process_group

WRITTEN = ("metrics.jsonl", "result.json", "state.json", "bad_rows.jsonl")


@dataclass(frozen=True)
class Found:
    """A whole checkpoint, checked byte by byte. record: its manifest."""

    folder: Path
    record: dict

    @property
    def step(self) -> int:
        return self.record["step"]


def check_output(config) -> None:
    """Before anything is loaded: end a run whose folder is taken, or that is finished already."""
    folder = Path(config.output_dir)
    held = what_it_holds(folder)
    if not held or config.overwrite or config.resume not in ("auto", "no"):
        return
    if config.resume == "no":
        _end(
            2,
            f"output_dir={config.output_dir} holds a run already ({', '.join(held)}): --resume "
            "auto goes on with it, --overwrite begins anew and deletes it",
        )
    if (folder / "result.json").exists():
        _end_finished(folder, folder / "config.yaml", config)


def check_file(config, path: Path, settings: Path) -> None:
    """The same for a program whose whole output is one file, with its settings in another."""
    if not path.exists() or config.overwrite:
        return
    if config.resume == "no":
        _end(2, f"{path} is there already: --resume auto keeps it, --overwrite writes it anew")
    _end_finished(path, settings, config)


def _end_finished(what: Path, settings: Path, config) -> None:
    if config.resume_anyway:
        return
    if not settings.exists():
        _end(2, f"{what} is there and {settings} is not, which would say how it was made")
    refused, _ = differences(yaml.safe_load(settings.read_text(encoding="utf-8")), config)
    if refused:
        _end(2, refusal(f"{what}, which is finished,", refused))
    _end(0, f"{what} is finished: nothing to do (--overwrite begins anew)")


def _end(code: int, text: str) -> None:
    if process_group.is_main():
        print(text, file=sys.stderr if code else sys.stdout, flush=True)
    raise SystemExit(code)


def what_it_holds(folder: Path) -> list[str]:
    """What a run has left in `folder` that another one would write over."""
    found = [n for n in WRITTEN if (folder / n).is_file() and (folder / n).stat().st_size]
    found += [f"checkpoints/step-{step:06d}" for step in manifest.steps_in(folder)[:1]]
    return found + sorted(str(f.relative_to(folder)) for f in folder.glob("actor/*.safetensors"))


def find(config) -> Found | None:
    """The newest whole checkpoint that --resume means; None for a run from the beginning.

    Every rank must call it. Damaged checkpoints are named and passed over; a changed setting that
    would change what is learned ends the run, unless --resume_anyway.
    """
    output = Path(config.output_dir)
    if process_group.is_main():
        manifest.remove_unfinished(output)
        (output / "result.json").unlink(missing_ok=True)  # true again once this run is finished
        if config.overwrite and config.resume == "no":
            _clear(output)
    process_group.barrier()
    candidates = _candidates(config)
    for folder in candidates:
        try:
            record = manifest.read(folder)
            manifest.verify(folder, record)
        except manifest.Damaged as problem:
            _tell(f"checkpoint {folder} is damaged and left alone: {problem}")
            continue
        _check_settings(folder, record, config)
        found = Found(folder, record)
        _make_way(found, config)
        return found
    if candidates:
        raise SystemExit(
            f"none of the {len(candidates)} checkpoints that --resume {config.resume} means is "
            "whole (see above); --overwrite begins anew"
        )
    return None


def _candidates(config) -> list[Path]:
    """Folders of checkpoints, newest first."""
    if config.resume == "no":
        return []
    given = Path(config.output_dir if config.resume == "auto" else config.resume)
    if given.name.startswith("step-"):
        return [given]
    found = [manifest.folder_of(given, step) for step in manifest.steps_in(given)]
    if not found and config.resume != "auto":
        raise SystemExit(f"--resume {config.resume}: no checkpoint there, nor under checkpoints/")
    return found


def settle_date(config, found: Found | None = None) -> None:
    """Fix the day that chat templates may state, where --date does not: the day this run began, by
    the clock of rank 0. Every rank must call it."""
    saved = found.record["config"].get("date") if found else ""
    today = process_group.gather_objects(datetime.date.today().isoformat())[0]
    config.date = config.date or saved or today


def _make_way(found: Found, config) -> None:
    """Going on from a checkpoint named by hand leaves the later ones of its folder behind, or what
    another folder holds."""
    if config.resume == "auto":
        return
    own = Path(config.output_dir)
    inside = found.folder.resolve().parent.parent == own.resolve()
    later = [manifest.folder_of(own, s) for s in manifest.steps_in(own) if s > found.step]
    held = [str(folder) for folder in later] if inside else what_it_holds(own)
    if held and not config.overwrite:
        _refuse(
            f"output_dir={own} holds {', '.join(held)}, which going on from {found.folder} would "
            "write over: --overwrite does, another --output_dir keeps it"
        )
    process_group.barrier()
    if process_group.is_main():
        if not inside:
            _clear(own)
        for folder in later if inside else []:
            manifest.remove(folder)


def _clear(output: Path) -> None:
    for name in (*WRITTEN, "config.yaml"):
        (output / name).unlink(missing_ok=True)
    for name in ("checkpoints", "tensorboard", "bad_steps"):
        shutil.rmtree(output / name, ignore_errors=True)


def _check_settings(folder: Path, record: dict, config) -> None:
    refused, rounding = differences(record["config"], config)
    if record["world_size"] != process_group.world_size():
        rounding.append(f"ranks: {record['world_size']} → {process_group.world_size()}")
    if refused and not config.resume_anyway:
        _refuse(refusal(f"checkpoint {folder}", refused))
    for line in refused:
        _tell(f"--resume_anyway: {line}")
    for line in rounding:
        _tell(f"resumed with {line}: the same path up to rounding")


def differences(saved: dict, config) -> tuple[list[str], list[str]]:
    """Settings that differ from `saved`: those that change what is learned, and those that only
    change the order of the sums. One line each."""
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    refused, rounding = [], []
    for name in sorted(now.keys() | saved.keys()):
        before, after = saved.get(name, "(not set)"), now.get(name, "(not set)")
        if name == "date" and not after:
            continue  # the saved one stays
        field = config.__dataclass_fields__.get(name)
        kind = field.metadata["on_resume"] if field else "learned"
        if before != after and kind != "free":
            (rounding if kind == "rounding" else refused).append(f"{name}: {before} → {after}")
    return refused, rounding


def refusal(what: str, refused: list[str]) -> str:
    lines = "\n".join(f"  - {line}" for line in refused)
    return (
        f"{what} was made with other settings, which would change what is learned:\n{lines}\n"
        "give the same ones, or --resume_anyway to go on with the new ones, or --overwrite"
    )


def _refuse(text: str) -> None:
    """End the run, every rank by itself, once all have joined."""
    if process_group.is_main():
        print(text, file=sys.stderr, flush=True)
    process_group.shut_down()
    raise SystemExit(2)


def _tell(text: str) -> None:
    if process_group.is_main():
        print(text, flush=True)
