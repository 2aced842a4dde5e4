"""What goes over to vLLM: every weight by its name in a saved folder, through files that fit."""

import contextlib
import ctypes
import os
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.utils.generation.test_sampling import tiny as model_of
from utils.generation import vllm_weights
from utils.generation.vllm_client import ServerError


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
