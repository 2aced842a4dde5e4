"""Episodes of several turns against each row alone, token by token, without cache or batch."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from step3_ppo import rollout as rollouts
from step3_ppo import update
from step3_ppo.environments import play as playing
from step3_ppo.environments.environment import Environment
from step3_ppo.episodes import lay_out, numbers_of
from step3_ppo.experience import make_experience
from step3_ppo.state import State
from tests.helpers.chat_templates import byte_level
from tests.helpers.small_models import Engine, config_of
from utils.data import chat_template
from utils.data.prompts import Prompt
from utils.distributed.process_group import StopRun
from utils.generation.engine import Sampling, synced
from utils.generation.engines.native import NativeEngine
from utils.generation.sampling import uniform_noise
from utils.rewards.sums import WeightedSum

LIMIT, TURNS, TEMPERATURE = 70, 3, 1.3
QUESTIONS = ["one", "two and three", "a", "four five six seven", "8", "nine, ten", "", "eleven"]
QUESTIONS += ["twelve", "13", "fourteen or fifteen", "sixteen", "seventeen", "18", "19"]


def says(conversations, rows):
    """Ends half of the turns; one row's replies are too long to fit after a few turns."""
    replies = []
    for conversation, row in zip(conversations, rows, strict=True):
        said = conversation[-1]["content"]
        done = (len(said) + row["n"]) % 3 == 0
        replies.append(None if done else f"{row['n']}:{len(said)}" + "!" * (row["n"] == 4) * 40)
    return replies


@pytest.fixture(scope="module")
def tokenizer():
    found = byte_level()
    chat_template.set_up(found)
    return found


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights that end a turn after some five tokens."""
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=None, **sizes))
    model.lm_head = nn.Linear(32, len(tokenizer))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3 if weight.dim() > 1 else weight)
        model.lm_head.bias.zero_()
        model.lm_head.bias[tokenizer.eos_token_id] = 5.0
        model.lm_head.bias[tokenizer.pad_token_id] = -torch.inf
    return model.eval()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    asked = [({"role": "user", "content": text},) for text in QUESTIONS]
    ids = [chat_template.encode_prompt(tokenizer, turns) for turns in asked]
    rows = zip(asked, ids, strict=True)
    return [Prompt(turns, "", {"n": n}, own) for n, (turns, own) in enumerate(rows)]


class Counted(NativeEngine):
    """Notes how many rows and tokens it is asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def generate(self, request, sampling):
        self.asked.append((len(request.prompt_ids), sampling.max_new_tokens))
        return super().generate(request, sampling)


def played(model, tokenizer, prompts, noise, function=says, turns=TURNS):
    """(episodes, the engine)"""
    environment = Environment(function, "own.py:says", tokenizer, "tool", turns, 60.0)
    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    sampling = Sampling(noise.shape[1], stop, pad, TEMPERATURE, logprobs=True)
    with synced(Counted(), Engine(model)) as engine:
        return playing.play(engine, prompts, noise, sampling, environment), engine


@torch.no_grad()
def alone(model, tokenizer, prompt, noise):
    """By the definition: (ids behind the prompt, which are actions, log-probabilities, finished)"""
    ids, actions, logprobs, begun, turns = [], [], [], 0, 0
    while len(ids) < len(noise):
        logits = model(torch.tensor([[*prompt.ids, *ids]])).logits[0, -1].double() / TEMPERATURE
        cumulated = logits.softmax(-1).cumsum(-1)
        token = int((cumulated <= noise[len(ids)].double() * cumulated[-1]).sum())
        ids, actions = [*ids, token], [*actions, True]
        logprobs.append(float(logits.log_softmax(-1)[token]))
        if token != tokenizer.eos_token_id:
            continue
        turns += 1
        said = tokenizer.decode(ids[begun:], skip_special_tokens=True)
        (reply,) = says([[{"role": "assistant", "content": said}]], [prompt.row])
        if reply is None:
            return ids, actions, logprobs, True
        text = f"\n<|im_start|>tool\n{reply}<|im_end|>\n<|im_start|>assistant\n"
        between = tokenizer(text, add_special_tokens=False).input_ids
        if turns == TURNS or len(ids) + len(between) >= len(noise):
            return ids, actions, logprobs, False
        ids, actions = [*ids, *between], [*actions, *[False] * len(between)]
        logprobs, begun = [*logprobs, *[0.0] * len(between)], len(ids)
    return ids, actions, logprobs, False


