"""A served reward model gives the scores that the model in the run gives."""

import json
import threading
import urllib.error
import urllib.request

import pytest
import torch

from tests.helpers.jobs import ppo
from tests.helpers.running import metrics_of, run_ranks
from utils.models import serve_reward
from utils.models.serve_reward import ServeConfig, scorer_of, server_of
from utils.rewards import remote
from utils.rewards.functions import FunctionError
from utils.rewards.remote import Server
from utils.rewards.sums import Answers


@pytest.fixture
def served(chain, monkeypatch):
    """(scorer, start): start(token) gives an address at which the scorer answers."""
    # Read behind the stop token: a model in the run is then given text too, as a server always is.
    small = dict(port=0, micro_batch_size=2, dtype="fp32", reward_read_at="end")
    config = ServeConfig(model=str(chain / "reward"), **small)
    scorer, servers = scorer_of(config), []

    def start(token=""):
        monkeypatch.setenv(remote.TOKEN, token)
        servers.append(server_of(scorer, config))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/"

    yield scorer, start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_scores_over_http_are_the_scorers(served):
    scorer, start = served
    talks = [("one?", "1"), ("Count to nine, please.", "1 2 3 4 5 6 7 8 9"), ("?", ""), ("x", "äß")]
    messages = [({"role": "user", "content": prompt},) for prompt, _ in talks]
    finished = [True, False, True, False]
    found = Server(start(), 30.0)(Answers(messages, [a for _, a in talks], [{}] * 4, finished))
    alone = []
    for turns, (_, answer), done in zip(messages, talks, finished, strict=True):
        ids = torch.tensor([scorer.reader.encode(turns, answer, done)])
        alone.append(scorer.model(ids, torch.ones_like(ids).bool())[0, -1].item())
    assert found == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 4) for score in found}) == 4  # whose score is whose can be seen


@pytest.mark.parametrize(
    "body, said",
    [
        ("{", "Expecting property name"),
        ("[]", "not a JSON object"),
        ('{"messages": [[]], "responses": ["a"]}', "each with role and content"),
        ('{"messages": [], "responses": ["a"]}', "of one length"),
        ('{"messages": []}', "of one length"),
        ('{"messages": [], "responses": 1}', "of one length"),
        ('{"messages": [[{"role": "user", "content": 1}]], "responses": ["a"]}', "with role and"),
        ('{"messages": [[{"role": "user", "content": "p"}]], "responses": [1]}', "is no text"),
        ('{"messages": [[]], "responses": ["a"], "finished": [1]}', "neither true nor false"),
    ],
)
def test_requests_that_cannot_be_answered_are_told(served, body, said):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(served[1](), body.encode())
    assert caught.value.code == 400 and said in json.loads(caught.value.read())["error"]


def test_a_token_keeps_others_out(served, monkeypatch):
    url = served[1]("right")
    one = Answers([({"role": "user", "content": "p"},)], ["a"], [{}], [True])
    assert len(Server(url, 5.0)(one)) == 1
    monkeypatch.setenv(remote.TOKEN, "wrong")
    long = Answers(one.messages, ["a" * (16 << 20)], [{}], [True])  # more than sockets hold
    for asked in (one, long):
        with pytest.raises(FunctionError, match="refused: HTTP 401"):
            Server(url, 5.0)(asked)


def test_it_is_this_machines_only_unless_asked():
    assert ServeConfig().host in serve_reward.LOCAL


def test_a_run_by_a_served_model_is_the_run_by_the_model(served, tiny, chain, tmp_path):
    url = served[1]()
    end = ("--reward_read_at", "end")
    few = ("--max_steps", 2, "--self_check", "off")
    by_url = ("--reward_model", "", "--reward_url", url, "--critic_model", chain / "reward")
    run_ranks(
        [
            ppo(tiny, chain / "sft", chain / "reward", tmp_path / "model", *few, *end),
            ppo(tiny, chain / "sft", "", tmp_path / "url", *few, *by_url),
        ],
        2,
    )
    for name in ("score", "kl", "eval/score"):
        expected = metrics_of(tmp_path / "model", name)
        assert len(expected) >= 2
        assert metrics_of(tmp_path / "url", name) == pytest.approx(expected, rel=1e-4, abs=1e-5)
