"""What a reward model says of the answers of a side-by-side evaluation."""

import torch

from utils.distributed import zero
from utils.models import scalar_model, scorer
from utils.models.loading import Loading
from utils.models.scorer import Reader


def score_all(config, answers) -> list[str]:
    """Set every prompt_eval.Answer's score as PPO would: the reward model's, bias taken off, on the
    whole conversation. Returns why those that its template refuses have none."""
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
    for answer, (score,) in zip(chosen, scores, strict=True):
        answer.score = score
    return refused
