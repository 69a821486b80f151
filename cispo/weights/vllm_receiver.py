"""The receiving side of a weight update inside vLLM: a transfer engine that copies files and buckets into the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from cispo.weights.buckets import WeightReceiver
from cispo.weights.publish import FileMessage, WeightMessage, mapped_weights

TRANSFER_BACKEND = "cispo"
"""The name of our receiving side in vLLM's registry of weight transfer engines."""


@cache
def register_transfer_backend() -> None:
    """Adds our receiving side to vLLM's registry under TRANSFER_BACKEND; a second call does nothing.

    Imports vLLM: only for the process that runs an engine.
    """
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    @dataclass
    class GroupInfo(WeightTransferInitInfo):
        address: str
        first_rank: int
        world: int

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        message: WeightMessage

    class Transfer(WeightTransferEngine[GroupInfo, UpdateInfo]):
        """Copies files and buckets into the model's parameters, in place."""

        init_info_cls = GroupInfo
        update_info_cls = UpdateInfo

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.receiver = WeightReceiver(self.device)
            self.loaded: set[str] = set()

        def init_transfer_engine(self, init_info: GroupInfo) -> None:
            rank = init_info.first_rank + get_tensor_model_parallel_rank()
            self.receiver.join_group(init_info.address, rank, init_info.world)

        def start_weight_update(self) -> None:
            self.loaded = set()

        def receive_weights(self, update_info: UpdateInfo) -> None:
            message = update_info.message
            model: Any = self.model
            from_file = isinstance(message, FileMessage)
            weights = mapped_weights(message.path) if from_file else self.receiver.receive(message)
            with torch.no_grad():
                self.loaded |= model.load_weights(weights)

        def finish_weight_update(self) -> None:
            # Forgotten also where some are missing: then all must come again, for one version's weights are wanted.
            loaded, self.loaded = self.loaded, set()
            missing = {name for name, _ in self.model.named_parameters()} - loaded
            assert not missing, f"the weights lack {min(missing)} and {len(missing) - 1} more parameters"

        def shutdown(self) -> None:
            self.receiver.close()

    WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, Transfer)
