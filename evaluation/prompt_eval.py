"""Checkpoints side by side: what each one answers to the same prompts.

python evaluation/prompt_eval.py --checkpoints output/step1_sft output/step3_ppo/actor

Plain transformers loads the folders and samples, so this also shows that they load anywhere.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import torch

from evaluation import checkpoints, markdown, scores
from utils import report as reporting
from utils import terminal, whole_files
from utils.data import batches, chat_template, files, rows, sources
from utils.data import prompts as prompt_data
from utils.data.chat_template import READ_AT, READ_AT_HELP
from utils.data.turns import text_of
from utils.distributed import program
from utils.generation import sampling as generation
from utils.settings import command_line
from utils.settings.fields import Settings, setting
from utils.settings.run_config import check_folder

BUILT_IN_PROMPTS = (
    "Explain the moon landing to a 6 year old in a few sentences.",
    "Write a short poem about a wise frog.",
    "Why are there leap years?",
    "List three ways to save water at home.",
    "Write a polite email that moves a meeting from Monday to Thursday.",
    "A train travels 180 km in 2.5 hours. What is its average speed? Show your steps.",
    "请用简单的话解释什么是光合作用。",
    "写一首关于秋天的四行短诗。",
    "如何在一个月内养成早起的习惯?请给出三条建议。",
    "把这句话翻译成英文:学而时习之,不亦说乎?",
)


@dataclass
class PromptEvalConfig(Settings):
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
    seed: int = setting(42, "seed of strategy sample", below=2**63)
    max_new_tokens: int = setting(128, "tokens an answer at most", at_least=1)
    batch_size: int = setting(8, "prompts answered at once", at_least=1)
    reward_model: str = setting("", "folder of a reward model that scores each answer")
    reward_read_at: str = setting(
        "auto", READ_AT_HELP, choices=("auto", *READ_AT), only_with="reward_model"
    )
    output_dir: str = setting(
        "", "write answers.jsonl and answers.md there; empty: print only", check=check_folder
    )
    dtype: str = setting(
        "auto",
        "of the weights; auto: bf16 where the GPU or CPU computes it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    device_map: str = setting(
        "", "empty: one device; auto: spread over all GPUs", choices=("", "auto")
    )
    attn_implementation: str = setting("auto", "sdpa, eager, …; auto: transformers' choice")
    trust_remote_code: bool = setting(False, "run Python code that comes with a model (a risk)")

    def of_strategy(self) -> dict:
        """The settings that the chosen strategy reads."""
        read_with = f"strategy={self.strategy}"
        names = [f.name for f in dataclasses.fields(self) if f.metadata["only_with"] == read_with]
        return {name: getattr(self, name) for name in names}

    def problems(self, world_size: int) -> list[str]:
        found = super().problems(world_size)
        if world_size > 1:
            found.append(f"{world_size} ranks; start one process (many GPUs: --device_map auto)")
        for path in sorted({p for p in self.checkpoints if self.checkpoints.count(p) > 1}):
            found.append(f"checkpoints names {path!r} twice; name it once in --checkpoints")
        for path in dict.fromkeys(self.checkpoints):
            found += checkpoints.folder_problems(path, "checkpoints")
        if self.reward_model:
            found += checkpoints.folder_problems(self.reward_model, "reward_model")
        for name in self.prompts:
            unsplit = name.rpartition(":")[0] or name  # NAME:SPLIT
            if checkpoints.looks_local(unsplit) and not any(
                Path(n).exists() for n in (name, unsplit)
            ):
                found.append(f"prompts: {name!r} does not exist; set --prompts to files or folders")
        if self.dtype == "fp16" and not torch.cuda.is_available():
            found.append("dtype=fp16 has no CPU kernels worth using; --dtype bf16 or fp32")
        return found


@dataclass(frozen=True)
class Question:
    context: tuple[dict, ...]  # what was said before, a system turn perhaps
    turns: tuple[str, ...]  # what the user says, each after the answer to the one before
    where: str


@dataclass
class Answer:
    checkpoint: str
    turn: int  # from 1
    conversation: tuple[dict, ...]  # all turns, this answer's text last
    tokens: int  # the stop token included
    finished: bool  # ended with the stop token
    score: float | None = None

    @property
    def answer(self) -> str:
        return self.conversation[-1]["content"]


def load_questions(config) -> list[Question]:
    """The prompts of all files, the first `max_prompts` of them. Raises DataError."""
    if not config.prompts:
        shown = BUILT_IN_PROMPTS[: config.max_prompts or None]
        return [Question((), (text,), f"built-in {n}") for n, text in enumerate(shown, 1)]
    bad = rows.BadRows()
    found, problems = [], []
    for name in config.prompts:
        try:
            found += _read_prompts(name, bad)
        except rows.DataError as error:
            problems += error.problems
    if problems or len(bad):
        every = list(dict.fromkeys([*problems, *bad.problems]))
        raise rows.DataError(every, title="prompts that cannot be used:")
    return found[: config.max_prompts or None]


def _read_prompts(name: str, bad: rows.BadRows) -> list[Question]:
    if Path(name).is_file() and not name.lower().endswith(files.FILES):
        return _read_lines(name, bad)
    found = []
    role = "eval" if sources.has_split(name, prompt_data.SPLITS["eval"]) else "train"
    for prompt in prompt_data.load_prompts([name], split_role=role, bad=bad):
        try:
            found.append(Question(prompt.messages[:-1], _turns(prompt), prompt.where))
        except rows.BadRow as problem:
            bad.add(prompt.where, str(problem), prompt.row)
    return found


def _read_lines(path: str, bad: rows.BadRows) -> list[Question]:
    found, before = [], len(bad)
    for number, raw in enumerate(Path(path).read_bytes().removeprefix(files.UTF8_BOM).split(b"\n")):
        where = f"{path}:{number + 1}"
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            bad.add(where, f"not UTF-8: {error.reason} at byte {error.start + 1} of the line")
            continue
        if problem := rows.text_problem(text):
            bad.add(where, f"the line {problem}")
        elif text:
            found.append(Question((), (text,), where))
    if not found and len(bad) == before:
        raise rows.DataError(f"{path}: holds no prompts")
    return found


def _turns(prompt: prompt_data.Prompt) -> tuple[str, ...]:
    """What the user says: all turns of a row of MT-Bench, else one. Raises BadRow."""
    first, turns = prompt.messages[-1]["content"], prompt.row.get("turns")
    if prompt.messages[-1]["role"] != "user":
        raise rows.BadRow("a tool's result stands last, and only what users say is asked here")
    if not isinstance(turns, list) or turns[:1] != [first]:
        return (first,)
    return tuple(text_of(turn, f"turn {n} of turns") for n, turn in enumerate(turns, 1))


def refuse_unrendered(config, questions: list[Question]) -> None:
    """Raise DataError that names each prompt which a checkpoint's template refuses, before any
    checkpoint has answered in vain."""
    problems = []
    for path in config.checkpoints:
        tokenizer = chat_template.load_tokenizer(path, config.trust_remote_code)
        for question in questions:
            turn = {"role": "user", "content": question.turns[0]}
            try:
                chat_template.encode_prompt(tokenizer, (*question.context, turn))
            except chat_template.TemplateError as error:
                problems.append(f"{question.where}: {path}: {error}")
    if problems:
        raise rows.DataError(problems, title="prompts that cannot be answered:")


@torch.no_grad()
def answer_all(config, checkpoint: str, questions: list[Question]):
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
        do_sample=config.strategy == "sample",
        **config.of_strategy(),
    )
    room = checkpoints.prompt_room(model, config.max_new_tokens)
    torch.manual_seed(config.seed)
    answers: list[list[Answer]] = [[] for _ in questions]
    talks = [question.context for question in questions]
    seconds, cut = 0.0, 0
    for turn in range(max(len(q.turns) for q in questions)):
        asked = [i for i, question in enumerate(questions) if turn < len(question.turns)]
        for start in range(0, len(asked), config.batch_size):
            chosen = asked[start : start + config.batch_size]
            for i in chosen:
                talks[i] += ({"role": "user", "content": questions[i].turns[turn]},)
            encoded = []
            for i in chosen:
                ids, shorter = checkpoints.encode_prompt(
                    tokenizer, talks[i], questions[i].where, room
                )
                if ids is None:
                    raise SystemExit(
                        f"{questions[i].where}: not even the frame of its prompt fits the {room} "
                        f"tokens that {checkpoint} has for it; lower --max_new_tokens"
                    )
                encoded.append(ids)
                cut += shorter
            tick = time.time()
            found = generate(model, tokenizer, encoded)
            seconds += time.time() - tick
            for i, (text, tokens, finished) in zip(chosen, found, strict=True):
                talks[i] += ({"role": "assistant", "content": text},)
                answers[i].append(Answer(checkpoint, turn + 1, talks[i], tokens, finished))
            done = min(start + config.batch_size, len(asked))
            print(f"{checkpoint}: turn {turn + 1}, {done}/{len(asked)} answered", flush=True)
    if cut:
        print(f"{checkpoint}: {cut} prompts lost their beginning to fit its positions", flush=True)
    return answers, seconds


def generate(model, tokenizer, encoded: list[list[int]]) -> list[tuple[str, int, bool]]:
    """Ids of prompts → (answer, its tokens with the stop token, ended with it) for each."""
    ids, mask = batches.prompt_batch(encoded, tokenizer.pad_token_id)
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device)
    )
    responses = output[:, ids.shape[1] :].cpu()
    counted = generation.mask_through_stop(responses, tokenizer.eos_token_id)
    found = []
    for response, keep in zip(responses, counted, strict=True):
        kept = response[keep]
        finished = bool((kept == tokenizer.eos_token_id).any())
        found.append((tokenizer.decode(kept, skip_special_tokens=True), len(kept), finished))
    return found


def facts(answer: Answer) -> str:
    ending = "finished" if answer.finished else "cut off"
    score = "" if answer.score is None else f", score {answer.score:.3f}"
    return f"{answer.tokens} tokens, {ending}{score}"


def blocks(questions: list[Question], results: dict[str, list[list[Answer]]]):
    """(level, heading, text) of all there is to show: 2 a prompt, 3 who asks, 4 who answers."""
    for i, question in enumerate(questions):
        yield 2, f"prompt {i + 1} of {len(questions)}, {question.where}", ""
        for message in question.context:
            yield 3, message["role"], message["content"]
        for turn, text in enumerate(question.turns):
            yield 3, "user", text
            for checkpoint, answers in results.items():
                answer = answers[i][turn]
                yield 4, f"{checkpoint} ({facts(answer)})", answer.answer


def as_text(questions, results) -> str:
    marks = {2: "\n══ ", 3: "── ", 4: "→ "}
    lines = []
    for level, heading, text in blocks(questions, results):
        lines.append(marks[level] + terminal.visible(heading))
        lines += ["    " + line for line in terminal.visible(text).split("\n")] if level > 2 else []
    return "\n".join(lines)


def as_markdown(config, questions, results, summary: str) -> str:
    names = ("strategy", *config.of_strategy(), "seed", "max_new_tokens", "dtype", "reward_model")
    settings = "\n".join(f"{name}: {getattr(config, name)}" for name in names)
    parts = ["# Answers side by side", markdown.fence(settings), markdown.fence(summary)]
    for level, heading, text in blocks(questions, results):
        parts.append("#" * level + " " + markdown.code_span(heading))
        parts += [markdown.fence(text)] if level > 2 else []
    return "\n\n".join(parts) + "\n"


def summary_table(results: dict[str, list[list[Answer]]], seconds: dict[str, float]) -> str:
    header = ("checkpoint", "answers", "tokens/answer", "finished", "tokens/s", "mean score")
    lines = []
    for checkpoint, groups in results.items():
        answers = [a for group in groups for a in group]
        n, tokens = len(answers), sum(a.tokens for a in answers)
        finished = sum(a.finished for a in answers) / n
        line = (checkpoint, n, f"{tokens / n:.1f}", f"{finished:.0%}")
        line = (*line, f"{tokens / seconds[checkpoint]:.1f}")
        scored = [a.score for a in answers if a.score is not None]
        lines.append((*line, f"{sum(scored) / len(scored):.3f}" if scored else "-"))
    if all(line[-1] == "-" for line in lines):
        header, lines = header[:-1], [line[:-1] for line in lines]
    return reporting.table(lines, header)


def write(config, questions, results, summary: str) -> None:
    """answers.jsonl, a line per prompt, checkpoint and turn; answers.md for people."""
    folder = Path(config.output_dir)
    with whole_files.writing(folder / "answers.jsonl") as file:
        for i, question in enumerate(questions):
            for answer in (a for groups in results.values() for a in groups[i]):
                record = {"prompt": question.turns[answer.turn - 1], "where": question.where}
                names = ("checkpoint", "turn", "answer", "tokens", "finished")
                for name in (*names, *(["score"] if config.reward_model else [])):
                    record[name] = getattr(answer, name)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    page = as_markdown(config, questions, results, summary)
    whole_files.write_text(folder / "answers.md", page)
    print(f"written: {folder / 'answers.jsonl'}, {folder / 'answers.md'}", flush=True)


def main() -> None:
    config = command_line.parse(PromptEvalConfig, __doc__)
    program.quiet_libraries()
    try:
        questions = load_questions(config)
        refuse_unrendered(config, questions)
    except rows.DataError as error:
        raise SystemExit(str(error)) from error
    if config.output_dir:
        with whole_files.naming(config.output_dir):
            Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    results, seconds = {}, {}
    for checkpoint in config.checkpoints:
        results[checkpoint], seconds[checkpoint] = answer_all(config, checkpoint, questions)
    # Before they are scored, whatever becomes of that.
    print(as_text(questions, results) + "\n", flush=True)
    if config.output_dir:
        write(config, questions, results, summary_table(results, seconds))
    if config.reward_model:
        answers = [a for groups in results.values() for g in groups for a in g]
        refused = scores.score_all(config, answers)
        print("\n".join([*refused, scores.score_table(questions, results), ""]))
    summary = summary_table(results, seconds)
    print(summary, flush=True)
    if config.output_dir and config.reward_model:
        write(config, questions, results, summary)


if __name__ == "__main__":
    program.run(main)
