"""What every program of families_table.py imports: read once, and shared by the processes forked
from there."""

import deepspeed  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401

import step1_sft.main  # noqa: F401
import step2_reward.main  # noqa: F401
import step3_ppo.main  # noqa: F401