@pytest.fixture(scope="module")
def noise(prompts):
    return uniform_noise(len(prompts), LIMIT, seed=5, step=0)


@pytest.fixture(scope="module")
def whole(model, tokenizer, prompts, noise):
    return played(model, tokenizer, prompts, noise)[0]


def test_episodes_are_what_each_row_alone_would_be(model, tokenizer, prompts, noise, whole):
    tokens = lay_out(whole, tokenizer.pad_token_id)
    logprobs, kinds = numbers_of(whole, "logprobs"), set()
    for i, (prompt, episode) in enumerate(zip(prompts, whole, strict=True)):
        ids, actions, expected, finished = alone(model, tokenizer, prompt, noise[i])
        kept = tokens.response_mask[i]
        assert tokens.response_ids[i][kept].tolist() == ids
        assert tokens.action_mask[i][: len(ids)].tolist() == actions
        assert not tokens.action_mask[i][len(ids) :].any() and int(kept.sum()) == len(ids) <= LIMIT
        assert logprobs[i][: len(ids)].tolist() == pytest.approx(expected, abs=2e-5)
        assert episode.finished == finished
        stopped = ids[-1] == tokenizer.eos_token_id
        turns, ends = 1 + len(episode.earlier) // 2, (finished, stopped)
        kinds |= {turns, ends}
    # In one to three turns; to its own end, cut for want of a turn or of room, cut in mid-turn.
    assert kinds == {1, 2, 3, (True, True), (False, True), (False, False)}


