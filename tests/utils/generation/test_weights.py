"""The weights of rollouts of an actor that trains under ZeRO: modes, memory, collectives."""

from tests.helpers.running import run_ranks

WORKER = "tests/helpers/generation_checks.py"


def test_modes_and_the_choice_of_gather(tiny):
    output = run_ranks([(WORKER, [tiny / "base_model", "modes", "choice_of_gather"])], 1)
    assert "held: modes" in output and "held: choice of gather" in output, output


def test_ranks_that_stop_far_apart_finish_and_gather_once(tiny):
    checks = ["uneven_rollouts", "merged_adapters"]
    output = run_ranks([(WORKER, [tiny / "base_model", *checks])], 2)
    assert output.count("held: uneven rollouts") == 2, output
    assert output.count("held: merged adapters") == 2, output
