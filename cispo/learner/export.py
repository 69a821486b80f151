"""The policy's weights on their way out of the ranks: to engines, to model folders.

    whole copy      --views--> buckets | one file                                  rank 0 alone
    rows of ranks   --one bucket gathered after another--> engines | a published file | model-0000k-of-0000n.safetensors

Of a sharded policy every rank calls `publish`, `copy` and the sender's methods; each writes every so-manieth part of a
model folder, so that host memory too holds the ranks' share.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from cispo.files import disk_errors, note_digest, save_tensors, write_json
from cispo.learner.adapters import AdapterExport, AdapterSource
from cispo.learner.parallel import Mesh
from cispo.learner.sharding import ShardedWeights
from cispo.policies.loading import part_file, write_index, write_policy
from cispo.policies.lora import AdaptedPolicy
from cispo.policies.policy import HFConfig, Policy
from cispo.weights.buckets import BUCKET_BYTES, Source, WeightSender
from cispo.weights.publish import publish_pieces, publish_weights


class Export:
    """Exports of one rank's policy."""

    def __init__(self, policy: Policy, mesh: Mesh, dtype: Literal["float32", "bfloat16"], folder: str) -> None:
        """`folder` is the one that the policy was loaded from."""
        self.policy, self.mesh, self.dtype = policy, mesh, dtype
        adapted = isinstance(policy, AdaptedPolicy)
        self.adapter = AdapterExport(policy, folder, getattr(torch, dtype)) if adapted else None
        self.bucket_bytes = BUCKET_BYTES
        self._sender: WeightSender | None = None

    @property
    def sender(self) -> WeightSender:
        """The current weights in buckets, staged in one buffer of a bucket's size."""
        if self._sender is None:
            if self.mesh.shards is None:
                self._sender = WeightSender(self.policy.to_hf(), self.bucket_bytes)
            else:
                source: Source = ShardedWeights(self.policy, self.mesh, getattr(torch, self.dtype))
                if self.adapter is not None:
                    source = AdapterSource(self.adapter.policy, source)
                self._sender = WeightSender(source, self.bucket_bytes)
        return self._sender

    def config(self) -> HFConfig:
        """The config.json that goes with the weights; masters are wider than those."""
        config = self.policy.hf_config()
        return config if self.mesh.shards is None else {**config, "dtype": self.dtype}

    def publish(self, folder: str, version: int) -> str:
        """Writes the weights to a file that engines read, by rank 0; returns its path. Raises UserError."""
        if self.adapter is not None:
            self.adapter.publish(folder, write=self.mesh.rank == 0)
        if self.mesh.shards is None:
            return str(publish_weights(self.policy.to_hf(), folder, version))
        pieces = (piece for _, piece in self.sender.pieces())
        with self.mesh.doing("the gather of weights to publish"):
            return str(publish_pieces(self.sender.source.shapes, pieces, folder, version, write=self.mesh.rank == 0))

    def copy(self) -> Callable[[Path], None]:
        """Copies this rank's part of the model, or the adapter, to the host; the result writes it into a folder.

        The writer leaves digests beside the files. It raises RunError where the disk refuses.
        """
        if self.adapter is not None:
            return self.adapter.copy(self.config(), write=self.mesh.rank == 0)
        return self._copy_whole() if self.mesh.shards is None else self._copy_parts()

    def _copy_whole(self) -> Callable[[Path], None]:
        weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.policy.checkpoint().items()}
        config = self.config()

        def write(folder: Path) -> None:
            with disk_errors(folder):
                write_policy(weights, config, folder)
                note_digest(folder / part_file(0, 1))

        return write

    def _copy_parts(self) -> Callable[[Path], None]:
        mesh, config, second = self.mesh, self.config(), self.policy.second_names()

        def names_of(name: str) -> tuple[str, ...]:
            return name, *second.get(name, ())

        own = {}
        with mesh.doing("the gather of weights to save"):
            for number, piece in self.sender.pieces():
                if number % mesh.world == mesh.rank:
                    own[number] = {n: x.to("cpu", copy=True) for name, x in piece.items() for n in names_of(name)}
        buckets = self.sender.buckets
        sizes = [{n: slot.bytes for slot in bucket.slots for n in names_of(slot.name)} for bucket in buckets]
        if self.policy.kept:
            # Of these every rank knows the shapes, and rank 0 has the values.
            sizes.append({name: tensor.nbytes for name, tensor in self.policy.kept.items()})
            if mesh.rank == 0:
                own[len(sizes) - 1] = dict(self.policy.kept)
        count = len(sizes)

        def write(folder: Path) -> None:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                if mesh.rank == 0:
                    write_json(folder / "config.json", config)
                    if count > 1:
                        write_index(sizes, folder)
                for number, weights in own.items():
                    save_tensors(weights, folder / part_file(number, count))

        return write
