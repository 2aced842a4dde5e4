"""What runs in vLLM's own environment: its server, with the ways by which our weights reach it.

`utils/generation/vllm_server.py` starts this file there. It imports vLLM and torch only, so that no
package of ours has to fit vLLM's pins. Written for vLLM 0.32.
"""

import ctypes
import os
import secrets
import signal
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from utils.generation.checksum import checksum
from utils.generation.gpu_handles import from_json

TOKEN = "ROLLOUT_TOKEN"  # environment variable: whoever asks anything must know it
PR_SET_PDEATHSIG = 1


class Counted:
    """Before a transfer engine: keeps a checksum of each weight that it hands to the model."""

    def start_weight_update(self) -> None:
        self.arrived: dict[str, int] = {}
        super().start_weight_update()

    def receive_weights(self, update_info) -> None:
        model = self.model

        def load(weights):
            weights = list(weights)
            self.arrived |= {name: checksum(weight) for name, weight in weights}
            return model.load_weights(weights)

        self.model = SimpleNamespace(load_weights=load)
        try:
            super().receive_weights(update_info)
        finally:
            self.model = model


@dataclass
class NoInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on before the first update."""


@dataclass
class FileInfo(WeightTransferUpdateInfo):
    """A file with weights one behind the other, each from its offset on. In bytes."""

    path: str
    size: int
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]


class FileEngine(IPCWeightTransferEngine):
    """Weights in a file that both processes map, in shared memory where there is room: for CPUs."""

    init_info_cls, update_info_cls = NoInfo, FileInfo

    def init_transfer_engine(self, init_info: NoInfo) -> None:
        pass

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, info: FileInfo) -> None:
        # A mapping of its own for each file, which lives as long as the tensors in it: vLLM keeps
        # some until their layer is complete, which may be after the next file has come.
        whole = torch.from_file(info.path, shared=True, size=info.size, dtype=torch.uint8)
        weights = []
        for name, dtype, shape, offset in zip(
            info.names, info.dtype_names, info.shapes, info.offsets, strict=True
        ):
            empty = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            part = whole[offset : offset + empty.nbytes]
            weights.append((name, part.view(empty.dtype).view(shape)))
        self.model.load_weights(weights)

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        # vLLM multiplies by a copy that oneDNN has packed. It packs anew what was loaded; a head
        # that is tied to the embeddings is not, and would stay the old one.
        for layer in self.model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)


@dataclass
class HandleInfo(WeightTransferUpdateInfo):
    """Weights one behind the other in GPU memory; its handle, for the GPU of each worker."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    tensor_sizes: list[int]  # bytes
    handles: dict[str, list]  # by the GPU's UUID

    @property
    def ipc_handles(self) -> dict[str, tuple]:
        return {uuid: from_json(said) for uuid, said in self.handles.items()}


class HandleEngine(IPCWeightTransferEngine):
    """vLLM's own, but for the form in which the handles come."""

    update_info_cls = HandleInfo


for name, engine in (
    ("counted_file", FileEngine),
    ("counted_ipc", HandleEngine),
    ("counted_nccl", NCCLWeightTransferEngine),
):
    if name not in WeightTransferEngineFactory._registry:
        counted = type(f"Counted{engine.__name__}", (Counted, engine), {})
        WeightTransferEngineFactory.register_engine(name, counted)


class Extension:
    """Mixed into vLLM's worker: what may be called by /collective_rpc."""

    def arrived_weights(self) -> dict[str, str]:
        """Checksums of the last update, by name. As text: JSON of others has no whole 64 bits."""
        return {name: str(number) for name, number in self.weight_transfer_engine.arrived.items()}


async def only_with_token(request, call_next):
    """Nobody else on this machine may ask for answers or change weights."""
    from fastapi.responses import JSONResponse

    given = request.headers.get("authorization", "")
    if not secrets.compare_digest(given.encode(), f"Bearer {os.environ[TOKEN]}".encode()):
        return JSONResponse({"error": f"not the server's {TOKEN}"}, status_code=401)
    return await call_next(request)


def main() -> None:
    # The server ends with the process that started it, however that one ends.
    if os.environ.get("ROLLOUT_PARENT"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(os.environ["ROLLOUT_PARENT"]):
            return
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    main()
