"""The trainer's weights to a vLLM server, by vLLM's own weight transfer, a bucket at a time.

Three ways, as `engines` of `vllm/distributed/weight_transfer` take them: `file` between processes
of one machine on CPUs, `ipc` on one GPU, which both hold, `nccl` to GPUs of vLLM's own. All ranks
walk through the buckets together, as ZeRO-3 gathers them; rank 0 speaks to the server.
"""

import base64
import contextlib
import ctypes
import functools
import os
import queue
import tempfile
import threading
from collections.abc import Iterator

import torch
from transformers.core_model_loading import revert_weight_conversion

from utils.distributed import process_group
from utils.generation import gpu_handles, weights
from utils.generation.checksum import checksum
from utils.generation.vllm_client import Client, ServerError

SHARED_MEMORY = "/dev/shm"
ALIGNED = 16  # bytes, so that each weight may be viewed in its dtype


def describe(bucket: dict[str, torch.Tensor]) -> dict[str, list]:
    return {
        "names": list(bucket),
        "dtype_names": [str(t.dtype).removeprefix("torch.") for t in bucket.values()],
        "shapes": [list(t.shape) for t in bucket.values()],
    }


class Transfer:
    """One way. Every rank calls every method; `client` is None but on rank 0."""

    def connect(self, client: Client | None) -> None:
        """Once for each server, before the first update."""
        if client is not None:
            client.post("/init_weight_transfer_engine", {"init_info": self.agreed()})

    def agreed(self) -> dict:
        return {}

    def send(self, client: Client | None, bucket: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError


def update(client: Client, info: dict) -> None:
    client.post("/update_weights", {"update_info": info})


class File(Transfer):
    def send(self, client: Client | None, bucket: dict[str, torch.Tensor]) -> None:
        if client is None:
            return
        offsets, size = [], 0
        for tensor in bucket.values():
            offsets.append(size)
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        with file_of(max(size, 1)) as (path, whole):
            for offset, tensor in zip(offsets, bucket.values(), strict=True):
                place = whole[offset : offset + tensor.nbytes].view(tensor.dtype)
                place.view(tensor.shape).copy_(tensor)
            told = {"path": path, "size": len(whole), "offsets": offsets}
            update(client, describe(bucket) | told)


@contextlib.contextmanager
def file_of(size: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(path, its `size` bytes), in shared memory where these fit; gone afterwards for everyone who
    has not mapped it."""
    for folder in (SHARED_MEMORY, tempfile.gettempdir()):
        if not os.path.isdir(folder):
            continue
        handle, path = tempfile.mkstemp(prefix="weights-", dir=folder)
        try:
            # Taken at once: a page that does not fit when it is written to would kill the process.
            os.posix_fallocate(handle, 0, size)
        except OSError:
            os.unlink(path)
            continue
        finally:
            os.close(handle)
        try:
            yield path, torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        finally:
            os.unlink(path)
        return
    raise ServerError(
        f"{size / 2**30:.3g} GiB of weights fit neither {SHARED_MEMORY} nor {tempfile.gettempdir()}"
    )


class CudaIpc(Transfer):
    """A bucket lies on the GPU of each rank, whose vLLM worker maps it."""

    def agreed(self) -> dict:
        return {"packed": True}

    def send(self, client: Client | None, bucket: dict[str, torch.Tensor]) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        packed = torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in bucket.values()])
        handle = gpu_handles.to_json(reduce_tensor(packed)[1])
        torch.cuda.synchronize(packed.device)
        uuid = str(torch.cuda.get_device_properties(packed.device).uuid)
        handles = dict(process_group.gather_objects((uuid, handle)))
        try:
            if client is not None:
                sizes = [t.nbytes for t in bucket.values()]
                update(client, describe(bucket) | {"handles": handles, "tensor_sizes": sizes})
        finally:
            process_group.barrier()  # no rank lets go of its copy before it was read
            del packed
            torch.cuda.ipc_collect()


class Nccl(Transfer):
    """Rank 0 sends to every worker of the server, whose ranks follow its own in a group that is
    theirs alone."""

    device = "cuda"  # the CPU in tests, where gloo takes NCCL's place

    def connect(self, client: Client | None) -> None:
        if client is None:
            return
        from torch.cuda import nccl

        world, unique = 1 + client.world_size(), nccl.unique_id()
        told = {"nccl_unique_id_b64": base64.b64encode(unique).decode(), "packed": False}
        told |= {"rank_offset": 1, "world_size": world}
        device, groups = torch.cuda.current_device(), []

        def join() -> None:
            torch.cuda.set_device(device)  # each thread has its own
            groups.append(nccl.init_rank(world, unique, 0))
            # vLLM's side does the same, to see that the group stands.
            nccl.all_reduce([torch.zeros(1, device=self.device)], comms=groups)
            torch.cuda.synchronize()

        ask = functools.partial(client.post, "/init_weight_transfer_engine", {"init_info": told})
        together(groups, join, ask, client.patience)
        self.groups = groups

    def send(self, client: Client | None, bucket: dict[str, torch.Tensor]) -> None:
        if client is None:
            return
        from torch.cuda import nccl

        device = torch.cuda.current_device()
        torch.cuda.synchronize()  # the bucket is whole before another thread reads it

        def broadcast() -> None:
            torch.cuda.set_device(device)
            for tensor in bucket.values():
                nccl.broadcast([tensor.contiguous()], comms=self.groups)
            torch.cuda.synchronize()

        ask = functools.partial(update, client, describe(bucket))
        together(self.groups, broadcast, ask, client.patience)


def together(groups: list, ours, theirs, seconds: float) -> None:
    """Runs our side of a collective beside theirs, a request that ends by itself. NCCL waits for
    ever for a peer that is gone, and so does all that comes after it on the GPU. So where either
    fails, or ours takes `seconds` more than theirs, `groups` are given up, with a ServerError."""
    ended: queue.SimpleQueue = queue.SimpleQueue()

    def run(side) -> None:
        problem = None
        try:
            side()
        except ServerError as error:
            problem = error
        except Exception as error:  # RuntimeError is NCCL's
            problem = ServerError(f"{type(error).__name__} on the way to vLLM: {error}")
        ended.put((side, problem))

    for side in (ours, theirs):
        threading.Thread(target=run, args=(side,), daemon=True).start()
    first, problem = ended.get()
    if problem is None:
        try:
            _, problem = ended.get(timeout=seconds if first is theirs else None)
        except queue.Empty:
            problem = ServerError(f"NCCL stands still: vLLM was done {seconds:g} s ago")
    if problem is not None:
        for group in groups:
            abort(group)
        raise problem


def abort(group) -> None:
    """Ends what waits on the GPU for a peer of `group`, a communicator of torch.cuda.nccl, which
    has no call for it. Nothing may be asked of the group afterwards."""
    name, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name.restype, pointer.restype = ctypes.c_char_p, ctypes.c_void_p
    capsule = ctypes.py_object(group)
    communicator = ctypes.c_void_p(pointer(capsule, ctypes.c_char_p(name(capsule))))
    # The abort frees the communicator, and the capsule must not do so again.
    ctypes.pythonapi.PyCapsule_SetDestructor(capsule, None)
    ctypes.CDLL("libnccl.so.2").ncclCommAbort(communicator)


TRANSFERS = {"file": File, "ipc": CudaIpc, "nccl": Nccl}


@torch.no_grad()
def send_all(transfer: Transfer, client: Client | None, module, version: str) -> str:
    """Every weight of `module`, which the server calls `version` from then on; what went wrong, or
    nothing. Every rank must call it, and takes part to the end whatever goes wrong on rank 0."""
    problem, sent = "", {}
    try:
        if client is not None:
            # Waits for answers that are under way, and drops keys and values of the old weights.
            client.post("/pause?mode=wait")
            client.post("/start_weight_update")
    except ServerError as error:
        problem = str(error)
    for bucket in buckets_as_saved(module):
        speaks = None if problem else client
        try:
            transfer.send(speaks, bucket)
        except ServerError as error:
            problem = str(error)
        if speaks is not None and not problem:
            sent |= {name: str(checksum(tensor)) for name, tensor in bucket.items()}
    try:
        if client is not None and not problem:
            client.post("/finish_weight_update", {"weight_version": version})
            compare(sent, client.post("/collective_rpc", {"method": "arrived_weights"})["results"])
            client.post("/resume")
    except ServerError as error:
        problem = str(error)
    return problem


def buckets_as_saved(module) -> Iterator[dict[str, torch.Tensor]]:
    """Parameters and kept buffers by their names in a saved folder, which vLLM knows; of a model
    with adapters, with these merged into them."""
    for bucket in weights.merged_buckets(module):
        yield revert_weight_conversion(module, bucket)
    kept = module.state_dict(keep_vars=True).keys()
    buffers = {name: b for name, b in module.named_buffers() if name in kept}
    if buffers:
        yield revert_weight_conversion(module, buffers)


def compare(sent: dict[str, str], workers: list[dict[str, str]]) -> None:
    """ServerError where a worker of the server did not get, bit for bit, what was sent."""
    for number, arrived in enumerate(workers):
        wrong = sorted(n for n in sent.keys() | arrived.keys() if sent.get(n) != arrived.get(n))
        if wrong:
            raise ServerError(
                f"{len(wrong)} of {len(sent)} weights did not arrive at vLLM's worker {number} as "
                f"they were sent (first {wrong[0]})"
            )
