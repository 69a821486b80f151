"""A model split over the ranks by FSDP2: each parameter's rows, built and filled without ever being whole.

    config.json --meta device--> model --shard--> this rank's rows, float32 <--fill-- slices of safetensors files
    rows --all-gather of some layers, compute dtype--> forward and backward --reduce-scatter, sums--> rows' gradients
    rows --ShardedWeights: gather of a bucket--> engines, model folders

FSDP's shards are the float32 masters of the optimizer. A parameter of n rows has ceil(n / ranks) of them on each rank
but the last ones. Three rules keep it exact: forward inputs are not cast (rotary tables would be rounded), gradients
are summed and never averaged, and `reshard` ends every pass without gradient (the root's weights would stay gathered,
and changes would go unseen).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cispo.learner.experts import mark_shares, split_experts
from cispo.learner.memory import units_of
from cispo.learner.parallel import Mesh
from cispo.learner.rows import Rows, WidthShare, expert_range, extent, is_split, own_part, row_range, rows_of
from cispo.ops.collectives import ALL_GATHER
from cispo.policies.loading import WeightSlice, local_folder, policy_without_weights, weight_slices
from cispo.policies.lora import adapt
from cispo.policies.policy import Place, Policy
from cispo.policies.value import ValueModel
from cispo.recipe.schema import Lora
from cispo.weights.buckets import Slot

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

# A second of imports that a rank with a whole copy does without.
_FSDP = "torch.distributed.fsdp"


def sharded_policy(
    folder: str,
    mesh: Mesh,
    dtype: torch.dtype,
    *,
    trained: bool = True,
    lora: Lora | None = None,
    heads: bool = False,
) -> Policy:
    """A folder's policy, split over the ranks, with undefined weights (`fill` and `copy_rows` give them values).

    Its rows are float32 where it is `trained`, else of `dtype` and without gradient; with an adapter that alone is
    trained. It runs in `dtype`. Raises UserError as `load_policy` does.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    policy, exact = _unsplit(folder, dtype, lora, trained=trained, heads=heads)
    shard(policy, mesh, dtype, whole=exact)
    register_fsdp_forward_method(policy, "attend")
    return policy


def _unsplit(
    folder: str, dtype: torch.dtype, lora: Lora | None, *, trained: bool = True, heads: bool = False
) -> tuple[Policy, set[nn.Parameter]]:
    """A policy on the meta device of which everything, only the adapter or nothing is trained, and float32 then.

    Also the parameters that are float32 in a policy of any number format: decays, say.
    """
    policy = policy_without_weights(local_folder(folder), dtype, heads=heads)
    exact = {parameter for parameter in policy.parameters() if parameter.dtype != dtype}
    if not trained:
        policy.requires_grad_(False)
    elif lora is not None:
        policy = adapt(policy, lora, wide(dtype))
    else:
        for parameter in policy.parameters():
            parameter.data = parameter.data.to(wide(dtype))
    return policy, exact


def sharded_value_model(folder: str, mesh: Mesh, dtype: torch.dtype, lora: Lora | None = None) -> ValueModel:
    """A critic on a folder's policy, split over the ranks; its head is zero, and float32 as on a whole copy."""
    policy, exact = _unsplit(folder, dtype, lora)
    with torch.device("meta"):
        model = ValueModel(policy)
    shard(model, mesh, dtype, exact=[model.head], whole=exact)
    fill_from(model.backbone, folder, mesh, dtype)
    for parameter in model.head.parameters():
        rows_of(parameter, mesh).values.zero_()
    return model


