"""The attention that a policy's layers call, and its implementations on packed documents.

    Attention --softmax---------> causal softmax attention
              --sparse_softmax--> the same over the keys that an indexer selects (`ops.sparse_attention`)
              --recurrent-------> a kind of linear attention, a short convolution (`ops.recurrent`)

    Documents          packed documents, nothing shared
    SharedPrompts      packed documents, with prompts in common that pass the layers once
    SplitDocuments     documents of which other ranks have parts (`split_documents`)
    cache.Cache        a sampler's rows; its prompts pass as Documents

Softmax attention on packed documents has two forms:

    varlen    flash attention's own for packed documents, nothing padded: bfloat16 and float16 on a GPU
    padded    documents of similar length in one batch, padded on the right: every other device and dtype; on a CPU as
              plain products while the probabilities are few (`ops.product_attention`)

Sparse attention is padded on every device; without more tokens than it selects it is the other one. Values may be of a
width of their own: kernels that want one width get them padded with zeros.

The index tensors of a form are computed once a forward pass, for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.ops.expansion import Expansion
from cispo.ops.product_attention import Batch, Padding, product_attention
from cispo.ops.recurrent import RecurrentOp
from cispo.ops.sparse_attention import Index, sparse_attention

# Probabilities of a layer that are kept for the gradient at most: 64 MiB of float32.
_KEPT_PROBABILITIES = 1 << 24

AttentionForm = Literal["varlen", "padded"]


class Attention(Protocol):
    """Which tokens those of one forward pass see: the earlier ones of a packed document, or of a row of a cache.

    Layers call in the same order in every pass, which is how a cache tells them apart.
    """

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Causal softmax attention, [T, H, E]: q [T, H, D], k [T, K, D], v [T, K, E]; scale 1 / sqrt(D) where None."""
        ...

    def sparse_softmax(self, q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float | None = None) -> Tensor:
        """`softmax` over the `index.top_k` keys of the highest index scores; equal scores: lowest position first."""
        ...

    def recurrent(self, op: RecurrentOp, *inputs: Tensor) -> Tensor:
        """The outputs of `op`, a row a token: the first `op.token_inputs` inputs are [T, ...]."""
        ...


@runtime_checkable
class ReadsLatents(Protocol):
    """An `Attention` that takes latents instead of keys and values: the smaller message, or the smaller cache."""

    def latent_softmax(
        self,
        q: Tensor,
        latents: Sequence[Tensor],
        expand: Expansion,
        scale: float | None = None,
        index: Index | None = None,
    ) -> Tensor:
        """`softmax`, `sparse_softmax` with an index, over the keys and values that `expand` makes of two latents."""
        ...


def latent_attention(
    attention: Attention,
    q: Tensor,
    latents: Sequence[Tensor],
    expand: Expansion,
    scale: float | None = None,
    index: Index | None = None,
) -> Tensor:
    """Attention over the keys and values of latents, [T, H, E], expanded before any form of it but `ReadsLatents`."""
    if isinstance(attention, ReadsLatents):
        return attention.latent_softmax(q, latents, expand, scale, index)
    k, v = expand(*latents)
    return attention.softmax(q, k, v, scale) if index is None else attention.sparse_softmax(q, k, v, index, scale)


class Documents:
    """The documents of a pack: made once for all layers, so that lengths are read from a GPU once at most.

    cu_seqlens [S + 1] int32, documents may be empty. A given `max_seqlen` saves reading the longest one's length.
    """

    def __init__(self, cu_seqlens: Tensor, tokens: int, max_seqlen: int | None = None) -> None:
        self.cu_seqlens, self.tokens = cu_seqlens, tokens
        self._max_seqlen = max_seqlen

    @cached_property
    def max_seqlen(self) -> int:
        """Tokens of the longest document, or a bound on it."""
        return int(self.cu_seqlens.diff().max()) if self._max_seqlen is None else self._max_seqlen

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        return causal_attention(q, k, v, self, scale)

    def sparse_softmax(self, q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float | None = None) -> Tensor:
        if not len(q) or self.max_seqlen <= index.top_k:
            return self.softmax(q, k, v, scale)
        return sparse_attention(q, k, v, index, self.padding, scale)

    def recurrent(self, op: RecurrentOp, *inputs: Tensor) -> Tensor:
        return op.packed(*inputs, self.cu_seqlens)[0]

    @cached_property
    def padding(self) -> Padding:
        none = torch.zeros(len(self.cu_seqlens) - 1, dtype=torch.long, device=self.cu_seqlens.device)
        return self.padding_without(none)

    def padding_without(self, skips: Tensor) -> Padding:
        """The documents as padded batches, without the queries of the first `skips[i]` tokens of document i, [S]."""
        cu_seqlens = self.cu_seqlens.long()
        lengths, starts = cu_seqlens.diff(), cu_seqlens[:-1]
        batches = []
        places = torch.empty(self.tokens, dtype=torch.long, device=lengths.device)
        before = 0
        for documents in _similar(lengths, lengths - skips):
            steps = torch.arange(int(lengths[documents].max()), device=lengths.device)
            last = lengths[documents, None] - 1
            rows = starts[documents, None] + torch.minimum(steps, last)
            batch = Batch(rows, int(skips[documents].min()))
            batches.append(batch)
            asked = (steps >= skips[documents, None]) & (steps <= last)
            inside = asked[:, batch.skip :].flatten().nonzero()[:, 0]
            places[batch.queries.flatten()[inside]] = before + inside
            before += batch.queries.numel()
        return Padding(batches, places)


