"""Every object that travels between the parts of CISPO, with shapes and one example each.

    Prompt -> Completion -> Turn -> Trajectory -> TrajectoryGroup        the sampling side
           -> Sample -> MicroBatch -> LossInputs -> TokenStats           the training side

Axis letters: P prompts of a step, G trajectories of a prompt (the group), N = P * G trajectories, S sequences in
a micro-batch, L tokens of one sequence, T packed tokens of a micro-batch, N also the trained tokens among them, V
vocabulary.

Four log-probabilities, four names, "old" for one of them only:

    logprobs          the current policy (learner, with gradient)
    old_logprobs      the learner before the first update on this batch
    rollout_logprobs  the engine at sampling time
    ref_logprobs      a frozen reference policy
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Message = Mapping[str, object]
"""A chat message: role, content, and further keys that the chat template reads."""

OnUpdate = Literal["wait", "keep", "recompute", "abort"]
"""Treatment of unfinished completions when new weights reach an engine: finish them first; go on with the old keys,
values and states; recompute those under the new weights; or sample the completions anew."""


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """The policy sampled an end-of-sequence token (it is the last of `token_ids`)."""
    LENGTH = "length"
    """`max_tokens` was reached: the completion is truncated."""
    REPETITION = "repetition"
    """The repetition stop fired (a run of near-certain tokens, or a repeated pattern)."""
    ABORT = "abort"
    """The request was cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One problem of the dataset.

    Example: Prompt(id=7, messages=({"role": "user", "content": "47,03>"},), columns={"answer": "03,47"})
    """

    id: int
    """Position in the dataset: the identity that seeds are derived from."""
    messages: tuple[Message, ...]
    """Rendered for the policy with its chat template."""
    columns: Mapping[str, object] = field(default_factory=dict)
    """The dataset row: rewards receive its columns by name."""
    source: str = ""
    """Name of the data source or held-out set, "" where it has none."""
    template_args: Mapping[str, object] = field(default_factory=dict)
    """Further arguments of the chat template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionStop:
    """The rule that cuts a completion which repeats itself.

    Example: RepetitionStop(run_length=3000, probability=0.99) is the rule of MiniMax-M1 (arXiv 2506.13585, section 5):
    stop after 3,000 consecutive tokens that each had a probability above 0.99.
    """

    run_length: int = 3000
    """Tokens in a row above `probability` that stop the completion; 0 switches the rule off."""
    probability: float = 0.99
    """A token counts when its probability is strictly above this."""
    pattern_size: int = 0
    """Longest repeated pattern, in tokens, that vLLM's own detection looks for; 0 switches it off."""
    pattern_count: int = 4
    """Repetitions of the pattern that stop the completion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The distribution completions are drawn from, and their ends.

    Example: Sampling(max_tokens=16, eos_ids=(2,))
    """

    max_tokens: int
    eos_ids: tuple[int, ...]
    temperature: float = 1.0
    """0 is greedy. The logprobs of a completion are those of the distribution it was drawn from."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition: RepetitionStop = RepetitionStop()


@dataclass(slots=True, kw_only=True, eq=False)
class Home:
    """The engine at which a group's attempts are sampled, turn after turn: its cache holds their prompts.

    Example: Home(cache="7"), of which `Workers.generate` sets `engine` with the first turn.
    """

    cache: str = ""
    """Prompts of another name share no block of an engine's cache. A name for each batch makes sampling independent of
    the calls before it, bit for bit."""
    engine: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedExperts:
    """Experts that an engine's routers chose for the tokens it read, one row a token.

    Example: RoutedExperts(data=bytes([0, 3, 1, 2]), shape=(1, 2, 2), first=4): token 4 of a sequence went to experts 0
    and 3 in the first MoE layer and to 1 and 2 in the second.
    """

    data: bytes = field(repr=False)
    """Numbers of experts [tokens, layers, k] in C order: a byte each, two of them for policies with more than 256."""
    shape: tuple[int, int, int]
    first: int = 0
    """Position, in prompt and completion together, of the first of the tokens; those before it are unknown."""

    def until(self, end: int) -> RoutedExperts:
        """The rows of positions below `end`."""
        tokens, layers, k = self.shape
        kept = max(min(end - self.first, tokens), 0)
        return RoutedExperts(
            data=self.data[: kept * (len(self.data) // tokens)], shape=(kept, layers, k), first=self.first
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The tokens an engine sampled after one prompt.

    Example: Completion(token_ids=(5, 9), logprobs=(-0.1, -0.7), finish_reason=FinishReason.LENGTH, versions=(3, 4))
    was under way when version 4 of the weights arrived.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Log-probability of each sampled token under the distribution it was drawn from; finite."""
    finish_reason: FinishReason
    versions: tuple[int, ...]
    """The policy version that sampled each token, never falling."""
    cached: int = 0
    """Tokens of the prompt that the engine found in its prefix cache."""
    accepted: int = 0
    """Tokens that were drafts of speculative decoding, sampled in the step of a token before them."""
    routed_experts: RoutedExperts | None = None
    """Of prompt and completion but for its last token, which no engine reads; None unless they are replayed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One exchange: the tokens that the policy reads anew, and its answer.

    Example: Turn(context_ids=(4, 5), completion=first), Turn(context_ids=(7,), completion=second, continues=True):
    the second prompt is (4, 5), the tokens of `first`, and (7,).
    """

    context_ids: tuple[int, ...]
    """The whole prompt, or where it continues a turn, the tokens after that turn's completion."""
    completion: Completion
    continues: bool = False
    """Whether the prompt is the turn before, prompt and completion, with `context_ids` behind it. Where a history is
    rewritten, a turn starts a new segment."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Rewards for this turn by name (a tool error, the time it took), already weighted; they land on its last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One attempt at a prompt.

    Example: Trajectory(group_id=7, index=0, turns=(turn,), text="03,47", reward=1.0, rewards={"exact_match": 1.0})
    """

    group_id: int
    index: int
    """Of the G attempts, from 0."""
    turns: tuple[Turn, ...]
    text: str
    """The last completion, decoded."""
    reward: float
    """Weighted sum of `rewards`, plus any shaping."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Each reward function's value; one that does not apply is absent."""
    extra: Mapping[str, object] = field(default_factory=dict)
    """Further values that reward functions return for the log of samples."""
    messages: tuple[Message, ...] = ()
    """The conversation after the prompt, of an attempt with an environment."""
    status: str = ""
    """The end of an attempt with an environment: one of `agents.contract.Status`."""
    events: Mapping[str, int] = field(default_factory=dict)
    """Numbers of an attempt with an environment: calls, failed, unreadable."""

    @property
    def finish_reason(self) -> FinishReason:
        return self.turns[-1].completion.finish_reason

    @property
    def length(self) -> int:
        """Sampled tokens over all turns."""
        return sum(len(turn.completion.token_ids) for turn in self.turns)

    @property
    def segments(self) -> tuple[tuple[Turn, ...], ...]:
        """The turns, cut where one does not continue the one before: a segment is one sequence of tokens."""
        cuts = [number for number, turn in enumerate(self.turns) if not turn.continues or number == 0]
        return tuple(self.turns[a:b] for a, b in zip(cuts, [*cuts[1:], len(self.turns)], strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryGroup:
    """The G attempts at one prompt."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    problem: str = ""
    """The error of user code that ended one of its attempts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One training sequence, before packing: a segment of a trajectory with everything the loss needs.

    Example: prompt (4, 5), completion (9, 2) gives token_ids [4, 5, 9, 2] and loss_mask [F, F, T, T].
    """

    token_ids: Tensor
    """[L] int64."""
    loss_mask: Tensor
    """[L] bool: True where the token was sampled by the policy and is trained on."""
    rollout_logprobs: Tensor
    """[L] float32: 0 where loss_mask is False."""
    versions: Tensor
    """[L] int32: the policy version that sampled the token, 0 where loss_mask is False."""
    group_id: int
    index: int
    segment: int = 0
    """Of its trajectory, from 0."""
    advantages: Tensor | None = None
    """[L] float32: per token, so that reward-to-go and GAE need no other type; None until they are estimated."""
    old_logprobs: Tensor | None = None
    """[L] float32, like those below: 0 where loss_mask is False, None where the algorithm does not use them."""
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    """The critic's value of the state in which each token was sampled."""
    returns: Tensor | None = None
    """The critic's targets."""
    routes: Tensor | None = None
    """[L - 1, layers, k] int16: the experts of every token but the last, for router replay; -1 where unknown."""

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


class Piece(NamedTuple):
    """Consecutive tokens of a document that several ranks read."""

    document: int
    """Its number among the split documents of the micro-batch."""
    start: int
    end: int


class Pieces(NamedTuple):
    """The split documents of a micro-batch that the ranks of a context group read together."""

    lengths: tuple[int, ...]
    """Tokens of each document."""
    by_rank: tuple[tuple[Piece, ...], ...]
    """[ranks]: the pieces of each rank in the order of its rows."""
    rank: int
    """The rank whose micro-batch this is, its place in the group."""

    @property
    def own(self) -> tuple[Piece, ...]:
        return self.by_rank[self.rank]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """S sequences packed flat for one forward pass; every [T] array shares one index.

    The shift is done once, here: position t holds the input `tokens[t]`, the token to predict `targets[t]`, and the
    mask, logprobs, advantage and weight of that *target*.

    Example: the Sample above packs into tokens [4, 5, 9], targets [5, 9, 2], loss_mask [F, T, T],
    loss_index [1, 2], cu_seqlens [0, 3].
    """

    tokens: Tensor
    """[T] int64."""
    targets: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64, restarting at 0 with each sequence."""
    cu_seqlens: Tensor
    """[S + 1] int32: the start of each sequence, then T."""
    max_seqlen: int
    """Tokens of the longest sequence. Computed while packing, on the host: on a GPU its reader would have to wait."""
    loss_mask: Tensor
    """[T] bool."""
    loss_index: Tensor
    """[N] int64: the positions where `loss_mask` is True."""
    rollout_logprobs: Tensor
    """[T] float32."""
    versions: Tensor
    """[T] int32: the policy version that sampled the target."""
    advantages: Tensor
    """[T] float32."""
    loss_weights: Tensor
    """[T] float32: the reduction. The loss is (per_token_loss * loss_weights).sum() over micro-batches and ranks."""
    sample_index: tuple[int, ...] = ()
    """[S]: the position of each sequence's Sample in the list that was packed; `unpack` puts values back there."""
    unique_index: Tensor | None = None
    """[C] int64: positions of the tokens that the policy reads, where equal prompts are read once; None: all."""
    inverse: Tensor | None = None
    """[T] int64: for each token the entry of `unique_index` that gives its hidden state."""
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    routes: Tensor | None = None
    """[T, layers, k] int16: experts to replay for each token of `tokens`; -1 leaves the choice to the router."""
    stand_in: bool = False
    """Whether this is one token without a sample, for a rank that has fewer micro-batches than others."""
    pieces: Pieces | None = None
    """Documents that other ranks read parts of; None where each is whole on its rank. This rank's pieces are its last
    sequences, after the whole ones; a sequence is then its part here, `positions` those in the document."""


RankBatches = Sequence[Sequence[MicroBatch]]
"""[ranks][micro-batches] of one pass or optimizer step, as many on each rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Arguments of a loss function: per-token tensors of one micro-batch, [T] each.

    Values at positions where `mask` is False are arbitrary (NaN included) and must not reach the result.
    """

    logprobs: Tensor
    """Of the current policy: the only tensor with a gradient."""
    anchor_logprobs: Tensor
    """Denominator of the ratio: rollout_logprobs or old_logprobs, as `ratio_anchor` says."""
    rollout_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    """[S + 1]; empty for a loss that is declared `per_token`, which may be given some tokens of a micro-batch only."""
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """The trained tokens of micro-batches with the values that metrics are made of, [N] each, without gradient."""

    targets: Tensor
    """int64: the token ids."""
    logprobs: Tensor
    rollout_logprobs: Tensor
    versions: Tensor
    """int32: the policy version that sampled each token."""
    advantages: Tensor
    ratio: Tensor
    """The importance ratio."""
    weight: Tensor
    """The factor of advantage * grad logprob in the ascent direction; 0 is a dropped token."""
    entropy: Tensor
    """Of the policy's distribution at each token, in nats."""
    old_logprobs: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """The objective's own values and those of router replay by metric name, logged as means."""

    @classmethod
    def concat(cls, parts: Sequence[TokenStats]) -> TokenStats:
        """The tokens of all parts (at least one), in order and on the host; `extra` has the same names in each."""
        import torch

        def joined(tensors: list[Tensor]) -> Tensor:
            return torch.cat(tensors).cpu()

        first = parts[0]
        names = [f.name for f in fields(cls) if f.name != "extra" and getattr(first, f.name) is not None]
        extra = {name: joined([part.extra[name] for part in parts]) for name in first.extra}
        return cls(**{name: joined([getattr(part, name) for part in parts]) for name in names}, extra=extra)
