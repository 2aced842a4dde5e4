"""What goes over to vLLM: every weight by its name in a saved folder, through files that fit."""

import base64
import contextlib
import copy
import ctypes
import os
import threading
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import nccl_over_gloo
from tests.utils.generation.test_sampling import tiny as model_of
from tests.utils.models.test_adapters import IDS, logits_of, moved
from utils.generation import vllm_weights
from utils.generation.vllm_client import ServerError
from utils.generation.weights import merged_buckets
from utils.models import adapters
from utils.models.adapters import Lora


@pytest.mark.parametrize("family", ["Llama", "Bloom", "Qwen3-MoE"])
def test_all_that_a_saved_folder_holds_is_sent(family, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.generation.weights.BUCKET_BYTES", 3000)
    model = model_of(family)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    sent = {}
    buckets = list(vllm_weights.buckets_as_saved(model))
    for bucket in buckets:
        assert not sent.keys() & bucket.keys()
        sent |= bucket
    assert len(buckets) > 3 and sent.keys() == saved.keys()
    assert all(torch.equal(sent[name], weight) for name, weight in saved.items())


def adapted(family, variant, dtype=torch.float32):
    """A model with adapters that have moved, and the same one without any."""
    plain = copy.deepcopy(model_of(family)).to(dtype)
    model = copy.deepcopy(plain)
    adapters.put_on(model, "", Lora(4, 6.0, lora_variant=variant))
    return moved(model), plain


def sent_of(model) -> dict[str, torch.Tensor]:
    return {k: w for bucket in vllm_weights.buckets_as_saved(model) for k, w in bucket.items()}


@pytest.mark.parametrize("variant", adapters.VARIANTS)
@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen3-MoE"])
def test_adapters_go_over_merged(family, variant, tmp_path, monkeypatch):
    """To a model without any, which then computes as much; the trained one stays as it was."""
    monkeypatch.setattr("utils.generation.weights.BUCKET_BYTES", 3000)
    monkeypatch.setattr("tests.utils.models.test_adapters.IDS", IDS % 90)
    model, plain = adapted(family, variant)
    logits = logits_of(model)
    sent = sent_of(model)
    plain.save_pretrained(tmp_path)
    assert sent.keys() == load_file(tmp_path / "model.safetensors").keys()
    assert torch.equal(logits_of(model), logits)
    assert (logits_of(plain) - logits).abs().max() > 0.1
    own = dict(model.named_parameters())
    weights = {name: w for bucket in merged_buckets(model) for name, w in bucket.items()}
    assert weights.keys() == dict(plain.named_parameters()).keys()
    assert sum(".lora_A." in name for name in own) == len(adapters.layers_of(model)) > 4
    plain.load_state_dict(weights, strict=False)
    torch.testing.assert_close(logits_of(plain), logits, rtol=1e-4, atol=1e-4)


def test_merged_weights_in_bf16_are_rounded_once():
    model, _ = adapted("Llama", "lora", torch.bfloat16)
    weights, sent, moved_by = dict(model.named_parameters()), sent_of(model), 0.0
    for name in adapters.layers_of(model):
        base, low, high = (
            weights[f"{name}.{part}.weight"].double()
            for part in ("base_layer", "lora_A.default", "lora_B.default")
        )
        exact, found = base + 6 / 4 * high @ low, sent[f"{name}.weight"]
        assert found.dtype == torch.bfloat16
        # But for what lies half-way between two of bf16's numbers, up to fp32's rounding.
        assert (found == exact.bfloat16()).double().mean() > 0.999, name
        moved_by = max(moved_by, (exact - base).abs().max().item())
    assert moved_by > 0.1


def test_an_adapter_on_the_head_goes_over_where_the_head_is_its_own():
    for tied in (False, True):
        model = copy.deepcopy(model_of("Llama"))
        head = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.lm_head.weight = model.get_input_embeddings().weight if tied else head
        config = peft.LoraConfig(r=2, target_modules=["lm_head"])
        peft.inject_adapter_in_model(config, model)
        moved(model)
        if tied:
            with pytest.raises(SystemExit, match="adapter of lm_head cannot be merged.*ties"):
                sent_of(model)
            with pytest.raises(SystemExit, match="adapter of lm_head cannot be merged.*ties"):
                adapters.merge(model)
        else:
            low, high = model.lm_head.lora_A.default.weight, model.lm_head.lora_B.default.weight
            expected = head + 8 / 2 * high @ low  # peft's alpha is 8
            torch.testing.assert_close(sent_of(model)["lm_head.weight"], expected)


def test_a_file_is_in_shared_memory_where_it_fits(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_weights, "SHARED_MEMORY", str(tmp_path / "shared"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "disk"))
    (tmp_path / "disk").mkdir()
    with vllm_weights.file_of(64) as (path, whole):
        assert path.startswith(str(tmp_path / "disk")) and len(whole) == 64
    (tmp_path / "shared").mkdir()
    with vllm_weights.file_of(64) as (path, whole):
        assert path.startswith(str(tmp_path / "shared")) and os.stat(path).st_mode & 0o77 == 0
        whole[3] = 9
        again = torch.from_file(path, shared=True, size=64, dtype=torch.uint8)
    assert again[3] == 9 and not os.path.exists(path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ServerError, match="fit neither"), vllm_weights.file_of(64):
        pass
    assert not list((tmp_path / "shared").iterdir()) and not list((tmp_path / "disk").iterdir())


def test_what_did_not_arrive_is_named():
    sent = {"a": "1", "b": "2"}
    vllm_weights.compare(sent, [dict(sent), dict(sent)])
    for arrived, first in (({"a": "1"}, "b"), (sent | {"a": "7"}, "a"), (sent | {"c": "3"}, "c")):
        with pytest.raises(ServerError, match=f"1 of 2 .* worker 1 .*first {first}"):
            vllm_weights.compare(sent, [sent, arrived])


def fails(what):
    raise what


FOREVER = threading.Event()


@pytest.mark.parametrize(
    "ours, theirs, said",
    [
        (FOREVER.wait, lambda: fails(ServerError("it is gone")), "it is gone"),
        (lambda: fails(RuntimeError("NCCL Error 5")), FOREVER.wait, "RuntimeError .*NCCL Error 5"),
        (FOREVER.wait, int, "NCCL stands still: vLLM was done 0.05 s ago"),
        (int, lambda: fails(ServerError("damaged")), "damaged"),
        (int, int, ""),
    ],
)
def test_no_side_of_a_collective_waits_for_ever(monkeypatch, ours, theirs, said):
    given_up = []
    monkeypatch.setattr(vllm_weights, "abort", given_up.append)
    expected = pytest.raises(ServerError, match=said) if said else contextlib.nullcontext()
    with expected:
        vllm_weights.together(["group"], ours, theirs, 0.05)
    assert given_up == ["group"] * bool(said)


def test_an_aborted_group_is_freed_once(monkeypatch):
    freed, aborted, made = [], [], ctypes.create_string_buffer(8)
    destroy = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(freed.append)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, type(destroy)]
    library = SimpleNamespace(ncclCommAbort=lambda pointer: aborted.append(pointer.value))
    monkeypatch.setattr(ctypes, "CDLL", {"libnccl.so.2": library}.get)
    for abort in (False, True):
        group = new(ctypes.addressof(made), b"a name", destroy)
        if abort:
            vllm_weights.abort(group)
        del group
    assert len(freed) == 1 and aborted == [ctypes.addressof(made)]


