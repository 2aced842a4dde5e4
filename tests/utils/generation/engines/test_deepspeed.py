"""DeepSpeed's rollout class behind our protocol: the same greedy answers, draws by the noise."""

from tests.helpers.running import run_ranks


def test_engines_by_their_flag_give_the_same_greedy_answers(tiny):
    worker = "tests/helpers/generation_checks.py"
    output = run_ranks([(worker, [tiny / "base_model", "choice_of_engine"])], 1)
    assert output.count("choice held") == 2 and "held: settings" in output, output
