"""EMA, saved weights and the generator under every ZeRO stage (see distributed_checks.py)."""

import pytest

from tests.helpers.running import run_ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_average_weights_and_generator_under_every_stage(tiny, ranks):
    jobs = [("tests/helpers/distributed_checks.py", [tiny / "base_model"])]
    settings = ["no_waiting", "overlapped", "moments"] if ranks == 1 else []
    output = run_ranks([*jobs, ("tests/helpers/engine_settings_checks.py", settings)], ranks)
    assert output.count("held: stage") == 8 * ranks, output
    for held in settings:
        assert f"held: {held.replace('_', ' ')}" in output, output


def test_a_rank_ends_before_python_takes_itself_down(tmp_path):
    """gloo's threads may let go of a tensor then, which aborts the process. Here that is planted:
    what runs at interpreter exit aborts on every rank."""
    program = tmp_path / "aborts_at_exit.py"
    program.write_text("import atexit, os\ndef main():\n    atexit.register(os.abort)\n")
    assert "Traceback" not in run_ranks([(str(program), [])], 2)
