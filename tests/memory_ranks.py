"""The process of a sharded rank in `test_memory`; it imports little, since it starts twice."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from cispo.algorithms.losses import Cispo
from cispo.algorithms.objective import Objective
from cispo.learner import learner as learner_module
from cispo.learner import parallel
from cispo.learner.adapters import Adapters
from cispo.learner.learner import Learner
from cispo.learner.sharding import rows_of
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.recipe.schema import Lora
from cispo.types import MicroBatch

CISPO = Objective(loss=Cispo(ratio_max=5.0))
LR = 1e-2
ADAPTERS = Adapters(lora=Lora(rank=3, alpha=5.0), seed=4)

SETTINGS: dict[str, tuple[bool, dict[str, Any]]] = {
    "plain": (False, {}),
    "offloaded": (False, {"offload": ["optimizer", "activations", "reference"]}),
    "adapter": (True, {}),
    "adapter offloaded": (True, {"offload": ["optimizer", "activations"]}),
}
"""Name -> (whether an adapter is trained, keys of the learner)."""


def weights_of(learner: Learner) -> dict[str, Tensor]:
    """This rank's rows of what is trained."""
    optimizer, mesh = learner.rank.optimizer, learner.rank.mesh
    named = zip(optimizer.names, optimizer.parameters, strict=True)
    return {name: rows_of(parameter, mesh).values.clone() for name, parameter in named}


def run_rank(rank: int, policy: str, batches: list[list[MicroBatch]], address: str, out: str) -> None:
    """Leaves in `out` a checkpoint with moments in 8 bits, and in a file of this rank: rows after two updates and
    log-probabilities of reference and policy by setting; rows one update after the checkpoint, undisturbed and resumed.
    """
    torch.set_num_threads(1)
    mbs = batches[rank]
    mesh = parallel.join(rank=rank, world=2, device=torch.device("cpu"), address=address, shard=True)

    def learner(folder: str, *, lora: bool = False, **keys: Any) -> Learner:
        config = LearnerConfig(shard=True, ranks=2, gradient_checkpointing=True, **keys)
        adapters = ADAPTERS if lora else None
        return Learner(folder, config, dtype="bfloat16", adapters=adapters, rank=rank, world=2)

    results: dict[str, object] = {}
    # One process group serves all learners of a process.
    with mock.patch.object(learner_module, "join", lambda **_: mesh):
        for name, (lora, keys) in SETTINGS.items():
            own = learner(policy, lora=lora, **keys)
            own.freeze_reference()
            for _ in range(2):
                assert own.update(mbs, CISPO, lr=LR).taken
            passes = [torch.cat(own.logprobs(mbs, reference=reference)) for reference in (True, False, True)]
            results[name] = weights_of(own), passes
        low = learner(policy, optimizer="adamw8bit")
        for _ in range(2):
            assert low.update(mbs, CISPO, lr=LR).taken
        low.start_save(out)
        assert low.saved(wait=True)
        dist.barrier()
        assert low.update(mbs, CISPO, lr=LR).taken
        resumed = learner(out, optimizer="adamw8bit", offload=["optimizer"])
        resumed.restore(out)
        assert resumed.update(mbs, CISPO, lr=LR).taken
    results["low"], results["low, resumed"] = weights_of(low), weights_of(resumed)
    torch.save(results, f"{out}/rank{rank}")
    dist.barrier()
    dist.destroy_process_group()
