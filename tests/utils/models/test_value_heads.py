"""Value heads against the same numbers computed plainly; the policy that follows them is the same
one wherever the model is asked, and on disk."""

import json
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from evaluation.checkpoints import load_checkpoint
from step3_preference import logprobs
from step3_preference.config import PreferenceConfig
from utils.checkpoints.model_folder import ModelFolder
from utils.data import chat_template
from utils.data.preferences import Answers
from utils.generation import sampling, weights
from utils.kernels import cpu_products, vocabulary_head
from utils.models import language_model, value_heads
from utils.models.loading import Loading
from utils.models.value_heads import NUMBERS, PerturbedHead

BETA, VOCABULARY = 3.0, 61
ROWS = [
    Answers([[5, 6, 7, 8, 9], [5, 6, 11]], [2, 2], [1.0, 0.0], [1, 1]),
    Answers([[10, 11, 12, 3], [10, 13], [10, 14, 15, 16]], [1, 1, 1], [2.0, 1.0, 0.0], [1] * 3),
]
CPU = torch.device("cpu")


def stirred(model: nn.Module) -> nn.Module:
    """With heads whose last layers are not 0, each other numbers."""
    torch.manual_seed(7)
    for p in model.get_output_embeddings().value_heads.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model


def built(**settings) -> nn.Module:
    torch.manual_seed(3)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    given = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    model = LlamaForCausalLM(LlamaConfig(**(sizes | given | settings))).eval()
    value_heads.put_on(model, "here", BETA)
    return model


def hidden_of(model: nn.Module, ids: list[int]) -> torch.Tensor:
    return model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]


def plainly(model: nn.Module, ids: list[int], t: int) -> dict[str, torch.Tensor]:
    """NUMBERS of token t of a row, over the whole vocabulary at once."""
    head, h = model.get_output_embeddings(), hidden_of(model, ids)[t - 1]
    heads, token = head.value_heads, ids[t]

    def value(mlp):
        inner = torch.relu(mlp[0].weight @ h + mlp[0].bias)
        return mlp[2].weight @ inner + mlp[2].bias

    q, targets = [value(m) for m in heads.q], [value(m) for m in heads.target]
    found = {"logprob": (head.weight @ h).log_softmax(0)[token], "v": value(heads.v)[0]}
    for n, of in enumerate(q, 1):
        found |= {f"q{n}": of[token], f"log_softmax_q{n}": of.log_softmax(0)[token]}
    return found | {"target": torch.minimum(*targets)[token].detach()}


@pytest.mark.parametrize("chunk", [2**20, 4 * VOCABULARY])
def test_numbers_and_their_gradients_are_the_plain_ones(chunk, monkeypatch):
    monkeypatch.setitem(vocabulary_head.CHUNK, "cpu", chunk)
    model = stirred(built())
    groups, begins = [row.answers for row in ROWS], [row.begins for row in ROWS]
    found, owners = language_model.answer_tokens(model, groups, begins, CPU, values=True)
    places = [(a, t) for r in ROWS for a, b in zip(r.answers, r.begins, strict=True)
              for t in range(b, len(a))]  # fmt: skip
    rows = [plainly(model, ids, t) for ids, t in places]
    plain = torch.stack([torch.stack([row[name] for name in NUMBERS]) for row in rows])
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    assert owners.tolist() == [0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4]
    slopes = torch.linspace(-1, 2, found.numel()).view_as(found)
    given = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (
        torch.autograd.grad((x * slopes).sum(), given, retain_graph=True) for x in (found, plain)
    )
    for p, a, b in zip(given, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, p=p: f"{p.shape} {m}")


def test_values_in_bf16_have_more_than_three_digits():
    model = built().bfloat16()
    v = model.get_output_embeddings().value_heads.v[-1]
    v.bias.data.fill_(1.0)
    v.weight.data.fill_(1e-3)
    found, _ = language_model.answer_tokens(model, [ROWS[0].answers], [[2, 2]], CPU, values=True)
    values = found[:, NUMBERS.index("v")]
    assert (values - 1).abs().min() > 0 and (values - 1).abs().max() < 0.02