class Workers:
    """What vLLM's workers do at our requests, by the code of its nccl_engine.py; a thread each.
    absent: numbers of those that do nothing, and keep us waiting for `patience` seconds."""

    patience = 0.1

    def __init__(self, size: int):
        self.size, self.absent, self.groups = size, set(), {}
        self.got: list[dict[str, torch.Tensor]] = [{} for _ in range(size)]

    def world_size(self) -> int:
        return self.size

    def post(self, path: str, body: dict) -> None:
        does = {"/init_weight_transfer_engine": self.join, "/update_weights": self.receive}[path]
        told, problems = next(iter(body.values())), []

        def work(number: int) -> None:
            try:
                does(number, **told)
            except RuntimeError as error:
                problems.append(error)

        threads = [
            threading.Thread(target=work, args=(number,), daemon=True)
            for number in range(self.size)
            if number not in self.absent
        ]
        for thread in threads:
            thread.start()
        if self.absent:
            FOREVER.wait(self.patience)
            raise ServerError(f"vLLM's server stands still: no answer to {path}")
        for thread in threads:
            thread.join(20)
        if problems:
            raise ServerError(f"{path}: HTTP 500 {problems[0]}")

    def join(self, number, nccl_unique_id_b64, rank_offset, world_size, packed):
        assert not packed, "a weight at a time is what we send"
        unique, rank = base64.b64decode(nccl_unique_id_b64, validate=True), rank_offset + number
        self.groups[number] = nccl_over_gloo.warmed_up(unique, rank, world_size, 0)

    def receive(self, number, names, dtype_names, shapes):
        for name, dtype, shape in zip(names, dtype_names, shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.groups[number].broadcast(weight)
            self.got[number][name] = weight


BUCKETS = [
    {"turned": torch.randn(3, 5).T, "bf16": torch.randn(7).bfloat16()},
    {"count": torch.tensor(7), "whole": torch.randn(2, 2)},
]


@pytest.fixture
def by_nccl(monkeypatch):
    """(our side, two workers of vLLM, our groups that were given up), before they have met."""
    given_up = nccl_over_gloo.for_the_trainer(monkeypatch)
    return vllm_weights.Nccl(), Workers(2), given_up


def test_each_worker_gets_every_weight_by_nccl(by_nccl):
    ours, workers, given_up = by_nccl
    for transfer in (ours, vllm_weights.Nccl()):  # the second is for a server started again
        transfer.connect(None)  # another rank of ours takes no part
        transfer.connect(workers)
        for bucket in BUCKETS:
            transfer.send(None, bucket)
            transfer.send(workers, bucket)
        sent = {name: tensor for bucket in BUCKETS for name, tensor in bucket.items()}
        for got in workers.got:
            assert got.keys() == sent.keys()
            assert all(torch.equal(got[name], tensor) for name, tensor in sent.items())
            assert all(got[name].dtype == tensor.dtype for name, tensor in sent.items())
            got.clear()
    assert not given_up


def test_a_worker_that_never_joins_is_named(by_nccl):
    ours, workers, _ = by_nccl
    workers.absent = {1}
    with pytest.raises(ServerError, match="no answer to /init_weight_transfer_engine"):
        ours.connect(workers)


def test_a_worker_that_hangs_in_an_update_is_named_and_the_group_given_up(by_nccl):
    ours, workers, given_up = by_nccl
    ours.connect(workers)
    workers.absent = {1}
    with pytest.raises(ServerError, match="no answer to /update_weights"):
        ours.send(workers, BUCKETS[0])
    assert given_up == ours.groups


def test_a_worker_that_is_gone_is_named_at_once(by_nccl):
    ours, workers, given_up = by_nccl
    ours.connect(workers)
    workers.absent, workers.patience = {1}, 20
    del workers.groups[1]  # its sockets are closed
    with pytest.raises(ServerError, match="RuntimeError on the way to vLLM"):
        ours.send(workers, {"large": torch.zeros(2**22)})
    assert given_up == ours.groups
