"""What is kept of sampled answers: rows for people, for step 2 or for step 1."""

from typing import NamedTuple

from utils.data import rows


class Sampled(NamedTuple):
    text: str
    finished: bool  # ended with the stop token, not cut at --max_response_length
    ids: tuple[int, ...] = ()  # through the stop token


def rows_of(config, prompts, answers: list[list[Sampled]]) -> list[dict]:
    """All answers to each prompt, which nobody has ranked, with their provenance."""
    names = ("policy", "labeller", "seed", "temperature", "agreement")
    provenance = {name: getattr(config, name) for name in names}
    return [
        {
            "prompt": list(prompt.messages),
            "responses": [a.text for a in group],
            "finished": [a.finished for a in group],
            "provenance": provenance | {"prompt": prompt.where},
        }
        for prompt, group in zip(prompts, answers, strict=True)
    ]


def _is_usable(text: str) -> bool:
    # A tiny policy samples control bytes now and then, which no data file should hold.
    return bool(text.strip()) and not rows.text_problem(text)


def comparison(row: dict, scores: list[float] | None) -> dict | None:
    """A row with its scores, answers that say the same once; None where nothing is to be compared.

    scores: None where people shall rank.
    """
    kept = list({text: k for k, text in enumerate(row["responses"]) if _is_usable(text)}.values())
    columns = {name: row[name] for name in ("responses", "finished")}
    columns |= {} if scores is None else {"scores": scores}
    columns = {name: [values[k] for k in kept] for name, values in columns.items()}
    if len(kept) < 2 or len(set(columns.get("scores", kept))) < 2:
        return None
    return row | columns


def demonstration(row: dict, scores: list[float]) -> dict | None:
    """The best answer that ended by itself: one that was cut would teach to stop where it was cut.
    None where there is no such answer."""
    answers = zip(scores, row["responses"], row["finished"], strict=True)
    whole = [(score, text) for score, text, done in answers if done and _is_usable(text)]
    if not whole:
        return None
    score, text = max(whole, key=lambda answer: answer[0])
    kept = {name: row[name] for name in ("prompt", "provenance")}
    return kept | {"completion": text, "score": score}


# --keep → what becomes of a prompt's answers, what these are, and why some prompts have none.
KEEP = {
    "ranking": (comparison, "comparisons", "whose answers were all alike or equally good"),
    "best": (demonstration, "demonstrations", "whose answers were all empty or cut at the limit"),
}