def test_sums_of_answers_are_those_of_their_tokens():
    """Rewards at the last token of each answer, values of the next one of the same answer."""
    model, how = stirred(built()), PreferenceConfig(loss="ilql", gamma=0.9).how()
    found = logprobs.with_values(model, ROWS, CPU, how)
    rewards = [1.0, -1.0, 1.0, 0.0, -1.0]
    answers = [(a, b) for r in ROWS for a, b in zip(r.answers, r.begins, strict=True)]
    for sums, (ids, begin), reward in zip(found, answers, rewards, strict=True):
        rows = [{k: v.item() for k, v in plainly(model, ids, t).items()}
                for t in range(begin, len(ids))]  # fmt: skip
        aims = [0.9 * row["v"] for row in rows[1:]] + [reward]
        of_q = sum(
            (r[q] - aim) ** 2 for r, aim in zip(rows, aims, strict=True) for q in ("q1", "q2")
        )
        assert sums[0].item() == pytest.approx(sum(r["logprob"] for r in rows), rel=1e-4)
        assert sums[1].item() == pytest.approx(of_q, rel=1e-4)
        assert sums[5].item() == pytest.approx(sum(r["target"] for r in rows), rel=1e-4)


def expected_logits(model, ids) -> torch.Tensor:
    """(T,V): those of the language model, and β · the lesser Q of the targets."""
    head, h = model.get_output_embeddings(), hidden_of(model, ids)
    q = [m[2](torch.relu(m[0](h))) for m in head.value_heads.target]
    return h @ head.weight.T + BETA * torch.minimum(*q)


@torch.no_grad()
def test_the_policy_begins_as_the_language_model_and_follows_the_values():
    model = built()
    plain = hidden_of(model, [4, 9, 2]) @ model.lm_head.weight.T
    torch.testing.assert_close(model(input_ids=torch.tensor([[4, 9, 2]])).logits[0], plain)
    stirred(model)
    logits = model(input_ids=torch.tensor([[4, 9, 2]])).logits[0]
    torch.testing.assert_close(logits, expected_logits(model, [4, 9, 2]))
    assert (logits - plain).abs().max() > 0.5
    # Its log-probabilities, a chunk at a time, are of the same policy.
    found = logprobs.of_answers(model, ROWS, CPU)
    answers = [(a, b) for r in ROWS for a, b in zip(r.answers, r.begins, strict=True)]
    for one, (ids, begin) in zip(found, answers, strict=True):
        logs = expected_logits(model, ids).log_softmax(-1)
        sums = sum(logs[t - 1, ids[t]].item() for t in range(begin, len(ids)))
        assert one.item() == pytest.approx(sums, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_decoding_with_a_cache_is_the_forward_pass(packed, monkeypatch):
    """On layers that are laid out for decoding too, where the head's product alone would be the
    language model's."""
    monkeypatch.setattr(cpu_products.PRODUCTS, "onednn", lambda use, dtype: packed)
    model, ids = stirred(built()), torch.tensor([[0, 5, 6], [7, 8, 9]])
    mask, noise = torch.tensor([[False, True, True], [True] * 3]), torch.rand(2, 6)
    kept = torch.zeros(2, 6), torch.zeros(2, 6)
    responses = sampling.generate(
        model, ids, mask, max_new_tokens=6, stop_id=-1, pad_id=0, noise=noise,
        logprobs_and_entropies=kept,
    )  # fmt: skip
    for i, prompt in enumerate(([5, 6], [7, 8, 9])):
        row = prompt + responses[i].tolist()
        logs = expected_logits(model, row)[len(prompt) - 1 : -1].log_softmax(-1)
        own = logs.gather(1, responses[i][:, None]).squeeze(1)
        torch.testing.assert_close(kept[0][i], own, rtol=1e-4, atol=1e-4)
        drawn = [sampling.sample_tokens(x[None], n[None], 1.0).item()
                 for x, n in zip(logs, noise[i], strict=True)]  # fmt: skip
        assert drawn == responses[i].tolist()


@torch.no_grad()
def test_a_plain_copy_for_rollouts_has_them():
    model = stirred(built())
    plain = weights.plain_twin(model)
    with weights.filled(plain, model):
        ids = torch.tensor([[4, 9, 2]])
        assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)


