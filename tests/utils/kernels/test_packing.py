"""Rows end to end against the same rows padded: log-probabilities, values and their gradients."""

import inspect
import itertools

import pytest
import torch
import transformers
from torch.nn.attention import varlen

from tests.helpers.families import FAMILIES
from tests.utils.generation.test_sampling import VOCAB, tiny
from utils.data import batches
from utils.kernels import packing
from utils.models import language_model, scalar_model, scorer

LENGTHS, LEFT, WIDTH = [14, 3, 9, 1, 11], [0, 2, 4, 1, 3], 16
TAKE_PACKED = [name for name in FAMILIES if name != "Bloom"]  # ALiBi is added to its own attention


def rows():
    """ids, mask, wanted (B,T): pads on both sides, and every token but a row's first is wanted."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (len(LENGTHS), WIDTH), generator=generator)
    steps, left = torch.arange(WIDTH)[None], torch.tensor(LEFT)[:, None]
    right = left + torch.tensor(LENGTHS)[:, None]
    return ids, (steps >= left) & (steps < right), (steps > left) & (steps < right)


def assert_close(actual, expected):
    # A key's bias has no gradient but rounding.
    slack = 1e-4 * expected.detach().abs().max().item() + 5e-6
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=slack)


def gradients(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [g for g in found if g is not None]


def twins(family, dtype=torch.float32, labels=0):
    """The same model twice: one padded, one packed."""
    sizes = FAMILIES[family] | ({"num_labels": 1} if labels else {})
    settings = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    auto = transformers.AutoModelForCausalLM
    if labels:
        auto = transformers.AutoModelForSequenceClassification
    found = []
    for _ in range(2):
        model = auto.from_config(getattr(transformers, f"{family}Config")(**sizes, **settings))
        model.load_state_dict(tiny(family).state_dict(), strict=False)
        if labels:
            torch.manual_seed(2)
            model.score.weight.data.normal_()
        found.append(model.to(dtype).eval())
    packing.turn_on(found[1])
    return found


@pytest.mark.parametrize("family", TAKE_PACKED)
def test_packed_rows_are_padded_rows(family):
    ids, mask, wanted = rows()
    expected, actual = [], []
    for model, into in zip(twins(family), (expected, actual), strict=True):
        assert packing.is_on(model) == (into is actual)
        logprobs, entropies = language_model.wanted_logprobs(
            model, ids, mask, wanted, temperature=0.8, with_entropies=True
        )
        weights = torch.linspace(-1, 1, len(logprobs))
        into += [logprobs, entropies, *gradients(model, (logprobs * weights).sum())]
    assert len(expected[0]) == sum(LENGTHS) - len(LENGTHS) and expected[0].std() > 0.2
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)


def test_a_rows_first_token_never_counts():
    """Nor where pads before it would predict it: a row more or less shifts all that follow."""
    ids, mask, wanted = rows()
    for model in twins("Llama"):
        expected, _ = language_model.wanted_logprobs(model, ids, mask, wanted)
        actual, _ = language_model.wanted_logprobs(model, ids, mask, mask)
        assert torch.equal(actual, expected)
        whole = language_model.response_logprobs(model, ids, mask, WIDTH - 1)[0]
        assert torch.equal(whole, torch.zeros(mask.shape).masked_scatter(wanted, expected)[:, 1:])


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPTNeoX"])
def test_packed_values_are_padded_values(family):
    ids, mask, _ = rows()
    found = []
    for classifier in twins(family, labels=1):
        model = scalar_model.ScalarModel(classifier)
        values = model(ids, mask)
        slopes = torch.randn(mask.shape, generator=torch.Generator().manual_seed(4)) * mask
        scores = scorer.sequence_scores(model, ids, mask)
        found.append([values * mask, scores, *gradients(model, (values * slopes).sum())])
    assert found[0][0].std() > 0.5
    for a, e in zip(*found, strict=True):
        assert_close(a, e)


LONG = [5, 6, 7, 8, 9, 3, 4]
GROUPS = [[[*LONG, 6, 7], [*LONG, 3], [*LONG, 6, 4, 4]], [[3]], [[4, 4, 4], [4, 4]], [[7], [9, 9]]]


def test_what_rows_begin_with_is_counted_up_to_the_last_token_of_each():
    expected = [(0, 0), (0, 7), (0, 7), (3, 0), (4, 0), (4, 1), (6, 0), (6, 0)]
    assert packing.shared_beginnings(GROUPS) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPTNeoX"])
def test_answers_that_share_their_prompt_score_as_alone(family, dtype):
    """Mistral's window of 6 ends in the middle of what is shared."""
    answers = [row for group in GROUPS for row in group]
    ids = batches.pad(answers, 0)
    mask = batches.pad([[True] * len(row) for row in answers], False)
    plain, packed = (scalar_model.ScalarModel(m) for m in twins(family, dtype, labels=1))
    seen = []
    packed.classifier.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape[1])
    )
    found = []
    for model, shared in ((plain, None), (packed, packing.shared_beginnings(GROUPS))):
        scores = scorer.sequence_scores(model, ids, mask, shared)
        slopes = torch.linspace(-1, 1, len(answers))
        found.append([scores, *gradients(model, (scores * slopes).sum())])
    assert seen == [sum(map(len, answers)) - 7 - 7 - 1]
    assert found[0][0].std() > 0.3
    for e, a in zip(*found, strict=True):
        if dtype == torch.float32:
            assert_close(a, e)
        else:
            torch.testing.assert_close(a, e, rtol=0.1, atol=0.05 * float(e.abs().max()) + 1e-4)


