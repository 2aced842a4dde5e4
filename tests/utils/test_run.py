"""What every step does around its loop."""

import json

import pytest

from step1_sft.config import SFTConfig
from utils.distributed.process_group import StopRun
from utils.run import BadSteps, output_of


def test_a_run_that_only_skips_steps_saves_and_ends():
    said, saved = [], []
    bad = BadSteps(2, said.append, lambda: saved.append(bad.total))
    for skipped in (True, True, False, True, True):
        bad.note(skipped)
    assert (bad.total, bad.in_a_row, saved) == (4, 2, [])
    with pytest.raises(StopRun, match="3 optimizer steps in a row.*--max_bad_steps 2.*a reason"):
        bad.note(True, "a reason")
    assert saved == [5] and said[-1].endswith("for a reason (3 in a row, 5 in all)")


def test_the_counter_of_a_resumed_run_goes_on():
    bad = BadSteps(1, print, lambda: None)
    bad.note(True)
    again = BadSteps(1, print, lambda: None)
    again.load_state_dict(json.loads(json.dumps(bad.state_dict())))
    with pytest.raises(StopRun):
        again.note(True)


def test_an_output_folder_is_asked_about_with_all_settings():
    output = output_of(SFTConfig(output_dir="o", resume="auto", learning_rate=2e-5))
    assert (output.output_dir, output.resume, output.overwrite) == ("o", "auto", False)
    assert output.settings["learning_rate"] == 2e-5
    assert output.on_resume["log_every"] == "free" and output.on_resume["zero_stage"] == "rounding"
