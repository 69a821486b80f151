"""Values of a width of their own, and sparse attention: hand-worked numbers, ties, every form of the seam."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from cispo.ops.sparse_attention import Index, index_scores, select
from cispo.policies import attention
from cispo.policies.attention import Attention, Documents, SharedPrompts
from cispo.policies.cache import Cache
from cispo.policies.policy import Policy, PolicyOutput

# Products of up to 130 keys in float64.
FLOAT64 = 1e-13

RAGGED = [5, 0, 1, 130, 64, 17]
HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 12, 7
INDEX_HEADS, INDEX_WIDTH = 3, 4


def test_scores_and_ties_by_hand() -> None:
    """Two heads, weights 1 and 1/2, no scale: positions 2 and 3 are tied at 0, and the lower one is taken."""
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    keys = torch.tensor([[2.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [-2.0, -3.0]])
    scores = index_scores(queries, keys, torch.tensor([[1.0, 0.5]]))
    assert scores.tolist() == [[2.0, 0.5, 0.0, 0.0]]
    seen = torch.ones(4, dtype=torch.bool)
    assert select(scores, seen, 3).tolist() == [[True, True, True, False]]
    assert select(scores, seen, 1).tolist() == [[True, False, False, False]]
    assert select(scores, seen, 9).tolist() == [[True] * 4]
    assert select(scores, torch.tensor([False, True, True, True]), 2).tolist() == [[False, True, True, False]]


def test_zeros_of_either_sign_are_tied() -> None:
    """A negative weight makes the zero of a cut head negative."""
    scores = index_scores(torch.ones(1, 1, 1), torch.tensor([[-1.0], [-2.0], [-3.0], [1.0]]), torch.tensor([[-1.0]]))
    assert scores.tolist() == [[0.0, 0.0, 0.0, -1.0]] and not torch.signbit(scores[0, :3]).any()
    assert select(scores, torch.ones(4, dtype=torch.bool), 2).tolist() == [[True, True, False, False]]


def test_scores_are_float32_at_least() -> None:
    inputs = torch.randn(5, 2, 4), torch.randn(5, 4), torch.randn(5, 2)
    assert index_scores(*(x.bfloat16() for x in inputs)).dtype == torch.float32
    assert index_scores(*(x.double() for x in inputs)).dtype == torch.float64


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def leaves(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, HEADS, WIDTH), (tokens, KEY_HEADS, WIDTH), (tokens, KEY_HEADS, VALUE_WIDTH)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def index_of(tokens: int, top_k: int) -> Index:
    """Small integers, so that many scores are tied, at 0 and elsewhere, and no order of sums matters."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).double()

    return Index(
        queries=draw(tokens, INDEX_HEADS, INDEX_WIDTH),
        keys=draw(tokens, INDEX_WIDTH),
        weights=draw(tokens, INDEX_HEADS),
        top_k=top_k,
    )


