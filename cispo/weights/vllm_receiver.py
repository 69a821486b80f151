"""Weights enter the engine: a transfer engine in vLLM's worker that copies files and buckets into the model.

VLLMEngine.receive_weights -> vLLM's update_weights({"message": ...}) -> Transfer.receive_weights -> load_weights
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from cispo.weights.buckets import WeightReceiver
from cispo.weights.publish import FileMessage, WeightMessage, mapped_weights

if TYPE_CHECKING:
    from vllm.config import VllmConfig, WeightTransferConfig

TRANSFER_BACKEND = "cispo"
"""Name of `Transfer` in vLLM's registry of weight transfer engines."""


@cache
def register_transfer_backend() -> None:
    """Adds `Transfer` to vLLM's registry under TRANSFER_BACKEND; a second call does nothing.

    Imports vLLM, so it is called only in the process of an engine.
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

        def __init__(
            self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
        ) -> None:
            super().__init__(config, vllm_config, device, model)
            self.receiver = WeightReceiver(self.device)
            self.loaded: set[str] = set()
            """Parameters that have arrived in this update."""

        def init_transfer_engine(self, init_info: GroupInfo) -> None:
            rank = init_info.first_rank + get_tensor_model_parallel_rank()
            self.receiver.join_group(init_info.address, rank, init_info.world)

        def start_weight_update(self) -> None:
            self.loaded = set()

        def receive_weights(self, update_info: UpdateInfo) -> None:
            message = update_info.message
            model: Any = self.model  # vLLM declares an nn.Module; its models have load_weights
            from_file = isinstance(message, FileMessage)
            weights = mapped_weights(message.path) if from_file else self.receiver.receive(message)
            with torch.no_grad():
                self.loaded |= model.load_weights(weights)

        def finish_weight_update(self) -> None:
            # Forgotten even where some are missing: a retry sends all again, so that they are of one version.
            loaded, self.loaded = self.loaded, set()
            missing = {name for name, _ in self.model.named_parameters()} - loaded
            assert not missing, f"the weights lack {min(missing)} and {len(missing) - 1} more parameters"

        def shutdown(self) -> None:
            self.receiver.close()

    WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, Transfer)