def shard(
    model: nn.Module,
    mesh: Mesh,
    dtype: torch.dtype,
    *,
    exact: Sequence[nn.Module] = (),
    whole: Set[nn.Parameter] = frozenset(),
) -> None:
    """Splits a model on the meta device and gives its rows memory with undefined values.

    Each unit of layers, an embedding that is not the head too, the modules in `exact` and the rest are gathered on
    their own; distributed experts are replaced by this rank's share, which is gathered over its own axis. The model
    runs in `dtype`, those in `exact` in their own number format. The parameters in `whole` keep theirs too, inside
    modules that FSDP casts: each rank has all of them, and `Rank` sums their gradients.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    assert mesh.shards is not None, "the mesh has no axis for shards"
    compute = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide(dtype), cast_forward_inputs=False)
    head = next(module for module in model.modules() if isinstance(module, Policy)).lm_head_weight
    experts = split_experts(model, mesh)
    for module in experts:
        fully_shard(module, mesh=mesh.expert_shards, mp_policy=compute)
    # The head is read outside of any module: it stays with the root, which is gathered until the backward pass.
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not head]
    for unit in (*([embedding] for embedding in embeddings), *units_of(model)):
        fully_shard([*unit], mesh=mesh.shards, mp_policy=compute, ignored_params=set(whole))
    for module in exact:
        fully_shard(module, mesh=mesh.shards, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    fully_shard(model, mesh=mesh.shards, mp_policy=compute, ignored_params=set(whole))
    # Nothing changes a layer's output in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in fsdp_modules(model):
        # Sums: no gradient is divided by a number of ranks. gloo has no scaled sum, hence the plain one there.
        module.set_gradient_divide_factor(1.0)
        if mesh.device.type == "cpu":
            module.set_force_sum_reduction_for_comms(True)
    allocate(model, mesh.device)
    mark_shares(experts)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The number format of masters and gradients: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    if _FSDP not in sys.modules:
        return iter(())
    from torch.distributed.fsdp import FSDPModule

    return (module for module in model.modules() if isinstance(module, FSDPModule))


def reshard(model: nn.Module) -> None:
    """Ends a pass without gradient, after which FSDP keeps the last weights gathered and would miss changes.

    Does nothing for a whole copy.
    """
    for module in fsdp_modules(model):
        module.reshard()


def allocate(model: nn.Module, device: torch.device) -> None:
    """Memory for rows and buffers on the meta device, with undefined values; tied parameters stay one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    computed = {n: b for n, b in model.named_buffers() if not b.is_meta}
    model.to_empty(device=device)
    for name, buffer in computed.items():
        module, _, own = name.rpartition(".")
        model.get_submodule(module)._buffers[own] = buffer.to(device)
    for first, *others in names.values():
        for other in others:
            module, _, own = other.rpartition(".")
            model.get_submodule(module)._parameters[own] = model.get_parameter(first)


