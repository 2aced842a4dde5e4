"""A run from its settings to its result: what the steps do alike before, beside and after their
loops. It owns no loop; each step's main.py does."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from utils import metrics, provenance, tracking
from utils import report as reporting
from utils.checkpoints import manifest, model_folder, resuming
from utils.checkpoints.checkpoints import Checkpoints, Saving
from utils.data import chat_template
from utils.distributed import optimizers, process_group, program, shared_files, zero
from utils.distributed.process_group import StopRun
from utils.errors import UserError
from utils.kernels.cpu_products import PRODUCTS
from utils.models import language_model, merge, quantised, value_heads
from utils.planner import plan
from utils.pretrained import base_of
from utils.seeding import seed_everything
from utils.settings import command_line


def join(config) -> torch.device:
    """Join the other ranks, look at what all machines must share, seed; → this rank's device."""
    program.quiet_libraries()
    device = process_group.init(config.timeout_minutes)
    shared_files.check(config.output_dir, dataclasses.asdict(config))
    seed_everything(config.seed, config.deterministic)
    return device


def output_of(config) -> resuming.Output:
    return config.pick(
        resuming.Output,
        settings=dataclasses.asdict(config),
        on_resume=config.on_resume(),
        defaults=config.defaults(),
    )


class Run:
    """One run of one step. Every rank calls every method at the same place.

    resumed_from: the checkpoint that it goes on from, None for a new run. facts: what `main` needs
    again once the run is resumed, JSON only. settings: the run's config.yaml.
    """

    def __init__(self, config):
        """Everything before data and models: is the output folder free, which checkpoint does the
        run go on from, which day is it. Ends the process where nothing is left to do."""
        self.config = config
        best = config.keep_best.rpartition(":")[0]
        if best and not metrics.known(best):
            raise UserError(
                f"keep_best={config.keep_best}: no metric is called {best!r}; set --keep_best to "
                "one of docs/metrics.md, e.g. eval/loss:min"
            )
        output_of(config).check()
        self.device = join(config)
        self.dtype = zero.resolve_dtype(config.dtype, self.device)
        optimizers.check(config.optimizer)
        quantised.check(config.load_in_4bit, config.load_in_8bit)
        self.resumed_from = output_of(config).find()
        config.date = resuming.date_of(config.date, self.resumed_from)
        self.report = reporting.Report(
            config.output_dir,
            config.log_every,
            config.tensorboard,
            resumed_at=self.resumed_from and self.resumed_from.step,
        )
        self.say = self.report.say
        if config.track and process_group.is_main():
            resumed = self.resumed_from is not None
            asked = config.track, config.output_dir, dataclasses.asdict(config), resumed
            self.report.tracking = tracking.Tracking(*asked, self.say)
        self.settings = command_line.text_of(config, process_group.world_size())
        if process_group.is_main():
            command_line.save(config, config.output_dir, process_group.world_size())
            provenance.save(config.output_dir, process_group.world_size())
        self.bad_steps = BadSteps(config.max_bad_steps, self.say, self.save)
        self.checkpoints = Checkpoints(
            config.pick(Saving), dataclasses.asdict(config), self.resumed_from, self.report
        )
        self.facts = self.checkpoints.facts

    def load_tokenizer(self, length: int, flags: str):
        """The model's tokenizer, once it is sure that the model has positions for so many tokens as
        `flags` ask for."""
        name, trusted = self.config.model_name_or_path, self.config.trust_remote_code
        language_model.check_positions(name, length, flags, trusted)
        if getattr(self.config, "loss", "") != "ilql":
            value_heads.check_not_there(name, trusted)
        return chat_template.load_tokenizer(name, trusted, self.config.date)

    def announce(self, what: str, steps: int) -> None:
        """Say what this run is going to do, of how many steps, and the memory it will take."""
        batch, ranks = self.config.global_batch_size, process_group.world_size()
        micro, tokens = self.config.micro_batch_size, self.config.micro_batch_tokens
        arithmetic = (
            f"{batch} over {ranks} ranks, micro-batches of up to {tokens} tokens"
            if tokens
            else f"{batch} = micro batch {micro} × accumulation {batch // (micro * ranks)} × ranks "
            f"{ranks}"
        )
        zero_stage = f"ZeRO-{self.config.zero_stage}"
        self.say(f"{what}, {self.dtype}, {zero_stage}, global batch {arithmetic}")
        plan.first_lines(self.config.workload(), self.dtype, self.device, self.say)
        self.report.expect(steps)

    def restore(self, outputs: dict, engines: dict, data: str, **state) -> int:
        """Go on where the checkpoint ends that the run is resumed from, if it is; → how many steps
        are done. What is given here is in every checkpoint: see Checkpoints.follow."""
        self.outputs = outputs
        state |= {"bad_steps": self.bad_steps, "products": PRODUCTS}
        return self.checkpoints.follow(engines, state, outputs, data)

    def once(self, name: str, compute):
        """What `compute()` gave when this run began; a resumed run remembers it."""
        if name not in self.facts:
            self.facts[name] = compute()
        return self.facts[name]

    def __enter__(self) -> "Run":
        """The loop begins: from now on a signal to end waits for the end of a step."""
        self.checkpoints.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.checkpoints.__exit__(*error)

    def after_step(self, step: int, metrics: dict[str, float], show: tuple[str, ...]) -> None:
        """Log step number `step`, save a checkpoint where one is due, end where a signal asks."""
        self.report.log(step, metrics, show)
        self.checkpoints.after_step(step, metrics)

    def save(self) -> None:
        """Write the models to the output folder, as they are; adapters merged, where asked."""
        model_folder.save(self.config.output_dir, self.outputs)
        if not self.config.merge_on_save:
            return
        with manifest.failing_together():
            folders = [Path(self.config.output_dir) / name for name in self.outputs]
            for folder in folders if process_group.is_main() else []:
                if base_of(str(folder)):
                    merge.write(folder, folder, self.config.trust_remote_code)

    def finish(self, result: dict, text: str) -> None:
        """Write result.json, say `text`, leave the other ranks."""
        result |= {"seconds": self.checkpoints.seconds()}
        reporting.save_result(self.config.output_dir, result)
        self.say(text)
        self.close()

    def close(self) -> None:
        self.report.close()
        process_group.shut_down()


class BadSteps:
    """Counts skipped optimizer steps, and saves and ends a run that does nothing else.

    Every rank must note the same steps: `save` is a collective.
    """

    def __init__(self, limit: int, say: Callable[[str], None], save: Callable[[], None]):
        self.limit, self.say, self.save = limit, say, save
        self.total = self.in_a_row = 0

    def state_dict(self) -> dict:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, saved: dict) -> None:
        self.total, self.in_a_row = saved["total"], saved["in_a_row"]

    def note(self, skipped: bool, what: str = "a loss or gradient that is not finite") -> None:
        """Raises StopRun once more than `limit` steps in a row were skipped."""
        if not skipped:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        self.say(
            f"skipped on all ranks, for {what} ({self.in_a_row} in a row, {self.total} in all)"
        )
        if self.in_a_row > self.limit:
            self.save()
            raise StopRun(
                f"{self.in_a_row} optimizer steps in a row were skipped (--max_bad_steps "
                f"{self.limit}), the last for {what}; the weights as last stepped are saved. "
                "Likely causes: --learning_rate too high (try a tenth), fp16 or bf16 where the "
                "model's activations overflow it (try fp32), a damaged checkpoint, or data of one "
                "kind that breaks the model"
            )