def test_targets_go_a_part_of_the_way_in_fp32():
    model = stirred(built()).bfloat16()
    heads = model.get_output_embeddings().value_heads
    targets = value_heads.Targets(heads, 0.001)
    shadow = {n: p.double().clone() for n, p in heads.target.named_parameters()}
    goal = {n: p.double() for n, p in heads.q.named_parameters()}
    for _ in range(100):
        targets.update()
    for name, p in heads.target.named_parameters():
        far = 0.999**100
        expected = far * shadow[name] + (1 - far) * goal[name]
        torch.testing.assert_close(targets.shadow[name].double(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(p, targets.shadow[name].bfloat16())
    assert all(not p.requires_grad for p in heads.target.parameters())


@pytest.fixture
def saved(tiny, tmp_path):
    """A folder of the tiny model with heads, as a step saves it, and its model."""
    start = str(tiny / "base_model")
    tokenizer = chat_template.load_tokenizer(start)
    how = dict(dtype="fp32", tokenizer=tokenizer)
    model = stirred(language_model.load(Loading(), start, ilql_beta=BETA, **how)).eval()
    ModelFolder(model, tokenizer, "").snapshot()(tmp_path / "saved")
    return tmp_path / "saved", model, how


@torch.no_grad()
def test_a_folder_is_the_policy_here_and_the_language_model_elsewhere(saved):
    folder, model, how = saved
    ids = torch.tensor([[4, 9, 2]])
    logits = model(input_ids=ids).logits
    for again in (
        language_model.load(Loading(), str(folder), **how).eval(),
        load_checkpoint(str(folder), dtype="fp32", trust_remote_code=False)[0],
    ):
        torch.testing.assert_close(again(input_ids=ids).logits, logits)
        assert again.get_output_embeddings().beta == BETA
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    alone = model.model(input_ids=ids).last_hidden_state @ model.get_output_embeddings().weight.T
    torch.testing.assert_close(plain.eval()(input_ids=ids).logits, alone)
    assert (logits - alone).abs().max() > 0.5
    # Who trains on takes its heads with another β.
    again = language_model.load(Loading(), str(folder), ilql_beta=1.5, **how)
    head = again.get_output_embeddings()
    assert head.beta == again.config.ilql_beta == 1.5
    assert torch.equal(
        head.value_heads.v[0].weight, model.get_output_embeddings().value_heads.v[0].weight
    )


def test_what_would_lose_the_heads_is_refused(saved, tiny, tmp_path):
    folder, _, how = saved
    with pytest.raises(SystemExit, match="is ILQL's policy, .* without ilql_beta in config.json"):
        value_heads.check_not_there(str(folder), False)
    value_heads.check_not_there(str(tiny / "base_model"), False)
    shutil.copytree(folder, tmp_path / "without")
    (tmp_path / "without" / value_heads.FILE).unlink()
    with pytest.raises(SystemExit, match="cannot load ILQL's value heads"):
        language_model.load(Loading(), str(tmp_path / "without"), **how)
    settings = json.loads((folder / "config.json").read_text())
    assert settings["ilql_beta"] == BETA and "ilql" not in " ".join(settings["architectures"])
    model = built()
    model.lm_head.__class__, model.lm_head.forward = nn.Linear, lambda x: x
    with pytest.raises(SystemExit, match="no device_map"):
        value_heads.put_on(model, "here", BETA)


def test_a_family_that_changes_its_logits_is_refused_in_training():
    from transformers import CohereConfig, CohereForCausalLM

    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    torch.manual_seed(0)
    model = CohereForCausalLM(CohereConfig(num_attention_heads=2, logit_scale=0.5, **sizes)).eval()
    value_heads.put_on(model, "here", BETA)
    assert type(model.get_output_embeddings()) is PerturbedHead
    with pytest.raises(SystemExit, match="CohereForCausalLM changes what its vocabulary head"):
        language_model.answer_tokens(model, [[[5, 6, 7]]], [[1]], CPU, values=True)
