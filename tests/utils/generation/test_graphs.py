"""Decoding by CUDA graphs, on graphs that are pretended (pretended_graphs.py): what is captured and
kept, and what is left of the process where a capture fails."""

import contextlib
import warnings

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.helpers.pretended_graphs import Machine, as_it_is
from tests.utils.generation.test_sampling import LENGTHS, NEW, PAD, left_padded, tiny
from utils.generation import graphs
from utils.generation import sampling as generation
from utils.generation.decoder import Decoder


@pytest.fixture
def machine(monkeypatch):
    """A device whose decoders capture, and whose layers are the GPU's."""
    monkeypatch.setattr(generation.cpu_products, "packed", as_it_is)
    monkeypatch.setattr(generation.token_attention, "used_by", as_it_is)
    monkeypatch.setattr(Decoder, "_is_static", lambda self, *_: self.mode in ("auto", "graph"))
    return Machine().install(monkeypatch)


def sample(family, rows=slice(None), new=NEW, stop=-1, **settings):
    ids, mask = left_padded(LENGTHS)
    noise = generation.uniform_noise(len(LENGTHS), new, seed=1, step=2)[rows]
    given = dict(max_new_tokens=new, stop_id=stop, pad_id=PAD, temperature=1.3, noise=noise)
    return generation.generate(tiny(family), ids[rows], mask[rows], **given, **settings)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPT2", "Qwen3"])
def test_graphs_write_what_eager_decoding_writes(machine, family):
    expected = sample(family, decoder=Decoder("eager"))
    kept = Decoder("auto")
    assert torch.equal(sample(family, decoder=kept), expected)
    (graph,) = machine.graphs
    assert graph.replays == NEW - 1 and len(expected.unique(dim=0)) == len(LENGTHS)
    assert graph.mode == "thread_local", "other threads of the process go on meanwhile"
    # Again, with other rows in the same shape, and in another one.
    order = [3, 1, 0, 2, 5, 4]
    assert torch.equal(sample(family, order, decoder=kept), sample(family, order))
    assert len(machine.graphs) == 1 and graph.replays == 2 * (NEW - 1)
    assert torch.equal(sample(family, [2, 4], decoder=kept), sample(family, [2, 4]))
    assert len(machine.graphs) == 2 and machine.in_order()


def test_all_graphs_share_one_pool_and_keep_nothing_in_it(machine):
    kept = Decoder("graph")
    for rows in ([4, 5, 0, 1, 2, 3], [0, 1, 2, 3], [0], [1, 2]):
        sample("Llama", rows, decoder=kept)
    assert len(machine.graphs) == 4
    assert len(machine.pools) == 1 and {g.pool for g in machine.graphs} == {(machine.pools[0],)}
    assert len({id(g.stream) for g in machine.graphs}) == 1
    places = set()
    for graph, _, logits in kept._graphs._steps.values():
        done = [x for x in graph.operations if x[0].overloadpacket.__name__ != "copy_"]
        born = [t for *_, found in done for t in tree_leaves(found)]
        places.add(logits.untyped_storage().data_ptr())
        assert places.isdisjoint(t.untyped_storage().data_ptr() for t in born)
    assert len(places) == 1, "one buffer for the logits of all"
    kept.release()
    sample("Llama", decoder=kept)
    assert len(machine.pools) == 2, "a pool whose last graph has gone takes no other"


def test_the_graphs_used_longest_ago_go_first(machine, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    kept, everyone = Decoder("graph"), list(range(6))
    for count, captured in ((6, 1), (5, 2), (6, 2), (4, 3), (6, 3), (5, 4), (4, 5)):
        expected = sample("Llama", everyone[:count])
        assert torch.equal(sample("Llama", everyone[:count], decoder=kept), expected)
        assert len(machine.graphs) == captured and len(kept._graphs) <= 2
    assert len(machine.pools) == 1


def test_rows_that_stop_leave_few_shapes(machine):
    """Whatever a batch began with, it shrinks to powers of two."""
    free = sample("Llama")
    stop = next(t for t in free[:, 2:].flatten().tolist() if 2 <= (free == t).any(1).sum() < 6)
    kept = Decoder("graph")
    for rows in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [5, 4, 3, 2, 1, 0]):
        found = sample("Llama", rows, stop=stop, decoder=kept)
        assert torch.equal(found, sample("Llama", rows, stop=stop))
    sizes = {buffers[0].shape[0] for _, buffers, _ in kept._graphs._steps.values()}
    assert sizes <= {6, 5, 4, 2, 1} and len(sizes) > 2
    assert all(buffers[2].shape[1] == 128 for _, buffers, _ in kept._graphs._steps.values())


@pytest.mark.parametrize("live, size", [(200, 208), (128, 128), (65, 128), (3, 4), (1, 1), (0, 1)])
def test_a_shrunken_batch_is_the_next_power_of_two(monkeypatch, live, size):
    kept = Decoder("static")
    sample("Llama", decoder=kept)
    monkeypatch.setattr(kept.cache, "move", lambda *_: None)
    kept.mask, kept.positions = torch.ones(208, 4), torch.ones(208, 1)
    stay = kept.keep_running(torch.arange(208) >= live)
    assert (208 if stay is None else len(stay)) == size


class Asks(torch.nn.Module):
    """A part of a model that does something in each of its passes."""

    def __init__(self, does):
        super().__init__()
        self.does = does

    def forward(self, x):
        self.does(x)
        return x


@pytest.fixture
def asking(monkeypatch):
    """asking(does) → the Llama whose norm calls does(hidden states) before it goes on."""

    def asking(does):
        norm = tiny("Llama").model.norm
        real = norm.forward
        monkeypatch.setattr(norm, "forward", lambda x: real(Asks(does)(x)))

    return asking


@pytest.mark.parametrize(
    "does", [lambda x: x.sum().item(), lambda x: (x > 0).nonzero()], ids=["item", "nonzero"]
)
def test_a_model_that_waits_for_the_device_goes_on_without_graphs(machine, asking, does):
    """Torch can end such a capture in good order: the waiting is refused before it begins."""
    asking(does)
    expected = sample("Llama")
    kept = Decoder("auto")
    with pytest.warns(UserWarning, match="without CUDA graphs, which this model refused: Runtime"):
        assert torch.equal(sample("Llama", decoder=kept), expected)
    assert machine.in_order() and len(kept._graphs) == 0
    assert len(machine.graphs) == 1 and machine.graphs[0].replays == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and does not try again
        assert torch.equal(sample("Llama", decoder=kept), expected)
    with pytest.raises(graphs.NotCapturable, match="synchronizing"):
        sample("Llama", decoder=Decoder("graph"))
    assert machine.in_order()


@pytest.mark.parametrize("mode", ["auto", "graph"])
def test_a_capture_that_ends_in_an_error_ends_the_run(machine, asking, mode):
    """Torch is left in the middle of it; what it leaves of the streams is put right."""
    asking(lambda x: torch.cuda.synchronize())
    with pytest.raises(SystemExit, match="not permitted when stream is capturing.*--decode eager"):
        sample("Llama", decoder=Decoder(mode))
    assert machine.current is machine.main and machine.debug == 0
    assert machine.capturing is not None, "as in torch"


def test_torch_itself_does_not_come_back_from_a_failed_capture(machine):
    """Why the above is needed: the real torch.cuda.graph around the pretended parts."""
    with (
        pytest.raises(RuntimeError, match="previous error"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        contextlib.suppress(RuntimeError),
    ):
        machine.synchronize()
    assert machine.current is not machine.main
