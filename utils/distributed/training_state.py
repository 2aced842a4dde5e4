"""A run's checkpoints: when one is due, what belongs in it, and taking a run up where one ends.

A checkpoint is made between two passes of the main loop, where no gradient is pending and no
rollout half used. Which rows a step reads and which noise it samples with are functions of the seed
and the step, so the step number is the position in the data.
"""

import dataclasses
import math
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

from utils.distributed import engine_state, manifest, preemption, process_group, resuming


class Checkpoints:
    """The checkpoints of one run. Every rank calls every method at the same place.

    facts: what the main loop wants to find again, JSON only; saved with each checkpoint.
    """

    def __init__(self, config, report, found: resuming.Found | None, device):
        self.config, self.report, self.found, self.device = config, report, found, device
        self.facts: dict = found.record["facts"] if found else {}
        self.step = found.step if found else 0
        self._began = time.time() - self.facts.get("seconds", 0.0)
        self._saved_at = time.time()
        self._saved_step = self.step if found else -1

    def once(self, name: str, compute):
        """What `compute()` gave when this run began; a resumed run remembers it."""
        if name not in self.facts:
            self.facts[name] = compute()
        return self.facts[name]

    def seconds(self) -> float:
        """How long this run has taken, over all its resumptions."""
        return time.time() - self._began

    def follow(self, engines: dict, carried: dict, weights, data: str, average=None) -> int:
        """Take the run up where the checkpoint found ends, and return how many steps are done.

        engines: {name: zero.TrainEngine}, fresh. carried: {name: object with carry() → JSON and
        take_up(JSON)}. weights(folder): writes the models as at the end of the run. data: a
        fingerprint of the training rows. average: the EMA, where there is one.
        """
        self.engines, self.carried, self.weights = engines, carried, weights
        self.data, self.average = data, average
        if self.found is not None:
            self._restore(self.found)
        return self.step

    def after_step(self, step: int, metrics: dict[str, float]) -> None:
        """After `step` passes of the loop: save where it is due; end the run where asked to."""
        config, main = self.config, process_group.is_main()
        waited = (time.time() - self._saved_at) / 60
        due = bool(config.save_every) and step % config.save_every == 0
        due |= 0 < config.save_every_minutes <= waited
        due |= self._is_best(step, metrics)
        # Rank 0's clock and rank 0's metrics decide; any rank's signal counts.
        asked, due = process_group.on_any_rank([bool(preemption.received()), main and due])
        if not asked and not due:
            return
        saved = self.save(step)
        if asked:
            self._stop(step, saved)

    def _is_best(self, step: int, metrics: dict[str, float]) -> bool:
        """Is --keep_best's metric here, and better than ever? (Then it is remembered.)"""
        name, _, direction = self.config.keep_best.rpartition(":")
        value = metrics.get(name)
        if value is None or not math.isfinite(value):
            return False
        best = self.facts.get("best")
        sign = 1 if direction == "max" else -1
        if best is not None and sign * value <= sign * best["value"]:
            return False
        self.facts["best"] = {"metric": name, "value": value, "step": step}
        return True

    def _stop(self, step: int, saved: bool) -> None:
        name = next(filter(None, process_group.gather_objects(preemption.received())))
        if not saved:
            raise SystemExit(f"{name} after step {step}, and the checkpoint could not be written")
        self.report.say(
            f"{name}: stopped after step {step}, all of it saved in "
            f"{manifest.folder_of(self.config.output_dir, step)}; --resume auto goes on (exit code "
            f"{preemption.EXIT_CODE})"
        )
        self.report.close()
        process_group.shut_down()
        raise SystemExit(preemption.EXIT_CODE)

    def save(self, step: int) -> bool:
        """Write checkpoint `step`. False where a rank could not, which is told; the run goes on."""
        if step == self._saved_step:
            return True
        began = time.time()
        folder = manifest.folder_of(self.config.output_dir, step)
        temporary = folder.with_name(f".{folder.name}.writing")
        try:
            self._write(step, folder, temporary)
        except OSError as problem:
            if process_group.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            older = [str(s) for s in manifest.steps_in(self.config.output_dir)]
            self.report.say(
                f"checkpoint at step {step} could not be written: {problem}. Training goes on; "
                f"whole ones are of steps: {', '.join(older) or 'none'}. Free space under "
                f"{self.config.output_dir}, or lower --keep_last"
            )
            return False
        self._saved_at, self._saved_step = time.time(), step
        self.report.say(f"checkpoint {folder} in {time.time() - began:.2f} s")
        return True

    def _write(self, step: int, folder: Path, temporary: Path) -> None:
        rank, ranks = process_group.rank(), process_group.world_size()
        with manifest.failing_together():
            if process_group.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        self.weights(temporary / "weights")
        name = f"rank-{rank:04d}-of-{ranks:04d}.safetensors"
        with manifest.failing_together():
            written = {name: manifest.write_tensors(temporary / name, self._tensors())}
        files = {k: v for part in process_group.gather_objects(written) for k, v in part.items()}
        self.facts["seconds"] = self.seconds()
        with manifest.failing_together():
            if process_group.is_main():
                files |= manifest.listed(temporary, files)
                manifest.seal(temporary, folder, self._record(step, files))
                self._remove_old(step)

    def _tensors(self) -> dict:
        found = engine_state.random_state(self.device)
        for name, engine in self.engines.items():
            found |= engine_state.to_write(name, engine_state.runs_of(engine))
        if self.average is not None:
            runs = engine_state.runs_of_average(self.average)
            found |= engine_state.to_write("average", runs)
        return found

    def _record(self, step: int, files: dict) -> dict:
        libraries = ("torch", "deepspeed", "transformers", "safetensors")
        return {
            "format": manifest.FORMAT,
            "step": step,
            "world_size": process_group.world_size(),
            "config": dataclasses.asdict(self.config),
            "versions": {name: version(name) for name in libraries}
            | {"python": platform.python_version()},
            "data": self.data,
            "facts": self.facts,
            "carried": {name: thing.carry() for name, thing in self.carried.items()},
            "engines": {name: engine_state.record_of(e) for name, e in self.engines.items()},
            "files": files,
        }

    def _remove_old(self, step: int) -> None:
        """Keep --keep_last of them and the best. (Later ones than `step` are damaged ones.)"""
        steps = [s for s in manifest.steps_in(self.config.output_dir) if s <= step]
        best = self.facts.get("best", {}).get("step")
        for old in steps[self.config.keep_last :] if self.config.keep_last else []:
            if old != best:
                manifest.remove(manifest.folder_of(self.config.output_dir, old))

    def _restore(self, found: resuming.Found) -> None:
        record = found.record
        if record["data"] != self.data and not self.config.resume_anyway:
            raise SystemExit(
                f"checkpoint {found.folder} was trained on {record['data']}; the data now is "
                f"{self.data}: step {found.step} is no place in it. Give the same data, or "
                "--resume_anyway"
            )
        names = [n for n in record["files"] if n.startswith("rank-")]
        reader = manifest.Reader(found.folder, names)
        try:
            for name, engine in self.engines.items():
                engine_state.restore(engine, name, reader, record["engines"][name])
            if self.average is not None:
                runs = engine_state.runs_of_average(self.average)
                engine_state.fill("average", runs, reader)
        except manifest.Damaged as problem:
            raise SystemExit(f"checkpoint {found.folder} does not fit: {problem}") from None
        for name, thing in self.carried.items():
            thing.take_up(record["carried"][name])
        engine_state.restore_random(reader, record["world_size"], self.device)
        self.report.say(f"resumed from {found.folder}, after {found.step} steps")
