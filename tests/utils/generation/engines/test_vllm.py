"""The vLLM engine against a stand-in that speaks its routes; the real one under -m vllm."""

import dataclasses

import pytest
import torch

from tests.helpers.vllm_stand_in import StandIn, untrained
from tests.utils.generation.test_sampling import LENGTHS, NEW, PAD, left_padded
from tests.utils.generation.test_sampling import tiny as model_of
from tests.utils.models.test_adapters import moved as moved_adapters
from utils.distributed.process_group import StopRun
from utils.generation import sampling as generation
from utils.generation import vllm_server
from utils.generation.engine import Request, Sampling, Setup, Untrained, synced
from utils.generation.engines import vllm
from utils.generation.engines.native import NativeEngine
from utils.generation.vllm_client import ServerError
from utils.models import adapters

HOW = dict(vllm_python="python", rollout_url="", rollout_devices="", rollout_memory=0.4)
HOW |= dict(rollout_timeout=60.0, trust_remote_code=False)


@pytest.fixture
def build(monkeypatch, tmp_path):
    """build(*faults of each server that is started) → engine, actor, the stand-ins so far."""
    started, faults = [], []

    class Server:
        def __init__(self, launch, name, token, log):
            self.launch, self.name, self.token = launch, name, token

        def start(self):
            self.stop()
            planned = faults.pop(0) if faults else ()
            started.append(StandIn(untrained(model_of("Llama")), self.name, self.token, planned))
            self.url = started[-1].url

        def stop(self):
            if started:
                started[-1].stop()

    monkeypatch.setattr(vllm_server, "Server", Server)
    monkeypatch.setattr(vllm_server, "python_of", lambda given: given)
    monkeypatch.setattr("utils.generation.vllm_client.SECONDS_BETWEEN_LOOKS", 0.05)

    def made(*planned, **how):
        faults[:] = planned
        actor = Untrained(untrained(model_of("Llama")))
        settings = vllm_server.Settings(**dict(output_dir=str(tmp_path)) | HOW | how)
        return vllm.build(Setup(actor, None, longest=40, vllm=settings)), actor, started

    yield made
    for one in started:
        one.stop()


def request(noise=True) -> Request:
    ids, mask = left_padded(LENGTHS, extra=2)
    drawn = generation.uniform_noise(len(LENGTHS), NEW, seed=1, step=2) if noise else None
    return Request(ids, mask, drawn)


SAMPLING = Sampling(NEW, 5, PAD, temperature=1.3, logprobs=True)


def answer(engine, actor, asked, sampling=SAMPLING):
    with synced(engine, actor) as ready:
        return ready.generate(asked, sampling)


def by_the_model(model, asked, samples):
    """(B,R) log-probabilities of the samples at the temperature, a row at a time, in float64."""
    found = torch.zeros(samples.response_ids.shape, dtype=torch.float64)
    for row, (ids, mask) in enumerate(zip(asked.prompt_ids, asked.prompt_mask, strict=True)):
        answer = samples.response_ids[row][samples.response_mask[row]]
        with torch.no_grad():
            logits = model.double()(torch.cat([ids[mask], answer])[None]).logits[0]
        model.float()
        logs = (logits[mask.sum() - 1 : -1] / SAMPLING.temperature).log_softmax(-1)
        found[row, : len(answer)] = logs.gather(1, answer[:, None]).squeeze(1)
    return found