def test_what_was_said_is_kept_as_text(tokenizer, whole):
    for i, episode in enumerate(whole):
        spoken = [s for s in episode.segments if s.by_policy][:-1]
        texts = [tokenizer.decode(s.ids, skip_special_tokens=True) for s in spoken]
        assert [t["content"] for t in episode.earlier[::2]] == texts
        replies = [says([[{"content": t}]], [{"n": i}])[0] for t in texts]
        assert [t["content"] for t in episode.earlier[1::2]] == replies
        roles = [turn["role"] for turn in episode.earlier]
        assert roles == ["assistant", "tool"] * len(spoken)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_ask_the_engine_alike_and_draw_what_one_rank_draws(
    world, model, tokenizer, prompts, noise, whole, monkeypatch
):
    """Ranks as threads; the rows do not divide, so that some are dealt twice."""
    dealt = [
        (list(range(len(prompts))) * 2)[rank::world][: -(-len(prompts) // world)]
        for rank in range(world)
    ]
    barrier, shelf, found = threading.Barrier(world), {}, {}

    def gather(value):
        shelf[threading.current_thread().name] = value
        barrier.wait(60)
        values = [shelf[str(rank)] for rank in range(world)]
        barrier.wait(60)
        return values

    def work(rank):
        rows = dealt[rank]
        some = [prompts[i] for i in rows]
        found[rank] = played(copy.deepcopy(model), tokenizer, some, noise[rows])

    monkeypatch.setattr(playing.process_group, "gather_objects", gather)
    threads = [threading.Thread(target=work, args=[r], name=str(r)) for r in range(world)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    asked = [engine.asked for _, engine in found.values()]
    assert len(asked) == world and asked.count(asked[0]) == world and len(asked[0]) == TURNS
    for rank, (episodes, _) in found.items():
        for i, episode in zip(dealt[rank], episodes, strict=True):
            assert episode.ids() == whole[i].ids()
            assert episode.finished == whole[i].finished and episode.earlier == whole[i].earlier


def test_a_failing_environment_stops_every_rank_and_names_the_row(
    model, tokenizer, prompts, noise, monkeypatch
):
    def fails(conversations, rows):
        return [1 / (row["n"] - 3) and None for row in rows]

    with pytest.raises(StopRun) as stopped:
        played(model, tokenizer, prompts, noise, fails)
    said = str(stopped.value)
    assert said.startswith("environment 'own.py:says' failed on row ") and "ZeroDivision" in said
    assert "four five six seven" in said and "another --environment" in said
    other = ("environment 'x' failed", 0, 0)
    monkeypatch.setattr(playing.process_group, "gather_objects", lambda own: [own, other])
    with pytest.raises(StopRun, match="environment 'x' failed"):
        played(model, tokenizer, prompts, noise)


def test_without_an_environment_the_first_turn_is_all(model, tokenizer, prompts, noise, whole):
    sampling = Sampling(LIMIT, tokenizer.eos_token_id, tokenizer.pad_token_id, TEMPERATURE)
    with synced(Counted(), Engine(model)) as engine:
        episodes = playing.play(engine, prompts, noise, sampling, None)
        assert engine.asked == [(len(prompts), LIMIT)]
    for episode, longer in zip(episodes, whole, strict=True):
        (only,) = episode.segments
        assert torch.equal(only.ids, longer.segments[0].ids) and not episode.earlier
        assert episode.finished == (int(only.ids[-1]) == tokenizer.eos_token_id)


def test_a_reply_needs_room_for_itself_and_a_token(model, tokenizer, prompts, noise, whole):
    row = next(i for i, e in enumerate(whole) if e.earlier)
    used, empty = len(whole[row].segments[0].ids), {"role": "tool", "content": ""}
    asked = [*prompts[row].messages, whole[row].earlier[0]]
    frame = len(chat_template.reply_ids(tokenizer, asked, empty))
    for spare, fits in ((1, True), (0, False)):
        text = "x" * (LIMIT - used - frame - spare)
        settings = [prompts[row]], noise[[row]], lambda *_, said=text: [said], 2
        ((episode,), _) = played(model, tokenizer, *settings)
        assert len(episode.segments) == (3 if fits else 1) and not episode.finished
        behind = sum(len(s.ids) for s in episode.segments)
        assert behind == (LIMIT if fits else used) and bool(episode.earlier) == fits


def test_nobody_is_asked_where_no_turn_has_ended(model, tokenizer, prompts, noise):
    def never(conversations, rows):
        raise AssertionError

    found, engine = played(model, tokenizer, prompts[:2], noise[:2, :1], never)
    assert not any(e.finished or e.earlier for e in found) and engine.asked == [(2, 1)]


def test_greedy_turns_need_no_noise(model, tokenizer, prompts):
    environment = Environment(says, "says", tokenizer, "tool", TURNS, 60.0)
    sampling = Sampling(LIMIT, tokenizer.eos_token_id, tokenizer.pad_token_id)
    with synced(NativeEngine(), Engine(model)) as engine:
        found = [playing.play(engine, prompts, None, sampling, environment) for _ in range(2)]
    assert [e.ids() for e in found[0]] == [e.ids() for e in found[1]]


def test_a_model_with_as_many_positions_as_a_row_may_have_tokens(tokenizer, prompts, noise):
    """Rows run on beyond their own room for longer ones, where there is no position left."""
    longest = max(len(p.ids) for p in prompts) + LIMIT
    torch.manual_seed(0)
    sizes = dict(n_embd=16, n_layer=1, n_head=2, n_positions=longest)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).eval()
    gpt2.lm_head = nn.Linear(16, len(tokenizer))
    with torch.no_grad():
        gpt2.lm_head.bias.zero_()[tokenizer.eos_token_id] = 3.0

    def long(conversations, rows):
        return ["x" * (50 - 5 * row["n"] % 50) for row in rows]

    (episodes, engine) = played(gpt2, tokenizer, prompts, noise, long)
    widths = [len(e.ids()) for e in episodes]
    assert max(widths) <= longest and engine.asked[1][1] + max(widths) > longest


# What is learned from.


@pytest.fixture(scope="module")
def first_step(model, tokenizer, prompts):
    """A rollout on which a copy of the model has its gradient, and all that it was made of."""
    seen = []

    def priced(answers):
        """Changes with the last turn and with those before it."""
        seen.append(answers)
        rows = zip(answers.texts, answers.rows, strict=True)
        return [len(text) + 10.0 * len(row.get("episode", ())) for text, row in rows]

    models = SimpleNamespace(
        tokenizer=tokenizer,
        actor=Engine(copy.deepcopy(model)),
        reference=model,
        rollout_engine=NativeEngine(),
        reward_function=WeightedSum({"priced": priced}, [1.0]),
        environment=Environment(says, "says", tokenizer, "tool", TURNS, 60.0),
        **dict.fromkeys(("critic", "reward", "judge", "frozen_offload", "ptx", "nucleus")),
    )
    config = config_of(
        algorithm="reinforce",
        whiten_advantages=False,
        kl_coef=0.0,
        temperature=TEMPERATURE,
        max_response_length=LIMIT,
        micro_batch_size=5,
        logprobs_from="decode",
    )
    device = torch.device("cpu")
    rollout, _ = rollouts.collect(models, prompts, config, device, noise_step=0)
    experience, measured = make_experience(rollout, config, State(kl_coef=0.0))
    everything = list(range(len(prompts)))
    measured |= update.step_actor(models, experience, everything, config, device)
    return SimpleNamespace(rollout=rollout, seen=seen, measured=measured, actor=models.actor)


def test_replies_have_no_gradient_and_the_ratio_begins_at_one(first_step, prompts):
    """The whole way, from sampling to the gradient, against −Σ score · ∇log p of the policy's own
    tokens, row by row."""
    rollout, measured, actor = first_step.rollout, first_step.measured, first_step.actor
    assert measured["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert abs(measured["approx_kl"]) < 1e-9 and abs(measured["kl"]) < 1e-4
    assert measured["turns"] > 1 and measured["reply_tokens"] > 1
    found = actor.gradient()
    losses, count = {True: 0.0, False: 0.0}, 0
    for i, prompt in enumerate(prompts):
        kept = rollout.response_mask[i]
        ids, actions = rollout.response_ids[i][kept], rollout.action_mask[i][kept]
        count += int(actions.sum())
        logits = actor(torch.tensor([[*prompt.ids, *ids.tolist()]])).logits[0, -len(ids) - 1 : -1]
        logprobs = (logits / TEMPERATURE).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        for own in losses:  # of the policy's tokens; of all, as a fault would have it
            losses[own] -= rollout.scores[i] * (logprobs * (actions if own else 1)).sum()
    gradients = {}
    for own, loss in losses.items():
        (loss / count).backward(retain_graph=True)
        gradients[own] = actor.gradient()
    size = gradients[True].abs().max()
    assert (found - gradients[True]).abs().max() < 1e-4 * size
    assert (found - gradients[False]).abs().max() > 0.1 * size


def test_reward_functions_see_the_last_turn_and_the_whole_episode(first_step, prompts):
    (answers,) = first_step.seen
    several = 0
    for i, (messages, text, row) in enumerate(
        zip(answers.messages, answers.texts, answers.rows, strict=True)
    ):
        asked = {"role": "user", "content": QUESTIONS[i]}
        assert messages[0] == asked and row["n"] == i
        assert [turn["role"] for turn in messages[1:]] == ["assistant", "tool"] * (
            len(messages) // 2
        )
        if "episode" in row:
            several += 1
            assert row["episode"] == [*messages[1:], {"role": "assistant", "content": text}]
        else:
            assert len(messages) == 1
    assert 2 <= several < len(prompts)
