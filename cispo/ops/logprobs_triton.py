"""Log-probabilities and both gradients of the LM head on a GPU: three matrix products and one pass over the logits.

    chunk of rows x slice of vocabulary     logits  = hidden @ weight_slice.T        float32, lives for one slice
                                            weights = exp(logits - c), Z, U          one read, bfloat16 written
    chunk of rows x vocabulary              weights[target] -= Z                     then -Z d logprob / d logits
                                            scale   = -(d loss / d logprob) / Z
                                            d hidden  = scale * (weights @ weight)
                                            d weight += weights.T @ (scale * hidden)

A softmax needs its normaliser before it can be written, hence a second pass over the logits; unnormalised weights do
not, and the missing factor goes into the rows of `hidden` and `d hidden`, a hundredth of the size. c is the largest
logit of the row's first slice; should a later one exceed it by `_RANGE` nats, c moves and `close_kernel` rescales that
row.
Z = sum of weights, U = sum of weights * (logit - c): logprob = logit - c - log Z, entropy = log Z - U / Z.
"""

# pyright: reportIndexIssue=false
# A kernel is launched as kernel[grid](...); without Triton the checker sees a plain function.

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

# exp(40) and its sums stay far inside float32 and bfloat16, and entropy loses less than 1e-5 to cancellation.
_RANGE = tl.constexpr(40.0)