def test_answers_follow_the_actors_weights(build):
    engine, actor, (server,) = build()
    greedy = NativeEngine()
    for move in (0.0, 0.3):
        with torch.no_grad():
            for p in actor.module.parameters():
                p.add_(move * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
        asked = request(noise=False)
        expected = answer(greedy, actor, asked)
        found = answer(engine, actor, asked)
        assert torch.equal(found.response_ids, expected.response_ids)
        assert found.finish_reasons == expected.finish_reasons and "stop" in found.finish_reasons
        assert found.logprobs is None, "greedy answers have none at the temperature"
        drawn = answer(engine, actor, request())
        known = by_the_model(actor.module, request(), drawn)
        torch.testing.assert_close(drawn.logprobs.double(), known, rtol=0, atol=2e-5)
        assert torch.equal(drawn.logprobs != 0, drawn.response_mask)
    assert len(server.asked) and not any("sleep" in path for path in server.asked)
    order = [path for path in server.asked if "generate" not in path and path != "/metrics"]
    once = ["/pause?mode=wait", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert order == ["/init_weight_transfer_engine", *4 * [*once, "/collective_rpc", "/resume"]]


def test_adapters_are_merged_on_their_way(build):
    """The server's model has none. The actor keeps its own beside the base."""
    engine, _, (server,) = build()
    module = untrained(model_of("Llama"))
    adapters.put_on(module, "", adapters.Lora(4, lora_variant="dora"))
    actor, asked, answers = Untrained(module), request(noise=False), []
    for seed in (1, 2):
        moved_adapters(module, seed)
        before = {name: p.clone() for name, p in module.named_parameters()}
        answers.append(answer(engine, actor, asked).response_ids)
        expected = answer(NativeEngine(), actor, asked)
        assert torch.equal(answers[-1], expected.response_ids)
        drawn = answer(engine, actor, request())
        known = by_the_model(module, request(), drawn)
        torch.testing.assert_close(drawn.logprobs.double(), known, rtol=0, atol=2e-5)
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert not torch.equal(*answers), "the adapters say nothing"


def test_on_the_trainers_gpus_it_sleeps_and_finds_room_when_it_wakes(build, monkeypatch, capsys):
    engine, actor, servers = build()
    engine.sleeps = True
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: servers[-1].asked.append("room"))
    told = ("room", "/wake_up?tags=weights", "/resume", "/wake_up?tags=kv_cache", "/sleep?level=2")
    for due in (("/resume", "/sleep?level=2"), told):
        servers[-1].asked.clear()
        answer(engine, actor, request())
        engine.release()  # asleep already
        assert tuple(path for path in servers[-1].asked if path in told) == due
    servers[-1].faults |= {"awake", "die"}
    answer(engine, actor, request())
    # For waking, for waking again, and for the new one; late requests may come after it.
    assert len(servers) == 2 and servers[0].asked.count("room") == 3, "a new one needs room too"
    assert "keeps its memory while the training goes on" not in capsys.readouterr().out
    servers[-1].faults |= {"awake"}
    answer(engine, actor, request())
    assert "keeps its memory while the training goes on" in capsys.readouterr().out
    assert not engine.asleep


def test_seeds_are_of_the_rows(build):
    engine, actor, _ = build()
    asked = request()
    first, again = (answer(engine, actor, asked).response_ids for _ in range(2))
    assert torch.equal(first, again)
    turned = Request(asked.prompt_ids.flip(0), asked.prompt_mask.flip(0), asked.noise.flip(0))
    assert torch.equal(answer(engine, actor, turned).response_ids.flip(0), first)
    other = dataclasses.replace(asked, noise=asked.noise.flip(0))
    assert not torch.equal(answer(engine, actor, other).response_ids, first)
    seeds = {vllm.seed_of(row) for row in generation.uniform_noise(500, 3, 1, 1)}
    assert len(seeds) == 500 and all(0 <= seed < 2**63 for seed in seeds)


CAUSES = {
    "die": "is gone",
    "hang": "stands still",
    "other": "for another model: 'else'",
    "stale": "stale: it answered with weights",
    "lost": "did not arrive at vLLM's worker 0",
    "cut": "broke an answer off",
}


@pytest.mark.parametrize("fault", CAUSES)
def test_a_server_that_fails_is_named_and_started_again(build, fault, capsys):
    engine, actor, servers = build((fault,))
    if fault == "hang":
        engine.client.patience = 0.3  # of the first server alone: the machine may be busy
    expected = answer(NativeEngine(), actor, request(noise=False)).response_ids
    assert torch.equal(answer(engine, actor, request(noise=False)).response_ids, expected)
    said = capsys.readouterr().out
    assert len(servers) == 2 and CAUSES[fault] in said and "started again" in said, said


@pytest.mark.parametrize("fault", ["die", "stale"])
def test_a_server_that_fails_again_ends_the_run(build, fault):
    engine, actor, servers = build((fault, "always"), (fault, "always"))
    with pytest.raises(StopRun) as stopped:
        answer(engine, actor, request())
    assert CAUSES[fault] in str(stopped.value) and "started again" in str(stopped.value)
    assert len(servers) == 2


def moved(actor, steps: int) -> None:
    """The actor's weights change, as by `steps` optimizer steps more."""
    with torch.no_grad():
        for p in actor.module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(steps)))
    actor.module.global_steps = getattr(actor.module, "global_steps", 0) + steps


@pytest.mark.parametrize("faults", [(), ("die",)])
def test_a_rollout_ahead_is_by_the_weights_of_before(build, faults, capsys):
    engine, actor, servers = build()
    moved(actor, 3)
    asked, other = request(), dataclasses.replace(request(), noise=request().noise.flip(0))
    before = answer(engine, actor, asked)
    servers[-1].faults |= set(faults)
    engine.begin(asked, SAMPLING)
    moved(actor, 2)
    fresh = answer(engine, actor, other)  # an evaluation in between
    assert engine.policy_step == 5
    known = by_the_model(actor.module, other, fresh)
    torch.testing.assert_close(fresh.logprobs.double(), known, rtol=0, atol=2e-5)
    found = answer(engine, actor, asked)
    again = answer(engine, actor, asked)
    assert not torch.equal(again.logprobs, before.logprobs) and engine.policy_step == 5
    expected = again if faults else before
    assert torch.equal(found.response_ids, expected.response_ids)
    assert torch.equal(found.logprobs, expected.logprobs)
    assert len(servers) == 1 + len(faults), capsys.readouterr().out
    engine.begin(asked, SAMPLING)
    moved(actor, 1)
    answer(engine, actor, asked)
    assert engine.policy_step == 5, "the step of those who answered, and not of now"


