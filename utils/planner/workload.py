"""What a run computes, in the values that its memory and time depend on.

Each step's config describes its run as a Workload (`config.workload()`), so that the planner knows
no step. Nothing heavy is imported here: configs import it.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Role:
    """One model of a step. path: the folder or hub name of its config.json."""

    name: str
    path: str
    scalar: bool = False  # reward model or critic, with a head of one number
    trained: bool = False
    held_out_only: bool = False  # goes forward at evaluations alone
    stage_setting: str = "zero_stage"  # which setting is its ZeRO stage; -1 there: as zero_stage
    on_first: bool = False  # does it stand on the weights of the first model, as adapters and head?


@dataclass(frozen=True)
class Workload:
    """Fields with the names of settings mean what those mean. An iteration is an optimizer step, or
    a rollout with all its optimizer steps; the model that samples is the first of `roles`."""

    roles: tuple[Role, ...]
    length: int  # tokens of a row, at most
    predicted: int  # of them that the loss or the reward reads; in a rollout those sampled
    global_batch_size: int
    micro_batch_size: int
    micro_batch_tokens: int
    gradient_checkpointing: bool
    checkpoint_layers: int
    freeze: Sequence[str]  # this and the next of the first of `roles` alone
    freeze_bottom_layers: int
    lora_rank: int
    lora_alpha: float
    lora_target_modules: Sequence[str]
    lora_variant: str
    load_in_4bit: bool
    load_in_8bit: bool
    optimizer: str
    zero_stage: int
    offload: str
    trust_remote_code: bool
    trainable_modules: Sequence[str] = ()
    rows_a_sample: int = 1  # of a comparison its answers
    rollout_rows: int = 0  # of all ranks; 0: the run samples nothing
    generation_tokens: int = 0
    several_turns: bool = False  # are answers replied to and gone on with?
    earlier_policy: bool = False  # does a whole copy say what may be drawn (NLPO)?
    release_decode_memory: bool = False
    rollout_gather: str = "auto"
    rollout_engine: str = "auto"
    rollout_url: str = ""
    rollout_devices: str = ""
    rollout_memory: float = 0.0
    offload_frozen: bool = False
    ppo_epochs: int = 1
    ema_decay: float = 0.0
    value_heads: bool = False  # are ILQL's trained with the first of `roles`?
    critic_zero_stage: int = -1
    reference_zero_stage: int = -1

    def stage(self, role: Role) -> int:
        own = getattr(self, role.stage_setting)
        if own >= 0:
            return own
        return self.zero_stage if role.trained or self.zero_stage == 3 else 0

    def starts_vllm(self) -> bool:
        """Does a server of this run's own sample?"""
        return self.rollout_engine == "vllm" and not self.rollout_url

    def micro_batch_rows(self) -> int:
        """Rows of a micro-batch, all of full length."""
        if self.micro_batch_tokens:
            return max(1, self.micro_batch_tokens // self.length)
        return self.micro_batch_size * self.rows_a_sample

    def rows(self, ranks: int) -> int:
        """Rows of an iteration on one rank."""
        samples = self.rollout_rows or self.global_batch_size
        return -(-samples * self.rows_a_sample // ranks)

    def decoded_length(self) -> int:
        """Tokens of a row that is decoded, at most. A row that has used up its room is read on
        beside one that has all of it."""
        return self.length + self.several_turns * self.predicted

    def rows_decoded(self, ranks: int) -> int:
        """Sequences that one rank decodes at once."""
        longest, tokens = self.decoded_length(), self.generation_tokens
        fitting = max(1, tokens // longest) if tokens else None
        return min(self.rows(ranks), fitting or self.rows(ranks))

    def micro_batch_sizes(self, ranks: int) -> list[int]:
        """Each that divides a rank's share of the global batch, the largest first."""
        share = self.global_batch_size // ranks
        return [n for n in range(share, 0, -1) if share % n == 0]