@torch.no_grad()
def fill(policy: Policy, weights: Iterable[tuple[str, WeightSlice]], mesh: Mesh, dtype: torch.dtype) -> None:
    """Reads this rank's rows of every weight, rounded to `dtype` first; a slice of a file is all that is in memory.

    The files were checked before: names and shapes fit. Tensors that the policy only keeps are rank 0's; others know
    their shapes.
    """
    weights_of = policy.named_weights()
    targets = {name: rows_of(weight, mesh) for name, weight in weights_of.items()}
    rounded = {name for name, weight in weights_of.items() if is_split(weight)}
    policy.kept.clear()
    for name, values in weights:
        if policy.keeps(name):
            kept = (
                values[:] if mesh.rank == 0 else torch.empty(values.get_shape(), dtype=values[:1].dtype, device="meta")
            )
            policy.kept[name] = kept
            continue
        place = policy.place_of(name)
        if place is None:
            continue
        rows = targets[place.parameter]
        if rows.narrow is not None:
            _fill_narrow(rows, rows.narrow, place, values, dtype)
            continue
        start, stop = extent(place, rows.shape)
        low, high = rows.overlap(start, stop)
        if low >= high:
            continue
        width = (stop - start) // values.get_shape()[0]
        part = values[(low - start) // width : (high - start) // width].to(rows.values.device)
        part = part.to(dtype) if place.parameter in rounded else part
        offset = rows.first * rows.width
        rows.values.view(-1)[low - offset : high - offset].copy_(part.reshape(-1))


def _fill_narrow(rows: Rows, share: WidthShare, place: Place, values: WeightSlice, dtype: torch.dtype) -> None:
    """`fill` of a part of the width of this rank's experts, from one expert's weight or from those of all."""
    if place.expert is None:
        part = share.of(values[rows.first : rows.first + len(rows.values)])
        rows.values.copy_(part.to(rows.values.device).to(dtype))
    elif (own := own_part(rows, place)) is not None:
        own.copy_(values[share.of_expert(values.get_shape())].to(own.device).to(dtype))


@torch.no_grad()
def copy_rows(source: Policy, target: Policy, mesh: Mesh) -> None:
    """Copies the rows of one policy into another of the same shape, which may lack heads, rounded to its number
    format."""
    weights = source.named_weights()
    for name, weight in target.named_weights().items():
        rows_of(weight, mesh).values.copy_(rows_of(weights[name], mesh).values)


def fill_from(policy: Policy, folder: str, mesh: Mesh, dtype: torch.dtype) -> None:
    """`fill` from a policy's folder."""
    fill(policy, weight_slices(local_folder(folder)), mesh, dtype)


class _Sent(NamedTuple):
    """A part of a weight that one rank has and all others get."""

    owner: int
    part: Tensor
    place: Tensor
    """The part itself, or where it belongs in the bucket, if it is not consecutive there."""


class ShardedWeights:
    """The weights under checkpoint names, gathered from the ranks a bucket at a time (a `weights.buckets.Source`).

    The collective itself writes a gathered weight where it belongs in the bucket: a rank needs no memory beside it.
    Only a down projection that is cut by expert tensor parallelism arrives in parts and is put together.
    """

    def __init__(self, policy: Policy, mesh: Mesh, dtype: torch.dtype) -> None:
        """`dtype` is that of split parameters in the buckets; those that each rank has whole keep their own."""
        self.mesh, self.device = mesh, mesh.device
        tensors = policy.named_weights()
        weights = {name: rows_of(weight, mesh) for name, weight in tensors.items()}
        split = {name for name, weight in tensors.items() if is_split(weight)}
        self._rows: dict[str, Rows] = {}
        self._places: dict[str, Place] = {}
        self._extents: dict[str, tuple[int, int]] = {}
        self._whole: dict[str, Tensor] = {}
        self.shapes: dict[str, Tensor] = {}
        for name, place in policy.disk_places():
            rows = weights[place.parameter]
            view = place.of(torch.empty(*rows.shape, device="meta"))
            if place.parameter in split:
                self._rows[name], self._places[name] = rows, place
                self._extents[name] = extent(place, rows.shape)
            else:
                self._whole[name] = place.of(rows.values)
            kind = dtype if place.parameter in split else rows.values.dtype
            self.shapes[name] = torch.empty(view.shape, dtype=kind, device="meta")

    def fill(self, slots: Sequence[Slot], buffer: Tensor) -> None:
        """Gathers the slots' weights into `buffer` [bytes] uint8; every rank must call it with the same slots."""
        gathered, sent = list[dist.Work](), list[_Sent]()
        for slot in slots:
            self._gather(slot, slot.of(buffer), gathered, sent)
        for work in (*gathered, *self._exchange(sent)):
            work.wait()
        for part in sent:
            if part.place is not part.part:
                part.place.copy_(part.part)

    def _exchange(self, sent: Sequence[_Sent]) -> list[dist.Work]:
        """Starts all parts on their way as one operation: an owner sends each of its parts to every other rank."""
        own, ranks = self.mesh.rank, range(self.mesh.world)
        moves = [
            dist.P2POp(dist.isend, part, rank) if owner == own else dist.P2POp(dist.irecv, part, owner)
            for owner, part, _ in sent
            for rank in (ranks if owner == own else (own,))
            if rank != owner
        ]
        return dist.batch_isend_irecv(moves) if moves else []

    def _gather(self, slot: Slot, target: Tensor, gathered: list[dist.Work], sent: list[_Sent]) -> None:
        """Fills this rank's part of a slot, and starts the collective of the others' or notes who sends them."""
        if slot.name in self._whole:
            target.copy_(self._whole[slot.name])
            return
        rows, place = self._rows[slot.name], self._places[slot.name]
        if rows.narrow is not None:
            sent += self._narrow_parts(rows, rows.narrow, place, target)
            return
        (start, stop), flat = self._extents[slot.name], target.view(-1)
        low, high = rows.overlap(start, stop)
        offset = rows.first * rows.width
        if low < high:
            flat[low - start : high - start].copy_(rows.values.view(-1)[low - offset : high - offset])
        count, world = rows.shape[0], self.mesh.world
        if rows.share is None and stop - start == count * rows.width and count % world == 0:
            work = ALL_GATHER(flat, flat[low - start : high - start], async_op=True)
            assert work is not None
            gathered.append(work)
            return
        # One expert's part, or rows that the ranks do not divide: each owner sends its own.
        for rank in range(world):
            held = row_range(count, rank, world) if rows.share is None else expert_range(count, self.mesh, rank)
            first, last = (row * rows.width for row in held)
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                part = flat[begin - start : end - start]
                sent.append(_Sent(rank, part, part))

    def _narrow_parts(self, rows: Rows, share: WidthShare, place: Place, target: Tensor) -> Iterator[_Sent]:
        """One expert's projection from the ranks that hold parts of its width."""
        assert place.expert is not None
        own = own_part(rows, place)
        for rank in range(self.mesh.world):
            first, last = expert_range(rows.shape[0], self.mesh, rank)
            if not first <= place.expert < last:
                continue
            part = target[share.of_expert(target.shape, self.mesh.of_rank(rank).etp_rank)]
            values = part if part.is_contiguous() else torch.empty_like(part, memory_format=torch.contiguous_format)
            if rank == self.mesh.rank:
                assert own is not None
                values.copy_(own)
            yield _Sent(rank, values, part)