def test_one_started_by_hand_is_not_started_again(build, monkeypatch):
    server = StandIn(untrained(model_of("Llama")), faults=("stale",))
    monkeypatch.setenv("ROLLOUT_TOKEN", "secret")
    engine, actor, servers = build(rollout_url=server.url)
    assert not servers and "started by hand" in engine.description
    with pytest.raises(StopRun, match="(?s)stale.*by hand: start it again.*--resume auto"):
        answer(engine, actor, request())
    server.stop()
    with pytest.raises(StopRun, match="is gone"):
        build(rollout_url=server.url)
    monkeypatch.setenv("ROLLOUT_TOKEN", "guessed")
    other = StandIn(untrained(model_of("Llama")), name="something else")
    with pytest.raises(StopRun, match="HTTP 401"):
        build(rollout_url=other.url)
    monkeypatch.setenv("ROLLOUT_TOKEN", "secret")
    with pytest.raises(StopRun, match="another model: .'something else'."):
        build(rollout_url=other.url)
    other.stop()


def test_what_is_no_number_stays_none():
    said = {"token_ids": [7, 5], "logprobs": {"content": [{"logprob": -1.5}, {"logprob": -9999.0}]}}
    samples = vllm.samples_from([{"choices": [said]}], request(), SAMPLING)
    assert samples.logprobs[0, 0] == -1.5 and samples.logprobs[0, 1].isnan()
    assert samples.response_ids.tolist() == [[7, 5]] and samples.finish_reasons == ["stop"]


def test_an_answer_of_mixed_weights_is_refused():
    spans = [{"version": "3.8", "start": 0, "end": 1}, {"version": "4.9", "start": 1, "end": 2}]
    choice = {"token_ids": [7, 5], "weight_versions": spans, "finish_reason": "stop"}
    choice["logprobs"] = {"content": [{}, {}]}
    with pytest.raises(ServerError, match="stale"):
        params = {"max_tokens": NEW, "stop_token_ids": [5]}
        vllm.check({"model": "m", "choices": [choice]}, "m", "4.9", params)


def test_a_sequence_longer_than_the_servers_names_its_flag():
    choice = {"token_ids": [7, 7], "weight_versions": [{"version": "4.9"}]}
    choice |= {"logprobs": {"content": [{}, {}]}, "finish_reason": "length"}
    params = {"max_tokens": NEW, "stop_token_ids": [5]}
    with pytest.raises(ServerError, match="after 2 tokens .length.; .* larger --max_length"):
        vllm.check({"model": "m", "choices": [choice]}, "m", "4.9", params)
    vllm.check({"model": "m", "choices": [choice]}, "m", "4.9", params | {"max_tokens": 2})


def test_a_row_is_asked_for_no_more_than_fits_behind_it(build):
    engine, actor, servers = build()
    (server,) = servers
    whole = answer(engine, actor, request())
    engine.longest = server.longest = max(LENGTHS) + 1
    assert min(LENGTHS) + NEW > engine.longest, "else no row is cut"
    found = answer(engine, actor, request())
    for row, length in enumerate(LENGTHS):
        room = engine.longest - length
        for name in ("response_ids", "logprobs"):
            one, other = (getattr(x, name)[row, :room] for x in (found, whole))
            torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    engine.longest = server.longest = max(LENGTHS)  # the longest row has no room at all
    found = answer(engine, actor, request())
    row = LENGTHS.index(min(LENGTHS))
    room = engine.longest - min(LENGTHS)
    assert torch.equal(found.response_ids[row, :room], whole.response_ids[row, :room])
    assert len(servers) == 1, "an answer was refused and the server started again"


def test_the_model_is_found_from_any_folder(build, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    engine, *_ = build(output_dir="out")
    assert engine.server.launch.model == str(tmp_path / "out/vllm")


def test_workers_share_the_cache_as_they_share_the_heads(build):
    """On a CPU; of two heads one each, and of four workers two have the same."""
    shares = {
        cores: build(rollout_devices=cores)[0].server.launch.cache_bytes
        for cores in ("", "0", "0,1", "0-1,2,3,4")
    }
    assert shares[""] == shares["0"] == 2 * shares["0,1"] == 2 * shares["0-1,2,3,4"] > 0
    engine, *_ = build(rollout_devices="0,1")
    assert "on cores 0,1, log" in engine.description
