"""ILQL's losses of tokens: torch only.

A token is an action, what stands before it the state, and the answer's reward comes with its last
token. Q learns rewards and the value of what follows, V the upper part of Q over the answers in the
data (an expectile), so that nothing is sampled; a term keeps Q of other tokens low (CQL), and the
language model learns the answers, where asked for the better actions above all (AWAC).

Source: Snell et al. 2022, "Offline RL for Natural Language Generation with Implicit Language Q
Learning"; the weights of the terms, and AWAC's, as in trlX.
"""

from collections.abc import Sequence

import torch

# Of each token, to be summed: four losses as they enter the whole, the targets' least Q, and V.
TERMS = ("q_loss", "v_loss", "cql_loss", "lm_loss", "q", "v")
LOSSES = len([name for name in TERMS if name.endswith("_loss")])


def rewards_of(labels: Sequence[float]) -> list[float]:
    """Of the answers to one prompt: from −1 for the worst to 1 for the best, between them as their
    labels are; of an answer that is judged by itself 1 or −1."""
    low, high = (min(labels), max(labels)) if len(labels) > 1 else (0.0, 1.0)
    return [2 * (label - low) / (high - low) - 1 for label in labels]


def token_losses(numbers: torch.Tensor, rewards: torch.Tensor, goes_on: torch.Tensor, how):
    """(N,7) numbers of N tokens, answer after answer, as PerturbedHead gives them → (N,6) TERMS.

    rewards (N,), 0 but at last tokens. goes_on (N,) bool: does a token of the same answer follow?
    how: gamma, tau, cql_coef, awac_coef, awac_beta.
    """
    logprob, q1, log_softmax_q1, q2, log_softmax_q2, target, v = numbers.unbind(-1)
    following = torch.cat([v[1:], v.new_zeros(1)]).detach() * goes_on
    aim = rewards + how.gamma * following
    above = target.detach() - v
    weight = (how.tau - (above < 0).to(above.dtype)).abs()
    awac = (how.awac_beta * above.detach()).exp()
    terms = (
        (q1 - aim).square() + (q2 - aim).square(),
        weight * above.square(),
        -how.cql_coef * (log_softmax_q1 + log_softmax_q2),
        -how.awac_coef * awac * logprob,
        target.detach(),
        v.detach(),
    )
    return torch.stack(terms, -1)
