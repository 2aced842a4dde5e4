"""The policy's own answers to held-out prompts, while it learns from those of others: how good a
judge that training does not see finds them, and how far they are from the reference."""

import itertools
import json
from pathlib import Path

import torch

from step3_preference import logprobs
from utils import report, whole_files
from utils.data import batches, toy_tasks
from utils.data import prompts as prompt_data
from utils.data.loading import DataSettings
from utils.data.preferences import Answers
from utils.distributed import process_group, zero
from utils.generation import engines
from utils.generation.engine import Request, Sampling, Setup, synced
from utils.generation.sampling import uniform_noise
from utils.models import scalar_model, scorer
from utils.models.loading import Loading
from utils.models.scorer import Reader

NOISE = 2**31  # numbers the noise of evaluations, as step 3's: the same samples each time
KEPT = 16  # answers that the run's page shows


class HeldOutAnswers:
    """prompts: those that step 3 would hold out of --prompt_data. judge: --judge_model, ready to be
    asked, or None."""

    def __init__(self, config, tokenizer, run, actor: zero.TrainEngine):
        self.config, self.tokenizer, self.run, self.actor = config, tokenizer, run, actor
        self.reader = self.judge = None
        if config.judge_model:
            trusted = config.trust_remote_code
            self.reader = Reader.load(config.judge_model, trusted, date=config.date)
        readers = [self.reader] if self.reader else []
        # Weights are of the comparisons.
        settings = config.pick(DataSettings, data_weights=())
        length = config.max_prompt_length
        names = config.prompt_data
        _, held = prompt_data.load(names, tokenizer, settings, length, readers, run.say)
        self.prompts = [held[i] for i in range(len(held))]
        self.verified = all(toy_tasks.is_task(p.row) for p in self.prompts)
        if self.reader:
            how = dict(dtype=run.dtype, zero_stage=3 if config.zero_stage == 3 else 0)
            model = scalar_model.load(
                config.pick(Loading), config.judge_model, tokenizer=self.reader.tokenizer, **how
            )
            self.judge = zero.frozen(model, **how, device=run.device, offload=config.offload)
        if not (self.judge or self.verified):
            run.say("prompt_data: nobody judges the answers to it; set --judge_model")
        longest = length + config.max_response_length
        rows = config.micro_batch_size
        setup = Setup(actor, tokenizer, rows_at_once=rows, longest=longest)
        self.engine = engines.build("native", setup)

    def sampled(self) -> list[tuple[list[int], bool]]:
        """(tokens of the answer, did it end by itself) for each prompt, on every rank."""
        config, pad_id = self.config, self.tokenizer.pad_token_id
        noise = uniform_noise(len(self.prompts), config.max_response_length, config.seed, NOISE)
        how = Sampling(config.max_response_length, self.tokenizer.eos_token_id, pad_id)
        # The first prompts come again where they do not divide by the ranks, which under ZeRO-3
        # go forward together.
        rank, ranks, size = process_group.rank(), process_group.world_size(), len(self.prompts)
        each = -(-size // ranks)
        order = sorted(range(size), key=lambda i: (len(self.prompts[i].ids), i))
        mine = list(itertools.islice(itertools.cycle(order), each * ranks))[rank::ranks]
        found = {}
        with synced(self.engine, self.actor) as engine:
            for start in range(0, each, config.micro_batch_size):
                some = mine[start : start + config.micro_batch_size]
                prompts = batches.prompt_batch([self.prompts[i].ids for i in some], pad_id)
                samples = engine.generate(Request(*prompts, noise[some]), how)
                rows = zip(samples.response_ids, samples.response_mask, strict=True)
                ids = [row[mask].tolist() for row, mask in rows]
                finished = [reason == "stop" for reason in samples.finish_reasons]
                found |= dict(zip(some, zip(ids, finished, strict=True), strict=True))
        everywhere = {}
        for part in process_group.gather_objects(found):
            everywhere |= part
        return [everywhere[i] for i in range(size)]

    @torch.no_grad()
    def measure(self, moment: str) -> dict[str, float]:
        """Metrics of answers sampled now. Some of them go to `samples.json` and to a tracker, as
        those of `moment`, "before" or "after"."""
        config, run, count = self.config, self.run, len(self.prompts)
        answers = self.sampled()
        texts = self.tokenizer.batch_decode([ids for ids, _ in answers], skip_special_tokens=True)
        rows = [
            Answers([[*p.ids, *ids]], [len(p.ids)], [0.0], [0])
            for p, (ids, _) in zip(self.prompts, answers, strict=True)
        ]
        budget = config.micro_batch_size, config.micro_batch_tokens
        policy = logprobs.of_all(self.actor, rows, run.device, budget)
        reference = logprobs.by_reference(config, {"": rows}, self.tokenizer, run)[""]
        moved = [p - q for (p,), (q,) in zip(policy, reference, strict=True)]
        measured = {"kl_k1": sum(moved) / count}
        measured["response_length"] = sum(len(ids) for ids, _ in answers) / count
        measured["eos_share"] = sum(done for _, done in answers) / count
        kept = [
            {"prompt": list(p.messages), "answer": text, "finished": done, "tokens": len(ids)}
            for p, text, (ids, done) in zip(self.prompts, texts, answers, strict=True)
        ]
        if self.verified:
            points = [
                float(toy_tasks.verify(p.row, t)) for p, t in zip(self.prompts, texts, strict=True)
            ]
            measured["verifier"] = sum(points) / count
            kept = [row | {"verifier": x} for row, x in zip(kept, points, strict=True)]
        if self.judge:
            both = zip(self.prompts, texts, answers, strict=True)
            groups = [[self.reader.encode(p.messages, t, done)] for p, t, (_, done) in both]
            scores = [x for (x,) in scorer.score_groups(self.judge, groups, run.device, *budget)]
            measured["judge"] = sum(scores) / count
            measured["judge_std"] = torch.tensor(scores).std(correction=0).item()
            kept = [row | {"score": x} for row, x in zip(kept, scores, strict=True)]
        self.keep(moment, kept[:KEPT])
        return {f"eval/{name}": value for name, value in measured.items()}

    def keep(self, moment: str, rows: list[dict]) -> None:
        self.run.facts[f"answers_{moment}"] = rows
        said = {m: self.run.facts.get(f"answers_{m}") for m in ("before", "after")}
        if process_group.is_main():
            file = Path(self.config.output_dir) / "samples.json"
            text = json.dumps({m: x for m, x in said.items() if x}, ensure_ascii=False)
            whole_files.write_text(file, text + "\n")
        self.run.report.table("answers", report.answers_as_table(rows))
