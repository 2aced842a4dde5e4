"""How a program ends on its errors."""

import pytest

from utils.data.rows import DataError
from utils.distributed import program


@pytest.mark.parametrize("error", [DataError("f.jsonl:3: bad"), SystemExit("no such folder")])
def test_what_a_user_can_mend_ends_as_a_message(error, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(program.os, "_exit", codes.append)

    def main():
        raise error

    program.run(main)
    assert codes == [1] and capsys.readouterr().err == f"error: {error}\n"


def test_bugs_keep_their_traceback_and_exit_codes_are_kept():
    def bug():
        raise ZeroDivisionError

    def refused():
        raise SystemExit(2)

    with pytest.raises(ZeroDivisionError):
        program.run(bug)
    with pytest.raises(SystemExit) as caught:
        program.run(refused)
    assert caught.value.code == 2
