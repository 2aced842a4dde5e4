"""What PPO carries from rollout to rollout beside the weights: saved with them as state.json,
and in every checkpoint."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from step3_ppo import algorithm
from utils import whole_files
from utils.distributed.process_group import StopRun


@dataclass
class State:
    """score_mean and score_variance are of the `score_count` scores seen so far (running), or of
    the held-out answers before training (fixed). finished_score: mean, as they came, of the answers
    that ended with the stop token in the last rollout that had any; None before there is one.
    logprobs_from: what --logprobs_from auto was found to be; "" before it is."""

    kl_coef: float
    rollouts: int = 0
    score_mean: float = 0.0
    score_variance: float = 1.0
    score_count: int = 0
    finished_score: float | None = None
    logprobs_from: str = ""

    def see(self, scores: torch.Tensor) -> None:
        """Take (B,) scores into the running mean and variance (Chan et al. 1979)."""
        new, mean = len(scores), scores.double().mean().item()
        variance = scores.double().var(correction=0).item()
        count = self.score_count + new
        apart = mean - self.score_mean
        total = self.score_variance * self.score_count + variance * new
        total += apart**2 * self.score_count * new / count
        self.score_mean += apart * new / count
        self.score_variance, self.score_count = total / count, count

    def fix(self, mean: float, deviation: float) -> None:
        """Normalise by these from now on."""
        if deviation < 1e-6:
            raise StopRun(
                f"score_normalisation=fixed: the held-out answers all score {mean:.4g}, and a "
                "deviation of 0 is nothing to divide by; set --score_normalisation running"
            )
        self.score_mean, self.score_variance = mean, deviation**2

    def normalised(self, scores: torch.Tensor) -> torch.Tensor:
        """(B,) → (B,) with the mean taken off and divided by the standard deviation."""
        return (scores - self.score_mean) / (self.score_variance**0.5 + 1e-8)

    def shape_scores(self, rollout, config) -> tuple[torch.Tensor, dict[str, float]]:
        """A rollout's scores → (B,) normalised, then clipped, then with the penalty of cut answers;
        and the share that was clipped. The statistics are of the scores as they came."""
        if config.score_normalisation == "running":
            self.see(rollout.scores)
        if rollout.finished.any():
            self.finished_score = rollout.scores[rollout.finished].mean().item()
        return self.shaped(rollout, config)

    def shaped(self, rollout, config) -> tuple[torch.Tensor, dict[str, float]]:
        """The same by the statistics as they are."""
        scores, finished, limit = rollout.scores, rollout.finished, config.score_clip or math.inf

        def shape(scores: torch.Tensor) -> torch.Tensor:
            if config.score_normalisation != "none":
                scores = self.normalised(scores)
            return scores.clamp(-limit, limit)

        shaped, metrics = shape(scores), {}
        if config.score_clip > 0:
            metrics["score_clipped"] = (shaped.abs() == limit).float().mean().item()
        # After the clip, which would else give back what an answer at its lower end has to pay.
        if config.missing_eos_penalty > 0:
            known = self.finished_score is not None
            stand_in = shape(torch.tensor(self.finished_score)).item() if known else math.inf
            penalty = config.missing_eos_penalty
            shaped = algorithm.penalise_cut(shaped, finished, penalty, stand_in)
        if config.overlong_penalty > 0:
            sizes = config.max_response_length, config.overlong_buffer
            share = algorithm.overlong(rollout.response_mask.sum(1), *sizes)
            shaped = shaped - config.overlong_penalty * share
            metrics["overlong"] = share.mean().item()
        return shaped, metrics

    def adapt(self, kl: float, sequences: int, config) -> None:
        """Move the KL coefficient towards --kl_target, after a rollout of mean KL `kl`."""
        if config.kl_target > 0:
            self.kl_coef = algorithm.adapted_kl_coef(
                self.kl_coef, kl, config.kl_target, sequences, config.kl_horizon
            )

    def state_dict(self) -> dict:
        return dataclasses.asdict(self)

    def load_state_dict(self, saved: dict) -> None:
        for name, value in saved.items():
            setattr(self, name, value)

    def snapshot(self, copy) -> Callable[[Path], None]:
        """What writes the state as it is now: see utils/checkpoints/model_folder.py."""
        text = json.dumps(self.state_dict(), indent=2)
        return lambda folder: whole_files.write_text(Path(folder, "state.json"), text + "\n")