@triton.jit
def slice_kernel(
    logits, weights, targets, reference, references, normaliser, moment, target_logit,
    first, width, slices, index, weights_row, inverse_temperature, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of one slice: weights [rows, vocabulary] (None: not kept) and the running c, Z, U and target logit."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, BLOCK)
    inside = entry < width
    x = tl.load(logits + row * width + entry, mask=inside, other=float("-inf")) * inverse_temperature
    largest = tl.max(x, 0)
    c = largest
    if not FIRST:
        old = tl.load(reference + row)
        c = tl.where(largest > old + _RANGE, largest, old)
    weight = tl.exp(x - c)
    z = tl.sum(weight, 0)
    u = tl.sum(weight * tl.where(inside, x - c, 0.0), 0)
    if not FIRST:
        faded = tl.exp(old - c)
        earlier = tl.load(normaliser + row)
        z += earlier * faded
        u += (tl.load(moment + row) + (old - c) * earlier) * faded
    tl.store(reference + row, c)
    tl.store(references + row * slices + index, c)
    tl.store(normaliser + row, z)
    tl.store(moment + row, u)
    if weights is not None:
        place = weights + row * weights_row + first + entry
        tl.store(place, weight.to(weights.dtype.element_ty), mask=inside)
    target = tl.load(targets + row) - first
    if (target >= 0) & (target < width):
        tl.store(target_logit + row, tl.load(logits + row * width + target) * inverse_temperature)


@triton.jit
def close_kernel(
    weights, targets, reference, references, normaliser, moment, target_logit, logprobs, entropy,
    vocabulary, slices, width, weights_row, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its log-probability and entropy; weights of slices seen before c moved are rescaled, Z is subtracted."""
    row = tl.program_id(0).to(tl.int64)
    c, z = tl.load(reference + row), tl.load(normaliser + row)
    log_z = tl.log(z)
    distance = tl.load(target_logit + row) - c
    tl.store(logprobs + row, distance - log_z)
    tl.store(entropy + row, log_z - tl.load(moment + row) / z)
    if weights is not None:
        place = weights + row * weights_row
        for index in range(0, slices):
            then = tl.load(references + row * slices + index)
            if then != c:
                entry = index * width + tl.arange(0, BLOCK)
                inside = entry < vocabulary
                old = tl.load(place + entry, mask=inside, other=0.0).to(tl.float32)
                tl.store(place + entry, (old * tl.exp(then - c)).to(weights.dtype.element_ty), mask=inside)
        # The rescaled slice may hold the target, and other threads wrote it.
        tl.debug_barrier()
        tl.store(place + tl.load(targets + row), (tl.exp(distance) - z).to(weights.dtype.element_ty))


@triton.jit
def scale_kernel(x, factor, count, BLOCK: tl.constexpr):
    """x *= factor, without touching x where the factor is one, as it is in a plain `loss.backward()`."""
    by = tl.load(factor)
    if by != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.load(x + place, mask=place < count, other=0.0).to(tl.float32) * by
        tl.store(x + place, scaled.to(x.dtype.element_ty), mask=place < count)


# Vocabulary entries of one product.
_SLICE = 8192
# Memory for the weights of one chunk of rows, at most.
_CHUNK_BYTES = 640 << 20


class TritonHead:
    """The LM head for `logprobs`' loops: `forward` a chunk of rows, then `gradients` of the same chunk.

    Both operands bfloat16: products of bfloat16 with float32 sums and results, except that d weight is rounded to
    bfloat16 after every chunk (there are few). Otherwise true float32 throughout.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
        narrow = hidden.dtype == weight.dtype == torch.bfloat16
        self.dtype = torch.bfloat16 if narrow else torch.float32
        self.hidden, self.weight = hidden, weight.to(self.dtype)
        self.targets, self.temperature = targets, temperature
        self.grad_weight: Tensor | None = None
        self.kept = self.normaliser = hidden.new_empty(0)

    @staticmethod
    def chunk_rows(rows: int, weight: Tensor) -> int:
        """Rows a chunk: as equal as can be, multiples of 128, within the budget."""
        most = max(128, _CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
        rows = max(1, rows)
        chunks = triton.cdiv(rows, most)
        return triton.cdiv(triton.cdiv(rows, chunks), 128) * 128

    def forward(self, part: slice, keep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability, entropy and log-sum-exp of the rows; with `keep` the weights stay for `gradients`."""
        hidden, targets = self.hidden[part].to(self.dtype), self.targets[part]
        rows, vocabulary = len(hidden), len(self.weight)
        slices = triton.cdiv(vocabulary, _SLICE)
        sums = torch.empty(6, rows, dtype=torch.float32, device=hidden.device)
        reference, moment, target_logit, logprobs, entropy, normaliser = sums
        references = sums.new_empty(rows, slices)
        kept = self._keep(rows) if keep else None
        stride = 0 if kept is None else kept.stride(0)
        block = triton.next_power_of_2(min(_SLICE, vocabulary))
        for index, first in enumerate(range(0, vocabulary, _SLICE)):
            logits = _product(hidden, self.weight[first : first + _SLICE].T)
            slice_kernel[(rows,)](
                logits, kept, targets, reference, references, normaliser, moment, target_logit,
                first, logits.shape[1], slices, index, stride, 1 / self.temperature,
                FIRST=index == 0, BLOCK=block, num_warps=8,
            )  # fmt: skip
            del logits  # before the next one is made: they take turns in the same memory
        close_kernel[(rows,)](
            kept, targets, reference, references, normaliser, moment, target_logit, logprobs, entropy,
            vocabulary, slices, _SLICE, stride, BLOCK=block, num_warps=8,
        )  # fmt: skip
        self.normaliser = normaliser
        return logprobs, entropy, target_logit - logprobs

    def recall(self, part: slice, normaliser: Tensor) -> None:
        """Prepares `gradients`; weights relative to the `normaliser` would come out the same and no sooner."""
        self.forward(part, keep=True)

    def gradients(self, part: slice, grad: Tensor, hidden: bool, weight: bool) -> Tensor | None:
        """d hidden of the rows, given d logprobs, if `hidden`; adds to `grad_weight` if `weight`."""
        kept = self.kept[: len(grad), : len(self.weight)]
        scale = (-grad / (self.normaliser * self.temperature))[:, None]
        rows = self.hidden[part]
        if weight:
            scaled = (rows * scale).to(self.dtype)
            fresh = self.grad_weight is None
            if self.grad_weight is None:
                self.grad_weight = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
            with _true_float32(self.dtype, rows.device):
                self.grad_weight.addmm_(kept.T, scaled, beta=0 if fresh else 1)
        return (_product(kept, self.weight) * scale).to(rows.dtype) if hidden else None

    @staticmethod
    def scale_(gradient: Tensor, factor: Tensor) -> None:
        assert gradient.is_contiguous()
        if count := gradient.numel():
            scale_kernel[(triton.cdiv(count, 4096),)](gradient, factor, count, BLOCK=4096)

    def _keep(self, rows: int) -> Tensor:
        """Memory for the weights; rows start at multiples of 128 bytes: products of odd vocabularies would crawl."""
        if len(self.kept) < rows:
            stride = triton.cdiv(len(self.weight), 64) * 64
            self.kept = torch.empty(rows, stride, dtype=self.dtype, device=self.hidden.device)
        return self.kept[:rows]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32: exact products and float32 sums for every dtype of the operands."""
    if a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    with _true_float32(a.dtype, a.device):
        return a @ b


@contextmanager
def _true_float32(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """float32 products in float32, also where the program has allowed TF32."""
    if dtype != torch.float32 or device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before
