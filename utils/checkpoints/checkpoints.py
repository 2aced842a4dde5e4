"""A run's checkpoints: when one is due, what belongs in it, and going on where one ends.

A checkpoint is made between two passes of the main loop, where no gradient is pending and no
rollout half used. Which rows a step reads and which noise it samples with are functions of the seed
and the step, so the step number is the position in the data.
"""

import copy
import functools
import math
import platform
import shutil
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from utils.checkpoints import engine_state, manifest, model_folder
from utils.checkpoints.background import Copies, Writing, does_not_fit
from utils.checkpoints.resuming import Checkpoint
from utils.distributed import preemption, process_group
from utils.models import adapters


@functools.cache  # importlib reads it from files
def _versions() -> dict[str, str]:
    libraries = ("torch", "deepspeed", "transformers", "safetensors")
    return {name: version(name) for name in libraries} | {"python": platform.python_version()}


@dataclass(frozen=True)
class Saving:
    """When a checkpoint is due and which ones stay, as the settings of these names say."""

    output_dir: str
    save_every: int
    save_every_minutes: float
    save_in_background: str
    keep_last: int
    keep_best: str
    resume_anyway: bool


@dataclass
class Pending:
    """A checkpoint that is being written. before: when the one before it was made."""

    step: int
    folder: Path
    before: float
    record: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)  # of this rank, once they are written
    writing: Writing | None = None
    stood: float = 0.0  # seconds that training has waited for it

    @property
    def temporary(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.writing")


class Checkpoints:
    """The checkpoints of one run. Every rank calls every method at the same place.

    settings: all of the run, for the manifest. start: the checkpoint that the run goes on from.
    facts: what the main loop wants to find again, JSON only; saved with each checkpoint.
    """

    def __init__(self, saving: Saving, settings: dict, start: Checkpoint | None, report):
        self.saving, self.settings, self.start, self.report = saving, settings, start, report
        self.facts: dict = start.record["facts"] if start else {"best": None}
        self.step = start.step if start else 0
        self._began = time.time() - self.facts.get("seconds", 0.0)
        self._saved_at = time.time()
        self._saved_step = self.step if start else -1
        self._pending: Pending | None = None
        self._copies: Copies | None = None  # where checkpoints are written in the background
        self._chosen = False
        self._best = self.facts["best"]  # of the checkpoints that are whole

    def __enter__(self) -> "Checkpoints":
        """The loop begins: from here on a signal to end waits for the next step boundary."""
        preemption.note()
        return self

    def __exit__(self, kind, error, trace) -> None:
        """After the last step, or where all ranks stop together. (After an error of one rank the
        others would not come: its checkpoint is lost as it is with a killed rank.)"""
        if kind is None or issubclass(kind, process_group.StopRun):
            self.seal()
        self._copies = None

    def seconds(self) -> float:
        """How long this run has taken, over all its resumptions."""
        return time.time() - self._began

    def follow(self, engines: dict, state: dict, outputs: dict, data: str) -> int:
        """Save these from now on, go on where the checkpoint ends that the run starts from, and
        return how many steps are done.

        engines: {name: zero.TrainEngine or EMA}, fresh. state: {name: object with state_dict() →
        JSON and load_state_dict(JSON)}. outputs: {folder: what model_folder.save writes there at
        the end of the run}. data: a fingerprint of the training rows.
        """
        self.engines, self.state, self.outputs, self.data = engines, state, outputs, data
        if self.start is not None:
            self._restore(self.start)
        return self.step

    def _restore(self, start: Checkpoint) -> None:
        record = start.record
        if record["data"] != self.data and not self.saving.resume_anyway:
            raise SystemExit(
                f"checkpoint {start.folder} was trained on {record['data']}; the data now is "
                f"{self.data}: step {start.step} is no place in it. Give the same data, or "
                "--resume_anyway"
            )
        names = [n for n in record["files"] if n.startswith("rank-")]
        reader = manifest.Reader(start.folder, names)
        try:
            for name, engine in self.engines.items():
                engine_state.restore(engine, name, reader, record["engines"].get(name))
        except manifest.Damaged as problem:
            raise SystemExit(f"checkpoint {start.folder} does not fit: {problem}") from None
        for name, thing in self.state.items():
            thing.load_state_dict(record["state"][name])
        engine_state.restore_random(reader, record["world_size"])
        self.report.say(f"resumed from {start.folder}, after {start.step} steps")

    def after_step(self, step: int, metrics: dict[str, float]) -> None:
        """After `step` passes of the loop: save where it is due; end the run where asked to."""
        waited = (time.time() - self._saved_at) / 60
        due = bool(self.saving.save_every) and step % self.saving.save_every == 0
        due |= 0 < self.saving.save_every_minutes <= waited
        due |= self._is_best(step, metrics)
        # Rank 0's clock and rank 0's metrics decide; any rank's signal counts.
        asked, due, writing = process_group.on_any_rank(
            [bool(preemption.received()), process_group.is_main() and due, self._writing()]
        )
        if not writing:
            self.seal()
        if asked or due:
            saved = self.save(step, wait=asked)
        if asked:
            self._stop(step, saved)

    def _is_best(self, step: int, metrics: dict[str, float]) -> bool:
        """Is --keep_best's metric here, and better than ever? (Then it is remembered.)"""
        name, _, direction = self.saving.keep_best.rpartition(":")
        value = metrics.get(name)
        if value is None or not math.isfinite(value):
            return False
        best, sign = self.facts["best"], 1 if direction == "max" else -1
        if best and sign * value <= sign * best["value"]:
            return False
        self.facts["best"] = {"metric": name, "value": value, "step": step}
        return True

    def _stop(self, step: int, saved: bool) -> None:
        name = next(filter(None, process_group.gather_objects(preemption.received())))
        if not saved:
            raise SystemExit(f"{name} after step {step}, and the checkpoint could not be written")
        self.report.say(
            f"{name}: stopped after step {step}, all of it saved in "
            f"{manifest.folder_of(self.saving.output_dir, step)}; --resume auto goes on (exit code "
            f"{preemption.EXIT_CODE})"
        )
        self.report.close()
        process_group.leave(preemption.EXIT_CODE)

    def save(self, step: int, wait: bool = False) -> bool:
        """Write checkpoint `step`, in the background where that is chosen and none must `wait` for
        it. False where a rank could not, which is said; the run goes on."""
        self.seal()
        if step == self._saved_step:
            return True
        began, copies = time.time(), None if wait else self._choose_copies()
        folder = manifest.folder_of(self.saving.output_dir, step)
        pending = Pending(step, folder, self._saved_at)
        temporary = pending.temporary
        try:
            with manifest.failing_together():
                if process_group.is_main():
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir(parents=True)
            self.facts["seconds"] = self.seconds()
            pending.record = copy.deepcopy(self._record(step))
            if copies is None:
                model_folder.save(temporary / "weights", self.outputs)
                with manifest.failing_together():
                    pending.files = self._write_files(temporary, self._tensors())
            else:
                pending.writing = self._copy_and_write(temporary, copies)
        except OSError as problem:
            return self._give_up(pending, problem)
        self._pending, self._saved_at, self._saved_step = pending, time.time(), step
        pending.stood = time.time() - began
        return self.seal() if copies is None else True

    def _record(self, step: int) -> dict:
        return {
            "format": manifest.FORMAT,
            "step": step,
            "world_size": process_group.world_size(),
            "config": self.settings,
            "versions": _versions(),
            "data": self.data,
            "facts": self.facts,
            "state": {name: thing.state_dict() for name, thing in self.state.items()},
            "engines": {name: engine_state.record_of(e) for name, e in self.engines.items()},
        }

    def _tensors(self) -> dict:
        """What this rank writes, by manifest.Reader's keys."""
        tensors = engine_state.random_state()
        for name, engine in self.engines.items():
            tensors |= engine_state.to_write(name, engine_state.spans_of(engine))
        return tensors

    @staticmethod
    def _write_files(temporary: Path, tensors: dict) -> dict:
        """Write this rank's tensors; → {file: size and digest}, rank 0's with the weights."""
        rank, ranks = process_group.rank(), process_group.world_size()
        name = f"rank-{rank:04d}-of-{ranks:04d}.safetensors"
        files = {name: manifest.write_tensors(temporary / name, tensors)}
        if process_group.is_main():
            weights = manifest.listed(temporary / "weights", {})
            files |= {f"weights/{name}": entry for name, entry in weights.items()}
        return files

    def _copy_and_write(self, temporary: Path, copies: Copies) -> Writing:
        """All that changes with the next step is copied here; the thread writes what was copied."""
        copies.begin()
        writers = {name: part.snapshot(copies) for name, part in self.outputs.items()}
        tensors = {key: copies(t) for key, t in self._tensors().items()}

        def write() -> dict:
            if process_group.is_main():
                for name, write_part in writers.items():
                    write_part(temporary / "weights" / name)
            return self._write_files(temporary, tensors)

        return Writing(write)

    def _choose_copies(self) -> Copies | None:
        """Memory for copies; None where training waits for the disk. Asked once a run."""
        if not self._chosen:
            self._chosen, how = True, self.saving.save_in_background
            problem = does_not_fit(self._bytes_to_copy()) if how == "auto" else ""
            if problem:
                self.report.say(
                    f"checkpoints are written while training waits: {problem} "
                    "(--save_in_background on copies it anyway)"
                )
            self._copies = Copies() if how != "off" and not problem else None
        return self._copies

    def _bytes_to_copy(self) -> int:
        total = sum(t.nbytes for t in self._tensors().values())
        if process_group.is_main():
            models = [engine.module for engine in self.engines.values()]
            for p in (p for module in models for _, p in adapters.own_of(module)):
                total += getattr(p, "ds_numel", p.numel()) * p.element_size()
        return total

    def _writing(self) -> bool:
        return self._pending is not None and self._pending.writing.is_alive()

    def seal(self) -> bool:
        """Give the checkpoint that is being written its name, once every rank has written its
        part. Every rank must call it. False where one could not, which is said."""
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        began = time.time()
        try:
            with manifest.failing_together():
                if pending.writing is not None:
                    pending.files = pending.writing.result()
            files = {}
            for part in process_group.gather_objects(pending.files):
                files |= part
            with manifest.failing_together():
                if process_group.is_main():
                    files |= manifest.listed(pending.temporary, files)
                    record = pending.record | {"files": files}
                    manifest.seal(pending.temporary, pending.folder, record)
                    self._remove_old(record)
        except OSError as problem:
            return self._give_up(pending, problem)
        self._best = pending.record["facts"]["best"]
        how = ", written in the background" if pending.writing is not None else ""
        stood = pending.stood + time.time() - began
        self.report.say(f"checkpoint {pending.folder}: training stood still {stood:.2f} s{how}")
        return True

    def _give_up(self, pending: Pending, problem: OSError) -> bool:
        if process_group.is_main():
            shutil.rmtree(pending.temporary, ignore_errors=True)
        self._saved_at, self._saved_step = pending.before, -1
        if self.facts["best"] and self.facts["best"]["step"] == pending.step:
            self.facts["best"] = self._best  # the best one that is whole, which must stay
        older = [str(s) for s in manifest.steps_in(self.saving.output_dir)]
        self.report.say(
            f"checkpoint at step {pending.step} could not be written: {problem}. Training "
            f"goes on; whole ones are of steps: {', '.join(older) or 'none'}. Free space under "
            f"{self.saving.output_dir}, or lower --keep_last"
        )
        return False

    def _remove_old(self, record: dict) -> None:
        """Keep --keep_last of them and the best. (Later ones than the record's are damaged.)"""
        steps = [s for s in manifest.steps_in(self.saving.output_dir) if s <= record["step"]]
        best = record["facts"]["best"]
        for old in steps[self.saving.keep_last :] if self.saving.keep_last else []:
            if not best or old != best["step"]:
                manifest.remove(manifest.folder_of(self.saving.output_dir, old))
