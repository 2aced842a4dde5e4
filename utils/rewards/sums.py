"""The rewards of a run beside its reward model: functions, each with a weight, added up."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from utils.rewards import functions


@dataclass(frozen=True)
class Answers:
    """What is scored: B each of the turns before the answer, the answer's text, the data row that
    the prompt came from, and whether the answer ended with the stop token."""

    messages: list[tuple[dict, ...]]
    texts: list[str]
    rows: list[dict]
    finished: list[bool]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class WeightedSum:
    """parts: by their name in metrics, what gives B answers as many scores, or raises
    FunctionError. weights: one each."""

    parts: dict[str, Callable[[Answers], list[float]]]
    weights: list[float]

    def scores(self, answers: Answers) -> torch.Tensor:
        """(N,B) fp32, of each part, which are asked one after the other."""
        return torch.tensor([part(answers) for part in self.parts.values()], dtype=torch.float)

    def total(self, scores: torch.Tensor) -> torch.Tensor:
        """(N,B) → (B,), weighted."""
        return (torch.tensor(self.weights)[:, None] * scores).sum(0)

    def means(self, scores: torch.Tensor) -> dict[str, float]:
        """Metrics: the mean of each part, without its weight. One alone is `score_function`."""
        rows = zip(self.parts, scores, strict=True) if len(self.parts) > 1 else ()
        return {f"score_function/{name}": row.mean().item() for name, row in rows}


@dataclass(frozen=True)
class Function:
    """A loaded function under the name that --reward_function gives it. timeout: seconds of a
    call, 0: none."""

    function: Callable
    name: str
    timeout: float

    def __call__(self, answers: Answers) -> list[float]:
        # The last turn before an answer may be a tool's.
        asked = [[t for t in turns if t["role"] == "user"][-1] for turns in answers.messages]
        prompts = [turn["content"] for turn in asked]
        said = self.function, self.name, prompts, answers.texts, answers.rows
        return functions.call(*said, self.timeout)


def load(names: list[str], weights: list[float], timeout: float, server=None) -> WeightedSum:
    """names: as --reward_function takes them; weights: one each, then the server's, or none for 1
    each; timeout: seconds of each one's call, 0: none; server: a part more, called "url" in
    metrics. Raises SystemExit where a name means no function."""
    functions_ = [Function(functions.load(name), name, timeout) for name in names]
    parts = dict(zip(metric_names(names), functions_, strict=True))
    parts |= {} if server is None else {"url": server}
    return WeightedSum(parts, weights or [1.0] * len(parts))


def metric_names(names: list[str]) -> list[str]:
    """FILE.py:name → name, or the whole where several functions are called that, or the server."""
    short = [name.rpartition(":")[2] for name in names]
    times = Counter([*short, "url"])
    return [s if times[s] == 1 else whole for s, whole in zip(short, names, strict=True)]