def picked(index: Index, start: int, token: int) -> list[int]:
    """The keys of one token by the definition: Python's sort is stable."""
    scores = []
    for key in range(start, token + 1):
        dots = [float(q @ index.keys[key]) for q in index.queries[token]]
        scores.append(sum(float(w) * max(dot, 0.0) for w, dot in zip(index.weights[token], dots, strict=True)))
    return [start + n for n in sorted(range(len(scores)), key=lambda n: -scores[n])[: index.top_k]]


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, index: Index | None = None) -> Tensor:
    """Causal attention by the definition, a token at a time."""
    outputs = []
    for start, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        for token in range(start, end):
            keys = list(range(start, token + 1)) if index is None else picked(index, start, token)
            repeated_k, repeated_v = (x[keys].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            probs = (torch.einsum("hd,shd->hs", q[token], repeated_k) * scale).softmax(-1)
            outputs.append(torch.einsum("hs,she->he", probs, repeated_v))
    return torch.stack(outputs)


def differences(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> float:
    """The largest relative difference of outputs and of the gradients of q, k and v."""
    weight = torch.randn_like(expected)
    pairs = [(actual, expected)]
    gradients = (torch.autograd.grad((x * weight).sum(), inputs, retain_graph=True) for x in (actual, expected))
    pairs += zip(*gradients, strict=True)
    errors = [(a - b).abs().max() / b.abs().max() for a, b in pairs]
    assert all(a.isfinite().all() for a, _ in pairs)
    return float(torch.stack(errors).detach().max())


@pytest.mark.parametrize("room", [attention._KEPT_PROBABILITIES, 0], ids=["products", "torch's kernel"])
def test_values_of_their_own_width(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_KEPT_PROBABILITIES", room)
    inputs = leaves(sum(RAGGED))
    output = Documents(bounds(RAGGED), sum(RAGGED)).softmax(inputs[0], inputs[1], inputs[2], scale=0.3)
    assert output.shape == (sum(RAGGED), HEADS, VALUE_WIDTH)
    assert differences(output, plain(inputs[0], inputs[1], inputs[2], RAGGED, 0.3), inputs) <= FLOAT64


@pytest.mark.parametrize("top_k", [1, 16, 129, 130])
def test_sparse_documents(top_k: int) -> None:
    """130 is the longest document: nothing is left out, and it is plain attention."""
    inputs, index = leaves(sum(RAGGED)), index_of(sum(RAGGED), top_k)
    documents = Documents(bounds(RAGGED), sum(RAGGED))
    output = documents.sparse_softmax(inputs[0], inputs[1], inputs[2], index, scale=0.3)
    expected = plain(inputs[0], inputs[1], inputs[2], RAGGED, 0.3, index)
    # One key a token leaves queries and keys without a gradient.
    compared = inputs[2:] if top_k == 1 else inputs
    assert differences(output, expected, compared) <= FLOAT64
    whole = documents.softmax(inputs[0], inputs[1], inputs[2], scale=0.3)
    assert output.equal(whole) if top_k == 130 else float((output - whole).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("top_k", [6, 200])
def test_sparse_shared_prompts(top_k: int) -> None:
    """Two prompts of 7 and 70 tokens, read by three and two documents: as if each had a copy of its own."""
    prompts, readers, own = [7, 70], [0, 1, 0, 0, 1], [5, 3, 0, 80, 9]
    lengths, distinct, reading, first = [], [], [], {}
    for prompt, new in zip(readers, own, strict=True):
        start, count = sum(lengths), len(distinct)
        lengths.append(prompts[prompt] + new)
        fresh = prompts[prompt] if prompt not in first else 0
        first.setdefault(prompt, count)
        distinct += range(start + prompts[prompt] - fresh, start + prompts[prompt] + new)
        reading += range(first[prompt], first[prompt] + prompts[prompt])
        reading += range(count + fresh, count + fresh + new)
    places, inverse = torch.tensor(distinct), torch.tensor(reading)
    shared = SharedPrompts(Documents(bounds(lengths), len(reading)), places, inverse)
    inputs, index = leaves(len(distinct)), index_of(len(distinct), top_k)
    output = shared.sparse_softmax(inputs[0], inputs[1], inputs[2], index, scale=0.3)
    spread = Index(
        queries=index.queries[inverse], keys=index.keys[inverse], weights=index.weights[inverse], top_k=top_k
    )
    q, k, v = (x[inverse] for x in inputs)
    assert differences(output, plain(q, k, v, lengths, 0.3, spread)[places], inputs) <= FLOAT64


class OneLayer(Policy):
    """Attention alone, sparse and then plain: q, k, v and the index are rows of tables, one row a token id."""

    def __init__(self, tables: list[Tensor], index: Index) -> None:
        super().__init__()
        self.tables, self.index = tables, index
        self.weight = nn.Parameter(torch.zeros(1, 1))

    def attend(
        self, tokens: Tensor, positions: Tensor, attention: Attention, routes: Tensor | None = None
    ) -> PolicyOutput:
        q, k, v = (table[tokens] for table in self.tables)
        offered = self.index
        index = Index(
            queries=offered.queries[tokens].to(q.dtype),
            keys=offered.keys[tokens].to(q.dtype),
            weights=offered.weights[tokens].to(q.dtype),
            top_k=offered.top_k,
        )
        sparse = attention.sparse_softmax(q, k, v, index, scale=0.3)
        return PolicyOutput(torch.cat([sparse, attention.softmax(q, k, v)], 1).flatten(1))

    @property
    def lm_head_weight(self) -> Tensor:
        return self.weight

    def hf_config(self) -> dict[str, object]:
        return {}

    def place_of(self, name: str) -> None:
        return None

    def disk_places(self):
        return iter(())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_sparse_cache(dtype: torch.dtype) -> None:
    """Rows that are read, copied, decoded past the cache's first room and dropped: what the whole documents get."""
    tables = [x.detach() for x in leaves(50, dtype)]
    policy = OneLayer(tables, index_of(50, top_k=9))
    prompts, copies = [[3, 1, 4], list(range(30)), [7]], [1, 0, 1, 2]
    cache, generator = Cache(), torch.Generator().manual_seed(2)
    documents = [list(prompts[n]) for n in copies]
    outputs = [[row] for row in cache.read(policy, prompts, copies)]
    for step in range(60):
        if step == 20:
            order = cache.drop(torch.tensor([True, False, False, False])).tolist()
            documents, outputs = [documents[n] for n in order], [outputs[n] for n in order]
        if step == 40:
            outputs += [[row] for row in cache.read(policy, [[5] * 12], [0])]
            documents.append([5] * 12)
        tokens = torch.randint(50, (len(documents),), generator=generator)
        for document, token in zip(documents, tokens.tolist(), strict=True):
            document.append(token)
        for output, row in zip(outputs, cache.step(policy, tokens), strict=True):
            output.append(row)
    bound = 2e-6 if dtype == torch.float32 else FLOAT64
    for document, output in zip(documents, outputs, strict=True):
        tokens = torch.tensor(document)
        whole = policy(tokens, torch.arange(len(tokens)), bounds([len(tokens)])).hidden[-len(output) :]
        torch.testing.assert_close(torch.stack(output), whole, rtol=bound, atol=bound)


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="of a GPU")


@ON_GPU
def test_narrow_values_in_the_varlen_form() -> None:
    """bfloat16, heads as DeepSeek-V3 has them: keys 192 wide, values 128, within 1 % of float64, gradients too."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(RAGGED), heads, width) for heads, width in ((4, 192), (4, 192), (4, 128))]
    half = [torch.randn(s, generator=generator).bfloat16().cuda().requires_grad_() for s in shapes]
    documents = Documents(bounds(RAGGED).cuda(), sum(RAGGED))
    assert attention.choose_form(half[0], half[2]) == "varlen"
    output = documents.softmax(half[0], half[1], half[2])
    exact = [x.detach().cpu().double().requires_grad_() for x in half]
    expected = plain(exact[0], exact[1], exact[2], RAGGED, 192**-0.5)
    weight = torch.randn(output.shape, generator=generator).bfloat16()
    found = torch.autograd.grad((output * weight.cuda()).sum(), half)
    wanted = torch.autograd.grad((expected * weight.double()).sum(), exact)
    assert max(map(relative, [output, *found], [expected, *wanted])) <= 1e-2


@ON_GPU
@pytest.mark.parametrize("top_k", [1, 16, 129])
def test_sparse_documents_on_a_gpu(top_k: int) -> None:
    """The selection is the CPU's, ties included; in float32."""
    inputs, index = leaves(sum(RAGGED), torch.float32), index_of(sum(RAGGED), top_k)
    expected = Documents(bounds(RAGGED), sum(RAGGED)).sparse_softmax(inputs[0], inputs[1], inputs[2], index, 0.3)
    q, k, v = (x.cuda() for x in inputs)
    moved = Index(
        queries=index.queries.cuda().float(),
        keys=index.keys.cuda().float(),
        weights=index.weights.cuda().float(),
        top_k=top_k,
    )
    output = Documents(bounds(RAGGED).cuda(), sum(RAGGED)).sparse_softmax(q, k, v, moved, 0.3)
    torch.testing.assert_close(output.cpu(), expected, rtol=2e-6, atol=2e-6)


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape and bool(actual.isfinite().all())
    return float((actual.detach().cpu().double() - expected.detach()).abs().max() / expected.detach().abs().max())
