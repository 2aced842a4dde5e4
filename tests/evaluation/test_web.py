"""Pages are served to this machine only, unless asked otherwise, which is then said."""

import sys
from types import SimpleNamespace

import pytest

from evaluation import web
from utils.errors import UserError


@pytest.mark.parametrize(
    "host, local",
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.9.0.1", True)]
    + [("0.0.0.0", False), ("::", False), ("192.168.1.4", False), ("example.org", False)],
)
def test_which_addresses_are_this_machine_only(host, local):
    assert web.is_local(host) is local


class Page:
    def __init__(self):
        self.asked = {}

    def queue(self):
        return self

    def launch(self, **asked):
        self.asked = asked
        if asked["server_port"] == 1:
            raise OSError("Cannot find empty port")
        return None, "http://here/", None

    def block_thread(self):
        pass


def test_an_open_page_says_so_and_a_local_one_does_not(capsys):
    page = Page()
    web.serve(page, web.WebSettings())
    assert page.asked["server_name"] == "127.0.0.1" and page.asked["share"] is False
    assert capsys.readouterr().out == "serving on http://here/ (Ctrl-C ends)\n"
    web.serve(page, web.WebSettings(host="0.0.0.0", port=0))
    assert page.asked["server_name"] == "0.0.0.0" and page.asked["server_port"] is None
    assert "open to the network" in capsys.readouterr().out
    with pytest.raises(UserError, match="port 1 of 127.0.0.1: Cannot find .* set --port"):
        web.serve(page, web.WebSettings(port=1))


def test_without_gradio_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="pip install -r requirements-eval.txt"):
        web.library()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert list(web.WebSettings().of_web(True)) == [web.MISSING]
    assert list(web.WebSettings().of_web(False)) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    assert list(web.WebSettings().of_web(True)) == []