class SharedPrompts:
    """Packed documents with prompts in common, which pass the layers once: everything but attention is shared.

    The C distinct tokens pass through the layers; attention sees all T, laid out as documents.
    """

    def __init__(self, documents: Documents, unique_index: Tensor, inverse: Tensor) -> None:
        """unique_index [C] int64: one place of each distinct token among the T; inverse [T] int64: the distinct token
        that each of the T equals."""
        self.documents, self.unique_index, self.inverse = documents, unique_index, inverse

    @cached_property
    def padding(self) -> Padding:
        """In terms of the C tokens: those that a document shares with an earlier one are among its keys alone."""
        starts = self.documents.cu_seqlens.long()
        own = torch.zeros(len(self.inverse) + 1, dtype=torch.long, device=starts.device)
        own[self.unique_index + 1] = 1
        skips = starts.diff() - own.cumsum(0)[starts].diff()
        whole = self.documents.padding_without(skips)
        batches = [Batch(self.inverse[batch.rows], batch.skip) for batch in whole.batches]
        return Padding(batches, whole.places.index_select(0, self.unique_index), shared=True)

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        if choose_form(q, v) == "padded" and _few(q, self.padding):
            return product_attention(q, k, v, self.padding, scale)
        q, k, v = (x.index_select(0, self.inverse) for x in (q, k, v))
        return self.documents.softmax(q, k, v, scale).index_select(0, self.unique_index)

    def sparse_softmax(self, q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float | None = None) -> Tensor:
        if not len(q) or self.documents.max_seqlen <= index.top_k:
            return self.softmax(q, k, v, scale)
        return sparse_attention(q, k, v, index, self.padding, scale)

    def recurrent(self, op: RecurrentOp, *inputs: Tensor) -> Tensor:
        tokens = [x.index_select(0, self.inverse) for x in inputs[: op.token_inputs]]
        return self.documents.recurrent(op, *tokens, *inputs[op.token_inputs :]).index_select(0, self.unique_index)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    scale: float | None = None,
    form: AttentionForm | None = None,
) -> Tensor:
    """Causal softmax attention inside each document, [T, H, E]; nothing crosses from one document to another.

    q [T, H, D], k [T, K, D], v [T, K, E] with H a multiple of K (arXiv 2305.13245); scale is 1 / sqrt(D) where None.
    Tests name the `form`.
    """
    if not len(q):
        return q.new_zeros(*q.shape[:2], v.shape[-1])
    if (form or choose_form(q, v)) == "varlen":
        # Kernels swap heads and queries where the bound is 1, and then take no empty documents: 2 is a bound too.
        max_seqlen = max(documents.max_seqlen, 2)
        starts = documents.cu_seqlens
        # `torch.nn.attention.varlen` wraps this operation, but its own arguments change from release to release.
        return torch.ops.aten._flash_attention_forward(
            q, k, widened(v, q), starts, starts, max_seqlen, max_seqlen, 0.0, True, False, scale=scale
        )[0][..., : v.shape[-1]]
    padding = documents.padding
    if _few(q, padding):
        return product_attention(q, k, v, padding, scale)
    # The causal mask alone keeps out the padding behind a document's end.
    outputs = []
    for batch in padding.batches:
        padded = [x.index_select(0, batch.rows.flatten()).unflatten(0, batch.rows.shape) for x in (q, k, v)]
        attended = _attend(padded[0], padded[1], widened(padded[2], q), scale)
        outputs.append(attended[..., : v.shape[-1]].flatten(0, 1))
    return torch.cat(outputs).index_select(0, padding.places)


def _few(q: Tensor, padding: Padding) -> bool:
    """Whether `product_attention` runs: exact dtypes on a CPU, and few enough probabilities to keep."""
    exact = q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)
    return exact and q.shape[1] * padding.probabilities <= _KEPT_PROBABILITIES


def choose_form(q: Tensor, v: Tensor) -> AttentionForm:
    """varlen where flash attention takes the tensors."""
    half, width = q.dtype in (torch.bfloat16, torch.float16), q.shape[-1]
    suited = q.is_cuda and half and width % 8 == 0 and v.shape[-1] <= width <= 256
    return "varlen" if suited and _has_flash(q.device) else "padded"


def widened(v: Tensor, q: Tensor) -> Tensor:
    """Values narrower than q's heads with zeros behind them, up to that width; others as they are."""
    missing = q.shape[-1] - v.shape[-1]
    return F.pad(v, (0, missing)) if missing > 0 else v


@lru_cache
def _has_flash(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _similar(lengths: Tensor, queries: Tensor) -> list[Tensor]:
    """Documents in groups in which lengths are within a factor of two, and queries too: padding at most doubles them.

    Documents without queries are in none.
    """
    kinds = torch.stack([lengths, queries], 1).clamp(min=1).double().log2().floor().long()
    kinds[queries <= 0] = -1
    found, kind = torch.unique(kinds, dim=0, return_inverse=True)
    return [(kind == number).nonzero()[:, 0] for number, (low, _) in enumerate(found.tolist()) if low >= 0][::-1]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Causal attention of a padded batch, [documents, width, heads, D] in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda:
        # In float32 no kernel for a GPU groups heads: torch would fall back to holding all scores.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)
