"""What people read of a run: held-out answers before and after training (`samples.json`), and a few
answers of the newest rollout token by token (`tokens.json`). The page of a run shows both."""

import json
from pathlib import Path

from step3_ppo.experience import Experience
from utils import whole_files
from utils.data.prompts import Prompt
from utils.distributed import process_group

ANSWERS = 16  # held-out prompts whose answers are kept
ROLLOUTS = 6  # answers of a rollout kept token by token
TOKENS = 400  # of each, the first ones


def held_out(prompts: list[Prompt], texts: list[str], rollout, verdicts: list[float]) -> list[dict]:
    """The answers to the first prompts. verdicts: of the embedded task's program, or none."""
    rows = []
    for i, prompt in enumerate(prompts[:ANSWERS]):
        row = {"prompt": [*prompt.messages, *rollout.earlier[i]], "answer": texts[i]}
        row |= {"score": rollout.scores[i].item(), "finished": rollout.finished[i].item()}
        row |= {"verifier": verdicts[i]} if verdicts else {}
        rows.append(row | {"tokens": int(rollout.action_mask[i].sum())})
    return rows


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """Each token's part of the text, special tokens too. Of tokens that only together make one
    character the last one has it, the others nothing."""
    found: list[str] = []
    # Decoding begins with the piece before: some tokenizers drop a space at the beginning.
    context, begin = 0, 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[context:end])
        if text.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(text[len(tokenizer.decode(ids[context:begin])) :])
        context, begin = begin, end
    return found


def spread(order: list[int]) -> list[int]:
    """ROLLOUTS of a list, the first and the last among them, at even distances."""
    count = min(ROLLOUTS, len(order))
    return [order[round(k * (len(order) - 1) / max(count - 1, 1))] for k in range(count)]


def token_by_token(tokenizer, experience: Experience, prompts: list[Prompt]) -> list[dict]:
    """Answers of a rollout, from the lowest score to the highest at even distances, with each
    token's reward, value, advantage (as the loss has it) and log p − log q to the reference.

    Numbers are None at tokens that the policy did not choose. Where an action is a whole answer,
    its numbers stand at each of its tokens.
    """
    rollout = experience.rollout
    chosen = spread(rollout.scores.argsort(stable=True).tolist())
    numbers = {
        "reward": experience.rewards,
        "value": experience.values,
        "advantage": experience.advantages,
        "kl": rollout.logprobs - rollout.ref_logprobs,
    }
    if not experience.values.any():
        del numbers["value"]  # there is no critic
    rows = []
    for i in chosen:
        ids = rollout.response_ids[i][rollout.response_mask[i]].tolist()
        row = {"prompt": list(prompts[i].messages), "score": rollout.scores[i].item()}
        row |= {"finished": rollout.finished[i].item(), "length": len(ids)}
        row["pieces"] = pieces(tokenizer, ids[:TOKENS])
        actions = rollout.action_mask[i].tolist()[: len(row["pieces"])]
        for name, x in numbers.items():
            values = x[i].expand(len(rollout.action_mask[i])).tolist()
            row[name] = [round(v, 5) if a else None for v, a in zip(values, actions, strict=False)]
        rows.append(row)
    return rows


def write_answers(output_dir: str, facts: dict) -> None:
    """facts: with `held_out` of each evaluation as "answers_before" and "answers_after"."""
    moments = [m for m in ("before", "after") if f"answers_{m}" in facts]
    write(output_dir, "samples.json", {m: facts[f"answers_{m}"] for m in moments})


def write_tokens(tokenizer, experience: Experience, prompts, config, step: int) -> None:
    if process_group.is_main():
        rows = token_by_token(tokenizer, experience, prompts)
        whole = {"step": step, "action_level": config.action_level, "rows": rows}
        write(config.output_dir, "tokens.json", whole)


def write(output_dir: str, name: str, content: dict) -> None:
    if process_group.is_main():
        text = json.dumps(content, ensure_ascii=False)
        whole_files.write_text(Path(output_dir) / name, text + "\n")
