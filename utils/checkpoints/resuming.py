"""What an output folder holds, and from which checkpoint a run goes on: --resume, --overwrite."""

import datetime
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from utils.checkpoints import manifest
from utils.distributed import process_group

WRITTEN = ("metrics.jsonl", "result.json", "state.json", "bad_rows.jsonl")


@dataclass(frozen=True)
class Checkpoint:
    """A whole one, checked byte by byte. record: its manifest."""

    folder: Path
    record: dict

    @property
    def step(self) -> int:
        return self.record["step"]


@dataclass(frozen=True)
class Output:
    """The output folder of a run, and what its flags say of a run that is there already.

    settings: all settings of the run, which a checkpoint must share to be gone on from, but for
    those whose on_resume is "rounding" or "free". defaults: of the same settings; a checkpoint from
    before there was a setting was made with its default.
    """

    output_dir: str
    resume: str
    resume_anyway: bool
    overwrite: bool
    settings: dict
    on_resume: dict[str, str]
    defaults: dict

    def check(self) -> None:
        """Before anything is loaded: end a run whose folder is taken, or that is finished."""
        folder = Path(self.output_dir)
        held = what_it_holds(folder)
        if not held or self.overwrite or self.resume not in ("auto", "no"):
            return
        if self.resume == "no":
            process_group.leave(
                2,
                f"output_dir={folder} holds a run already ({', '.join(held)}): --resume auto goes "
                "on with it, --overwrite begins anew and deletes it",
            )
        if (folder / "result.json").exists():
            self._end_finished(folder, folder / "config.yaml")

    def check_file(self, path: Path, settings: Path) -> None:
        """The same for a program whose whole output is one file, with its settings in another."""
        if not path.exists() or self.overwrite:
            return
        if self.resume == "no":
            process_group.leave(
                2, f"{path} is there already: --resume auto keeps it, --overwrite writes it anew"
            )
        self._end_finished(path, settings)

    def _end_finished(self, what: Path, settings: Path) -> None:
        if self.resume_anyway:
            return
        if not settings.exists():
            process_group.leave(
                2, f"{what} is there and {settings} is not, which would say how it was made"
            )
        saved = yaml.safe_load(settings.read_text(encoding="utf-8"))
        changed, _ = self._differences(saved)
        if changed:
            process_group.leave(2, refusal(f"{what}, which is finished,", changed))
        process_group.leave(0, f"{what} is finished: nothing to do (--overwrite begins anew)")

    def find(self) -> Checkpoint | None:
        """The newest whole checkpoint that --resume means; None for a run from the beginning.

        Every rank must call it. Damaged checkpoints are named and passed over; a changed setting
        that would change what is learned ends the run, unless --resume_anyway.
        """
        folder = Path(self.output_dir)
        if process_group.is_main():
            manifest.remove_unfinished(folder)
            (folder / "result.json").unlink(missing_ok=True)  # written again at this run's end
            if self.overwrite and self.resume == "no":
                _clear(folder)
        process_group.barrier()
        candidates = self._candidates()
        for candidate in candidates:
            try:
                record = manifest.read(candidate)
                manifest.verify(candidate, record)
            except manifest.Damaged as problem:
                process_group.say(f"checkpoint {candidate} is damaged and left alone: {problem}")
                continue
            self._check_settings(candidate, record)
            checkpoint = Checkpoint(candidate, record)
            self._make_way(checkpoint)
            return checkpoint
        if candidates:
            raise SystemExit(
                f"none of the {len(candidates)} checkpoints that --resume {self.resume} means is "
                "whole (see above); --overwrite begins anew"
            )
        return None

    def _candidates(self) -> list[Path]:
        """Folders of checkpoints, newest first."""
        if self.resume == "no":
            return []
        given = Path(self.output_dir if self.resume == "auto" else self.resume)
        if given.name.startswith("step-"):
            return [given]
        folders = [manifest.folder_of(given, step) for step in manifest.steps_in(given)]
        if not folders and self.resume != "auto":
            raise SystemExit(f"--resume {self.resume}: no checkpoint there, nor under checkpoints/")
        return folders

    def _check_settings(self, folder: Path, record: dict) -> None:
        changed, rounding = self._differences(record["config"])
        if record["world_size"] != process_group.world_size():
            rounding.append(f"ranks: {record['world_size']} → {process_group.world_size()}")
        if changed and not self.resume_anyway:
            process_group.leave(2, refusal(f"checkpoint {folder}", changed))
        for line in changed:
            process_group.say(f"--resume_anyway: {line}")
        for line in rounding:
            process_group.say(f"resumed with {line}: the same path up to rounding")

    def _differences(self, saved: dict) -> tuple[list[str], list[str]]:
        return differences(self.defaults | saved, self.settings, self.on_resume)

    def _make_way(self, checkpoint: Checkpoint) -> None:
        """Going on from a checkpoint named by hand leaves the later ones of its folder behind, or
        what another output folder holds: deleted where --overwrite says so, else refused."""
        if self.resume == "auto":
            return
        own = Path(self.output_dir)
        inside = checkpoint.folder.resolve().parent.parent == own.resolve()
        steps = [s for s in manifest.steps_in(own) if s > checkpoint.step]
        later = [manifest.folder_of(own, step) for step in steps]
        held = [str(folder) for folder in later] if inside else what_it_holds(own)
        if held and not self.overwrite:
            process_group.leave(
                2,
                f"output_dir={own} holds {', '.join(held)}, which going on from "
                f"{checkpoint.folder} would write over: --overwrite does, another --output_dir "
                "keeps it",
            )
        process_group.barrier()
        if process_group.is_main():
            if not inside:
                _clear(own)
            for folder in later if inside else []:
                manifest.remove(folder)


