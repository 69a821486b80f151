"""The process of a sharded rank in `test_lora`; it imports little, since it starts twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cispo.learner.adapters import Adapters, whole_adapter
from cispo.learner.critic import Critic
from cispo.learner.learner import Learner
from cispo.policies.lora import AdaptedPolicy
from cispo.policies.policy import Policy
from cispo.recipe.schema import Critic as CriticConfig
from cispo.recipe.schema import Learner as LearnerConfig
from cispo.recipe.schema import Lora
from cispo.types import MicroBatch
from cispo.weights.buckets import WeightReceiver
from cispo.weights.publish import mapped_weights
from tests.test_learner import CISPO

ADAPTERS = Adapters(lora=Lora(rank=3, alpha=5.0), seed=4)


def run_rank(
    rank: int, policy: str, batches: list[list[MicroBatch]], addresses: tuple[str, str], out: str, dtype: str
) -> None:
    """Two updates, a reference, everything that leaves the learner, a third update; then a critic's two updates.

    Rank 0 leaves the tensors in `out`.
    """
    torch.set_num_threads(1)
    mbs, config = batches[rank], LearnerConfig(lr=1e-2, shard=True)
    ends = {"rank": rank, "world": 2, "dtype": dtype}
    learner = Learner(policy, config, adapters=ADAPTERS, address=addresses[0], **ends)  # type: ignore[arg-type]
    for _ in range(2):
        assert learner.update(mbs, CISPO, lr=1e-2).taken
    learner.freeze_reference()
    start = torch.cat(learner.logprobs(mbs))
    learner.start_save(out)
    path = learner.publish(f"{out}/published", 1)
    learner.rank.mesh.sum([torch.zeros(1)])  # rank 0 has written it
    save(dict(mapped_weights(path)), f"{out}/sent-{rank}.safetensors")
    receiver, received = WeightReceiver(torch.device("cpu")), {}
    for number in range(learner.num_buckets()):
        message = learner.stage_bucket(number, "direct", check=True)
        received |= {name: tensor.clone() for name, tensor in receiver.receive(message)}
    save(received, f"{out}/received-{rank}.safetensors")
    assert learner.update(mbs, CISPO, lr=1e-2).taken
    assert learner.saved(wait=True)
    assert torch.equal(torch.cat(learner.logprobs(mbs, reference=True)), start)
    assert not torch.equal(torch.cat(learner.logprobs(mbs)), start)
    save(adapter(learner.policy), f"{out}/after.safetensors", rank)
    learner.rank.mesh.sum([torch.zeros(1)])
    learner.load_reference(out)  # the checkpoint's adapter is that of the reference
    assert torch.equal(torch.cat(learner.logprobs(mbs, reference=True)), start) or dtype == "bfloat16"
    learner.close()
    critic = Critic(policy, CriticConfig(), config, adapters=ADAPTERS, address=addresses[1], **ends)  # type: ignore[arg-type]
    critic.load_backbone(path)
    for _ in range(2):
        assert critic.update(with_values(mbs, critic.values(mbs)), lr=1e-2).taken
    save(adapter(critic.model.backbone), f"{out}/critic.safetensors", rank)
    critic.close()


def with_values(mbs: list[MicroBatch], values: list[Tensor]) -> list[MicroBatch]:
    """Micro-batches with returns that differ from the critic's values."""
    return [
        replace(mb, values=v, returns=v + mb.loss_mask * mb.rollout_logprobs) for mb, v in zip(mbs, values, strict=True)
    ]


def adapter(policy: Policy) -> dict[str, Tensor]:
    assert isinstance(policy, AdaptedPolicy)
    return whole_adapter(policy)


def save(tensors: dict[str, Tensor], file: str, rank: int = 0) -> None:
    if rank == 0:
        Path(file).parent.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