def test_checkpointed_layers_know_the_rows_when_they_run_again():
    plain, packed = twins("Llama")
    packed.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for model in (plain, packed.train()):
        logprobs, _ = language_model.wanted_logprobs(model, *rows())
        found.append(gradients(model, logprobs.square().sum()))
    for a, e in zip(found[1], found[0], strict=True):
        assert_close(a, e)


@pytest.mark.parametrize("limit", [0, 2**30], ids=["fused", "products"])
def test_both_ways_of_bf16_rows_are_near_fp32(monkeypatch, limit):
    monkeypatch.setattr(packing, "SCORES", limit)
    generator = torch.Generator().manual_seed(0)
    lengths, heads, groups, width = [7, 1, 12], 4, 2, 8
    shapes = [(1, h, sum(lengths), width) for h in (heads, heads // groups, heads // groups)]
    for window in (None, 5):
        exact = [torch.randn(s, generator=generator).double().requires_grad_() for s in shapes]
        rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
        outer = torch.randn(1, sum(lengths), heads, width, generator=generator)
        actual, _ = packing.attention(
            *(None, *rounded, None),
            sliding_window=window,
            row_lengths=lengths,
            trees=[None] * 3,
        )
        # Token by token: softmax over what it may see.
        q, (k, v) = exact[0], (x.repeat_interleave(groups, 1) for x in exact[1:])
        expected, start = [], 0
        for n in lengths:
            for t in range(start, start + n):
                first = max(start, t - window + 1) if window else start
                scores = (k[0, :, first : t + 1] * q[0, :, t, None]).sum(-1) / width**0.5
                weights = scores.softmax(-1)
                expected.append((weights[..., None] * v[0, :, first : t + 1]).sum(1))
            start += n
        expected = torch.stack(expected)[None]
        torch.testing.assert_close(actual.double(), expected, rtol=0.02, atol=0.03)
        mine = torch.autograd.grad(actual, rounded, outer.bfloat16())
        theirs = torch.autograd.grad(expected, exact, outer.double())
        for a, e in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=0.05, atol=0.06)


def test_a_packed_model_generates_and_takes_padded_rows_as_before():
    plain, packed = twins("Qwen2")
    ids, mask, _ = rows()
    inputs = language_model.forward_inputs(plain, ids, mask)
    expected, actual = (model(**inputs).logits[mask] for model in (plain, packed))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    prompt = dict(input_ids=ids[:, :1], max_new_tokens=6, do_sample=False)
    assert torch.equal(plain.generate(**prompt), packed.generate(**prompt))


def test_what_cannot_be_packed_is_refused_or_left(capsys):
    packing._say_once.cache_clear()
    bloom = tiny("Bloom")
    packing.choose(bloom, "auto", "fp32")
    packing.choose(bloom, "auto", "fp32")
    told = capsys.readouterr().out
    assert told.count("packing=auto: rows are padded, as Bloom") == 1, "told, and once"
    assert not packing.is_on(bloom)
    with pytest.raises(SystemExit, match="packing=on: BloomForCausalLM takes no att"):
        packing.choose(bloom, "on", "fp32")
    chunked, _ = twins("Llama")
    chunked.config.layer_types = ["chunked_attention", "full_attention"]
    assert "chunked_attention" in packing.obstacle(chunked, "cpu", "fp32")
    eager, _ = twins("Llama")
    eager.set_attn_implementation("eager")
    assert "eager" in packing.obstacle(eager, "cpu", "fp32")


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("spans", [[(0, 0)] * 3, [(0, 0), (0, 5), (0, 5)]], ids=["", "shared"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shares_heads", [True, False], ids=["", "torch 2.11"])
def test_the_varlen_kernel_is_called_as_its_signature_says(
    monkeypatch, window, spans, shares_heads
):
    """With the kernel's own function in between, and each row's attention in the kernel's place."""
    signature = inspect.signature(varlen.varlen_attn)
    if not shares_heads:
        left = [p for name, p in signature.parameters.items() if name != "enable_gqa"]
        signature = signature.replace(parameters=left)

    def kernel(*args, **kwargs):
        asked = signature.bind(*args, **kwargs).arguments
        assert asked["max_q"] == 12 and asked["max_k"] == 12 + spans[2][1]
        q, k, v = (asked[name].as_subclass(torch.Tensor) for name in ("query", "key", "value"))
        assert asked.get("enable_gqa", False) == shares_heads
        assert q.shape[1] == (2 if shares_heads else 1) * k.shape[1]
        left, right = asked["window_size"]
        assert right == 0
        found = []
        ends = zip(*(itertools.pairwise(asked[f"cu_seq_{x}"].tolist()) for x in "qk"), strict=True)
        for (start, end), (start_k, end_k) in ends:
            for t in range(start, end):
                last = end_k - end + t  # the queries are those of the last keys
                first = max(start_k, last - left) if left >= 0 else start_k
                keys, values = (x[first : last + 1] for x in (k, v))
                if shares_heads:
                    keys, values = (x.repeat_interleave(2, 1) for x in (keys, values))
                scores = torch.einsum("hd,thd->ht", q[t], keys) * asked["scale"]
                found.append(torch.einsum("ht,thd->hd", scores.softmax(-1), values))
        return torch.stack(found)

    kernel.__signature__ = signature
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    lengths, generator = [7, 1, 12], torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, 20, 8, generator=generator) for heads in (4, 2, 2)]
    ids, mask = torch.ones(3, 17, dtype=torch.long), torch.zeros(3, 17, dtype=torch.bool)
    for row, (n, (start, end)) in enumerate(zip(lengths, spans, strict=True)):
        mask[row, : n + end - start] = True
    shared = [(0, end) for _, end in spans]
    settings = packing.inputs(ids, packing.own(mask, shared), shared)
    assert settings["row_lengths"] == ([20] if spans[2][1] else lengths)
    settings |= dict(scaling=0.3, sliding_window=window)
    for name in ("input_ids", "position_ids", "attention_mask"):
        del settings[name]
    on_cpu, _ = packing.attention(None, *tensors, None, **settings)
    seen = [n + end for n, (_, end) in zip(lengths, spans, strict=True)]
    settings |= packing.keys_of_rows([0, 7, 8, 20], seen, shared, torch.device("cpu"))
    on_gpu, _ = packing.attention(None, *(x.as_subclass(OnGPU) for x in tensors), None, **settings)
    torch.testing.assert_close(on_gpu.as_subclass(torch.Tensor), on_cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "lacks, reason",
    [
        ("scale", "unexpected keyword argument 'scale'"),
        ("window_size", "unexpected keyword argument 'window_size'"),
        ("enable_gqa", ""),  # torch 2.11
        ("max_k", "too many positional arguments"),
        ("", ""),
    ],
)
def test_a_varlen_attention_of_another_torch_is_not_called(monkeypatch, lacks, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    signature = inspect.signature(varlen.varlen_attn)
    left = [p for name, p in signature.parameters.items() if name != lacks]

    def other(*args, **kwargs):
        raise AssertionError("only its signature is read")

    other.__signature__ = signature.replace(parameters=left)
    monkeypatch.setattr(varlen, "varlen_attn", other)
    found = packing.obstacle(twins("Llama")[0], "cuda", "bf16")
    assert reason in found and bool(found) == bool(reason)


@pytest.mark.parametrize(
    "capability, sizes, dtype, reason",
    [
        ((7, 5), {}, "fp16", "needs compute capability 8.0, this GPU has 7.5"),
        ((8, 0), {}, "fp32", "bf16 and fp16 only"),
        ((8, 0), {"head_dim": 12}, "bf16", "have 12 for keys and 12 for values"),
        ((9, 0), {"head_dim": 264}, "bf16", "have 264 for keys"),
        ((9, 0), {"qk_head_dim": 192, "v_head_dim": 128}, "bf16", "192 for keys and 128 for"),
        ((9, 0), {"head_dim": None, "hidden_size": 40}, "bf16", "have 10 for keys"),
        ((9, 0), {"head_dim": 256}, "bf16", ""),
        ((12, 0), {"head_dim": None, "hidden_size": 32}, "fp16", ""),
    ],
)
def test_what_the_varlen_kernel_cannot_do_is_known_before(
    monkeypatch, capability, sizes, dtype, reason
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    model, _ = twins("Llama")
    assert model.config.num_attention_heads == 4
    for name, value in sizes.items():
        setattr(model.config, name, value)
    found = packing.obstacle(model, "cuda", dtype)
    assert reason in found and bool(found) == bool(reason)
    assert packing.obstacle(model, "cpu", dtype) == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_the_varlen_kernel_lets_answers_share_their_prompt(family):
    answers = [row for group in GROUPS for row in group]
    ids = batches.pad(answers, 0).cuda()
    mask = batches.pad([[True] * len(row) for row in answers], False)
    plain, packed = (
        scalar_model.ScalarModel(m.cuda()) for m in twins(family, torch.bfloat16, labels=1)
    )
    expected = scorer.sequence_scores(plain, ids, mask)
    actual = scorer.sequence_scores(packed, ids, mask, packing.shared_beginnings(GROUPS))
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3"])
def test_the_varlen_kernel_gives_padded_rows(family):
    ids, mask, wanted = (x.cuda() for x in rows())
    found = []
    for model in twins(family, torch.bfloat16):
        logprobs, _ = language_model.wanted_logprobs(model.cuda(), ids, mask, wanted)
        found.append([logprobs, *gradients(model, logprobs.sum())])
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=0.05, atol=0.05 * float(e.abs().max()))