def what_it_holds(folder: Path) -> list[str]:
    """What a run has left in `folder` that another one would write over."""
    held = [n for n in WRITTEN if (folder / n).is_file() and (folder / n).stat().st_size]
    held += [f"checkpoints/step-{step:06d}" for step in manifest.steps_in(folder)[:1]]
    return held + sorted(str(f.relative_to(folder)) for f in folder.glob("actor/*.safetensors"))


def date_of(date: str, checkpoint: Checkpoint | None = None) -> str:
    """The day that chat templates may state: --date, else the day that this run began, by the clock
    of rank 0. Every rank must call it."""
    saved = checkpoint.record["config"].get("date") if checkpoint else ""
    today = process_group.gather_objects(datetime.date.today().isoformat())[0]
    return date or saved or today


def _clear(output: Path) -> None:
    for name in (*WRITTEN, "config.yaml"):
        (output / name).unlink(missing_ok=True)
    for name in ("checkpoints", "tensorboard", "bad_steps"):
        shutil.rmtree(output / name, ignore_errors=True)


def differences(saved: dict, settings: dict, on_resume: dict) -> tuple[list[str], list[str]]:
    """Settings that differ from `saved`: those that change what is learned, and those that only
    change the order of the sums. One line each."""
    now = json.loads(json.dumps(settings))
    changed, rounding = [], []
    for name in sorted(now.keys() | saved.keys()):
        before, after = saved.get(name, "(not set)"), now.get(name, "(not set)")
        if name == "date" and not after:
            continue  # the saved one stays
        kind = on_resume.get(name, "learned")
        if before != after and kind != "free":
            (rounding if kind == "rounding" else changed).append(f"{name}: {before} → {after}")
    return changed, rounding


def refusal(what: str, changed: list[str]) -> str:
    lines = "\n".join(f"  - {line}" for line in changed)
    return (
        f"{what} was made with other settings, which would change what is learned:\n{lines}\n"
        "give the same ones, or --resume_anyway to go on with the new ones, or --overwrite"
    )
