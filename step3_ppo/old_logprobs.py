"""Who says the log-probabilities that an update starts from: the decode loop, or another pass.

The decode loop knows them already, but by other shapes and kernels than the pass that the update
takes. Where both agree, the pass over the rollout is saved; where they do not, as in bf16, a ratio
of 1 would start from noise.
"""

from collections.abc import Callable

from utils.distributed import process_group

TOLERANCE = 1e-4  # nats, of any one token: rounding in fp32 makes 1e-6 to 1e-5


class OldLogprobs:
    """choice: --logprobs_from. source: "decode" or "forward"; None: to be seen, by `compare`.
    say: prints for people."""

    def __init__(self, choice: str, say: Callable[[str], None] = print):
        self.source = None if choice == "auto" else choice
        self.say = say

    def state_dict(self) -> dict:
        return {"source": self.source}

    def load_state_dict(self, saved: dict) -> None:
        self.source = saved["source"]  # what was seen on the first batch counts to the end

    def compare(self, decoded, scored) -> None:
        """Choose, for all ranks. decoded, scored: log-probabilities and entropies, (B,R) each and
        0 off the mask; None where the engine does not tell them."""
        if any(x is None for x in decoded):
            self.source = "forward"
            self.say("old log-probabilities from the forward: the engine that samples tells none")
            return
        gaps = [float((a - b).abs().max()) for a, b in zip(decoded, scored, strict=True)]
        every = process_group.gather_objects(gaps)
        # Not `max`, which may pass over a NaN.
        agree = all(gap <= TOLERANCE for gaps in every for gap in gaps)
        self.source = "decode" if agree else "forward"
        logprobs, entropies = (max(gaps) for gaps in zip(*every, strict=True))
        self.say(
            f"old log-probabilities from the {self.source}: decode loop and scoring pass differ by "
            f"up to {logprobs:.1e} nats a token, entropies by {entropies:.1e} (allowed "
            f"{TOLERANCE:.0e})"
        )
