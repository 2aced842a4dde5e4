"""Checkpoints side by side: what each one answers to the same prompts.

python evaluation/prompt_eval.py --checkpoints output/step1_sft output/step3_ppo/actor

Plain transformers loads the folders and samples, so this also shows that they load anywhere.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import torch

from evaluation import answers as answer_files
from evaluation import checkpoints, pages, questions
from evaluation.answers import Answer
from utils import whole_files
from utils.data import batches, chat_template
from utils.data.chat_template import READ_AT, READ_AT_HELP
from utils.distributed import program, zero
from utils.generation import sampling as generation
from utils.models import scalar_model, scorer
from utils.models.loading import Loading
from utils.models.scorer import Reader
from utils.settings import command_line
from utils.settings.fields import setting
from utils.settings.run_config import check_folder

NOISE = 2**31 + 1  # numbers the noise of the first turn


@dataclass
class PromptEvalConfig(checkpoints.Answering):
    checkpoints: list[str] = setting(
        [], "chat models to compare: folders or hub names", needed=True
    )
    prompts: list[str] = setting(
        [],
        "text files (a prompt a line), data files, folders or hub names; rows with `turns` are "
        "played as whole conversations; none: ten prompts in English and Chinese",
    )
    max_prompts: int = setting(0, "only the first so many prompts; 0: all")
    strategy: str = setting("greedy", "how to decode", choices=("greedy", "sample", "beam"))
    num_beams: int = setting(4, "beams", at_least=2, only_with="strategy=beam")
    temperature: float = setting(1.0, "of sampling", above=0, only_with="strategy=sample")
    top_p: float = setting(
        1.0,
        "share of the probability that is sampled from",
        above=0,
        at_most=1,
        only_with="strategy=sample",
    )
    show_answers: bool = setting(True, "print each answer as it comes, and all side by side")
    batch_size: int = setting(8, "prompts answered at once", at_least=1)
    reward_model: str = setting("", "folder of a reward model that scores each answer")
    reward_read_at: str = setting(
        "auto", READ_AT_HELP, choices=("auto", *READ_AT), only_with="reward_model"
    )
    output_dir: str = setting(
        "", "write answers.jsonl, .md and .html there; empty: print only", check=check_folder
    )
    alpaca_eval_output: str = setting(
        "", "folder for a MODEL.json of each, as alpaca_eval reads it", check=check_folder
    )
    mt_bench_output: str = setting(
        "", "folder for a MODEL.jsonl of each, as FastChat's MT-Bench reads it", check=check_folder
    )
    device_map: str = setting(
        "", "empty: one device; auto: spread over all GPUs", choices=("", "auto")
    )
    attn_implementation: str = setting("auto", "sdpa, eager, …; auto: transformers' choice")

    def of_strategy(self) -> dict:
        """The settings that the chosen strategy reads."""
        read_with = f"strategy={self.strategy}"
        names = [f.name for f in dataclasses.fields(self) if f.metadata["only_with"] == read_with]
        return {name: getattr(self, name) for name in names}

    def contradictions(self, world_size: int) -> Iterator[str]:
        yield from super().contradictions(world_size)
        if world_size > 1:
            yield f"{world_size} ranks; start one process (many GPUs: --device_map auto)"
        for path in sorted({p for p in self.checkpoints if self.checkpoints.count(p) > 1}):
            yield f"checkpoints names {path!r} twice; name it once in --checkpoints"
        names = [answer_files.model_name(path) for path in dict.fromkeys(self.checkpoints)]
        if self.formats() and len(set(names)) < len(names):
            yield f"checkpoints {names} have one file name for two; rename a folder"
        for path in dict.fromkeys(self.checkpoints):
            yield from checkpoints.folder_problems(path, "checkpoints")
        if self.reward_model:
            yield from checkpoints.folder_problems(self.reward_model, "reward_model")
        for name in self.prompts:
            unsplit = name.rpartition(":")[0] or name  # NAME:SPLIT
            if checkpoints.looks_local(unsplit) and not any(
                Path(n).exists() for n in (name, unsplit)
            ):
                yield f"prompts: {name!r} does not exist; set --prompts to files or folders"

    def formats(self) -> list[str]:
        """Flags that ask for the files of other programs."""
        return [flag for flag in answer_files.FORMATS if getattr(self, flag)]

    def shown(self) -> dict:
        """What the page says of how the answers came about."""
        names = ("seed", "max_new_tokens", "dtype", "reward_model")
        rest = {name: getattr(self, name) for name in names}
        return {"strategy": self.strategy} | self.of_strategy() | rest


class Drawn:
    """A processor of transformers' `generate` that leaves of each row's logits the token that noise
    (B,R) draws from them. So an answer depends on the seed and the number of its prompt, and
    neither on the batch nor on what other checkpoints answer."""

    def __init__(self, noise: torch.Tensor, prompt_length: int, config):
        from transformers import TopPLogitsWarper

        self.noise, self.start, self.temperature = noise, prompt_length, config.temperature
        self.top_p = TopPLogitsWarper(config.top_p) if config.top_p < 1 else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """ids (B,T), scores (B,V) → (B,V)"""
        scores = scores.float() / self.temperature
        if self.top_p is not None:
            scores = self.top_p(input_ids, scores)
        noise = self.noise[:, input_ids.shape[1] - self.start].to(scores.device)
        tokens = generation.sample_tokens(scores, noise, 1.0)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


@torch.no_grad()
def answer_all(config, checkpoint: str, asked: list[questions.Question]):
    """(answers of each question, a turn after the other; seconds spent sampling)."""
    model, tokenizer = checkpoints.load_checkpoint(
        checkpoint,
        dtype=config.dtype,
        device_map=config.device_map,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    model.generation_config = checkpoints.generation_config(
        tokenizer,
        max_new_tokens=config.max_new_tokens,
        do_sample=False,  # where tokens are drawn, Drawn does it
        num_beams=config.num_beams if config.strategy == "beam" else 1,
    )
    room = checkpoints.prompt_room(model, config.max_new_tokens)
    answers: list[list[Answer]] = [[] for _ in asked]
    talks = [question.context for question in asked]
    seconds, shortened = 0.0, 0
    for turn in range(max(len(q.turns) for q in asked)):
        due = [i for i, question in enumerate(asked) if turn < len(question.turns)]
        # The first turn's is that of evaluation/summary.py.
        of_turn = len(asked), config.max_new_tokens, config.seed, NOISE + turn
        noise = generation.uniform_noise(*of_turn) if config.strategy == "sample" else None
        for start in range(0, len(due), config.batch_size):
            chosen, prompts = due[start : start + config.batch_size], []
            for i in chosen:
                talks[i] += ({"role": "user", "content": asked[i].turns[turn]},)
                ids, shorter = checkpoints.encode_prompt(tokenizer, talks[i], asked[i].where, room)
                if ids is None:
                    raise SystemExit(
                        f"{asked[i].where}: not even the frame of its prompt fits the {room} "
                        f"tokens that {checkpoint} has for it; lower --max_new_tokens"
                    )
                prompts.append(ids)
                shortened += shorter
            tick = time.time()
            drawn = None if noise is None else (noise[chosen], config)
            sampled = generate(model, tokenizer, prompts, drawn)
            seconds += time.time() - tick
            for i, (text, tokens, finished) in zip(chosen, sampled, strict=True):
                talks[i] += ({"role": "assistant", "content": text},)
                answers[i].append(Answer(checkpoint, turn + 1, talks[i], tokens, finished))
            done = start + len(chosen)
            print(f"{checkpoint}: turn {turn + 1}, {done}/{len(due)} answered", flush=True)
            if config.show_answers:
                print(pages.last_turns([(asked[i], answers[i][-1]) for i in chosen]), flush=True)
    if shortened:
        lost = f"{shortened} prompts lost their beginning to fit its positions"
        print(f"{checkpoint}: {lost}", flush=True)
    return answers, seconds


def generate(model, tokenizer, encoded: list[list[int]], drawn=None) -> list[tuple[str, int, bool]]:
    """Ids of prompts → (answer, its tokens with the stop token, ended with it) for each.

    drawn: (noise (B,R), settings) of sampling, else None.
    """
    ids, mask = batches.prompt_batch(encoded, tokenizer.pad_token_id)
    how = {"logits_processor": [Drawn(drawn[0], ids.shape[1], drawn[1])]} if drawn else {}
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device), **how
    )
    responses = output[:, ids.shape[1] :].cpu()
    counted = generation.mask_through_stop(responses, tokenizer.eos_token_id)
    answers = []
    for response, keep in zip(responses, counted, strict=True):
        kept = response[keep]
        finished = bool((kept == tokenizer.eos_token_id).any())
        answers.append((tokenizer.decode(kept, skip_special_tokens=True), len(kept), finished))
    return answers


def score_all(config, answers) -> list[str]:
    """Set every Answer's score as PPO would: the reward model's, bias taken off, on the
    whole conversation. Returns why those that its template refuses, or to which it gives no
    finite number, have none."""
    reader = Reader.load(config.reward_model, config.trust_remote_code, config.reward_read_at)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = zero.resolve_dtype(config.dtype, device)
    how = Loading(config.attn_implementation, config.trust_remote_code, packing="off")
    model = scalar_model.load(how, config.reward_model, dtype=dtype, tokenizer=reader.tokenizer)
    refused, chosen, groups = [], [], []
    for a in answers:
        if why := reader.refusal(a.conversation[:-1]):
            refused.append(f"{a.checkpoint}, turn {a.turn}, {a.answer[:60]!r}: no score, {why}")
            continue
        chosen.append(a)
        groups.append([reader.encode(a.conversation[:-1], a.answer, a.finished)])
    scores = scorer.score_groups(model.to(device), groups, device, config.batch_size)
    for a, (score,) in zip(chosen, scores, strict=True):
        if math.isfinite(score):
            a.score = score
        else:  # no comparison with it would hold
            said = f"{a.checkpoint}, turn {a.turn}, {a.answer[:60]!r}"
            refused.append(f"{said}: no score, the reward model gives {score}")
    return refused


def write(config, asked, results, summary: str) -> None:
    """answers.jsonl, a line per prompt, checkpoint and turn; pages for people; what other programs
    read."""
    if config.output_dir:
        folder = Path(config.output_dir)
        answer_files.write(folder / "answers.jsonl", asked, results, bool(config.reward_model))
        if len(results) > 1:
            answer_files.write_to_rank(folder / "to_rank.jsonl", results)
        for name, page in (("md", pages.as_markdown), ("html", pages.as_html)):
            text = page(asked, results, config.shown(), summary)
            whole_files.write_text(folder / f"answers.{name}", text)
        print(f"written: {folder}/answers.jsonl, answers.md, answers.html", flush=True)
    for flag in config.formats():
        folder = Path(getattr(config, flag))
        answer_files.FORMATS[flag][1](folder, asked, results)
        print(f"written: {folder}/", flush=True)


def refuse_prompts(config, asked: list[questions.Question]) -> None:
    """Raises DataError for prompts that a checkpoint or the program of a flag cannot read."""
    trusted = config.trust_remote_code
    tokenizers = {p: chat_template.load_tokenizer(p, trusted) for p in config.checkpoints}
    questions.refuse_unrendered(asked, tokenizers)
    answer_files.refuse_unreadable(asked, config.formats())


def main() -> None:
    config = command_line.parse(PromptEvalConfig, __doc__)
    program.quiet_libraries()
    asked = questions.load(config.prompts, config.max_prompts)
    refuse_prompts(config, asked)
    if config.output_dir:
        with whole_files.naming(config.output_dir):
            Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    results, seconds = {}, {}
    for checkpoint in config.checkpoints:
        results[checkpoint], seconds[checkpoint] = answer_all(config, checkpoint, asked)
    # Before they are scored, whatever becomes of that.
    if config.show_answers:
        print(pages.as_text(asked, results) + "\n", flush=True)
    write(config, asked, results, pages.summary_table(results, seconds))
    if config.reward_model:
        answers = [a for groups in results.values() for g in groups for a in g]
        refused = score_all(config, answers)
        print("\n".join([*refused, pages.score_table(asked, results), ""]))
    summary = pages.summary_table(results, seconds)
    print(summary, flush=True)
    if config.reward_model:
        write(config, asked, results, summary)


if __name__ == "__main__":
    program.run(main)
