"""The recipe's schema: every key, its default and one sentence about it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, PrivateAttr, Tag
from pydantic.fields import FieldInfo

NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"
"""Pattern of a run's name: no path, no option of a command, not hidden."""
MAX_NAME = 100
MAX_COUNT = 2**53
"""Largest count, above which a double does not hold every one."""

Kept = Mapping[tuple[str | int, ...], tuple[str, object]]


def _number(value: object) -> object:
    """true and false are no numbers, though Python counts them as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return value


def _ordered(value: float) -> float:
    if math.isnan(value):
        raise ValueError("input should be a number")
    return value


def _readable(value: str) -> str:
    if re.search(r"[\0\ud800-\udfff]", value):
        raise ValueError("input holds a character that is no text")
    return value


_NUMBER = BeforeValidator(_number)
Text = Annotated[str, AfterValidator(_readable)]
Positive = Annotated[int, Field(gt=0, le=MAX_COUNT), _NUMBER]
NotNegative = Annotated[int, Field(ge=0, le=MAX_COUNT), _NUMBER]
Seed = Annotated[int, Field(ge=0, lt=2**63), _NUMBER]
Finite = Annotated[float, Field(allow_inf_nan=False), _NUMBER]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False), _NUMBER]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False), _NUMBER]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), _NUMBER]
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), _NUMBER]
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False), _NUMBER]
Bound = Annotated[float, _NUMBER, AfterValidator(_ordered)]
"""A bound on a ratio; infinity is none."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        # Infinity in the arguments of a function stays, and does not become null.
        ser_json_inf_nan="constants",
    )


class Lora(Section):
    rank: Positive = 16
    """Rank of each adapter."""
    alpha: Rate = 32.0
    """An adapter's product is scaled by alpha / rank."""
    targets: Annotated[list[Text], Field(min_length=1)] | None = None
    """Linear layers by the ends of their names (q_proj, self_attn.o_proj); all but the head when left out. Experts that
    are stacked in one tensor stay frozen."""


class Policy(Section):
    model: Text | None = None
    """Folder or hub id of the policy to start from (config.json and safetensors); or give `config`."""
    config: dict[str, object] | None = None
    """A config.json written here: the policy starts from random weights of this shape."""
    tokenizer: Text | None = None
    """Folder or hub id of the tokenizer; the model's own when left out."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; the LM head is computed in float32 either way. auto is bfloat16 where `model` is
    given and the device is a GPU, else float32."""
    router_replay: Literal["off", "rollout"] = "off"
    """Whether the learner takes the experts that the engine chose for each token, or chooses them again."""
    lora: Lora | None = None
    """Low-rank adapters: only they are trained, the policy itself is frozen."""

    @property
    def number_format(self) -> Literal["float32", "bfloat16"]:
        """`dtype`; float32 for an auto, which `choice.settled` replaces where a run's device is known."""
        return "float32" if self.dtype == "auto" else self.dtype


class Data(Section):
    source: Text
    """A .jsonl or .parquet file, a folder, a hub id, module:function, or reasoning_gym:TASK."""
    split: Text = "train"
    """Which split, or a slice such as train[:90%]. A file has the split train alone; of a procedural source, train is
    one half of all problems and any other name the other half."""
    args: dict[str, object] = {}
    """Arguments of the function or parameters of the reasoning-gym task (with size and seed)."""
    limit: Positive | None = None
    """Use only the first so many rows."""
    prompt: Text | None = None
    """Template with {column} fields; without it the column `messages` or `prompt` is the prompt."""
    config: Text | None = None
    """Configuration of a hub dataset or folder that has several (main of openai/gsm8k)."""
    system: Text | None = None
    """System message before the prompt, where the row has none; left out in eval and sft.data, that of data."""
    template_args: dict[str, object] | None = None
    """Arguments of the chat template ({enable_thinking: false}); left out in eval and sft.data, those of data."""
    columns: dict[str, Text] = {}
    """Further columns as templates; that of one column alone is its value ({answer: "{solution}"})."""
    overlong: Literal["error", "drop"] = "error"
    """Effect of a row that leaves no room in max_context: end the run with its number, or leave it out and count it."""


class Source(Data):
    name: str = Field(pattern=NAME, max_length=MAX_NAME)
    """Name of the source in metrics and in reward.functions.sources."""
    weight: Rate = 1.0
    """Its share of the prompts of a step, relative to the other sources'."""


class TrainData(Data):
    source: Text = ""
    """A .jsonl or .parquet file, a folder, a hub id, module:function, or reasoning_gym:TASK."""
    sources: list[Source] = []
    """Several sources instead, drawn by their weights; prompt, system and template_args of data hold for each."""


class Eval(Data):
    name: str | None = Field(default=None, pattern=NAME, max_length=MAX_NAME)
    """Name of the set in metrics (eval/NAME/...) and in reward.functions.sources; needed in a list of sets."""
    samples: Positive | None = None
    """Completions of each prompt; left out, train.eval_samples."""
    temperature: Amount | None = None
    """Sampling temperature, 0 is greedy; left out, rollout.temperature."""
    top_p: Annotated[float, Field(gt=0, le=1), _NUMBER] = 1.0
    """Sample from the most probable tokens that hold this share together; 1 is all."""
    max_tokens: Positive | None = None
    """Longest completion; left out, rollout.max_tokens."""
    answer: Text | None = None
    """module:function that reads the answer of a completion (rewards.math:last_answer), for the majority vote maj@k."""


def _form_of_eval(value: object) -> str:
    return "{list}" if isinstance(value, list) else "{one}"


EvalSets = Annotated[
    Annotated[Eval, Tag("{one}")] | Annotated[list[Eval], Field(min_length=1), Tag("{list}")],
    Discriminator(_form_of_eval),
]
"""One set, or a list of sets. The tags are no part of a key."""


class Repetition(Section):
    run_length: NotNegative = 3000
    """Stop after this many tokens in a row above `probability` (the rule of MiniMax-M1); 0 is off."""
    probability: Fraction = 0.99
    """A token counts towards the run when its probability is strictly above this."""
    pattern_size: NotNegative = 0
    """Longest repeated token pattern that the engine's own detection looks for; 0 is off."""
    pattern_count: Annotated[int, Field(ge=2, le=MAX_COUNT), _NUMBER] = 4
    """How often the pattern must repeat."""


class Rollout(Section):
    engine: Literal["auto", "vllm", "torch"] = "auto"
    """Sampler of completions: vLLM, or the learner's own policy with a cache; auto is torch for a small policy on a CPU
    (`cispo show` says why), else vllm."""
    engines: Positive = 1
    """How many engines share the prompts of a step."""
    tensor_parallel: Positive = 1
    """GPUs of one engine."""
    placement: Literal["auto", "separate", "split", "sleep"] = "auto"
    """Engines on GPUs of their own; on the learners', with the memory split or given back while those work; auto is
    separate where there are enough GPUs, else split."""
    gpu_memory: Fraction = 0.4
    """Share of a GPU's memory that the caches of its engines may take, all together."""
    weight_sync: Literal["auto", "shared_memory", "cuda_ipc", "broadcast"] = "auto"
    """How weights reach the engines: a file in shared memory (between nodes: in output_dir), the learner's GPU memory,
    or NCCL (gloo on CPUs)."""
    verify_weights: bool = False
    """Whether engines compare a checksum of the weights that arrive (not with shared_memory)."""
    prompts_per_step: Positive = 16
    """P: prompts of one training step."""
    group_size: Positive = 8
    """G: completions of one prompt."""
    max_context: Positive = 2048
    """Longest prompt and completion together, in tokens."""
    max_tokens: Positive = 1024
    """Longest completion, in tokens."""
    temperature: Amount = 1.0
    """Sampling temperature; the learner uses the same."""
    repetition: Repetition = Repetition()
    """When a completion is cut for repeating itself."""
    engine_args: dict[str, object] = {}
    """Further arguments for vLLM's engine, passed on as they are."""

    @property
    def kind(self) -> Literal["vllm", "torch"]:
        """`engine`; vllm for an auto, which `choice.settled` replaces where device and policy are known."""
        return "vllm" if self.engine == "auto" else self.engine


class RewardTerm(Section):
    fn: Text
    """module:function of the reward."""
    weight: Finite = 1.0
    """Its factor in the sum."""
    sources: list[Text] = []
    """Names of data.sources and of held-out sets that it applies to; all when left out."""
    args: dict[str, object] = {}
    """Further keyword arguments for it."""
    timeout: Rate | None = None
    """Seconds that one call of it may take; reward.timeout when left out."""
    concurrency: Positive | None = None
    """Most calls of it at a time (a judge's server, a compiler); calls that wait for their turn do not run against the
    limit."""


class Reward(Section):
    functions: Annotated[list[RewardTerm], Field(min_length=1)]
    """Reward functions; their weighted sum is the reward."""
    on_error: Literal["raise", "drop_group"] = "raise"
    """Effect of a reward that raises or hangs: end the run, or drop the prompt's group and count it."""
    timeout: Rate = 10.0
    """Seconds that one call may take."""
    workers: Positive | Literal["auto"] = "auto"
    """Processes of plain functions, started as groups come; auto is one for each CPU of the driver's machine, 2 to 64.
    Async functions share one process."""


class Env(Section):
    tools: list[Text] = []
    """Tools of the policy: module:function each, or the command of an MCP server (mcp: python -m my_server)."""
    use: Text | None = None
    """An environment instead: module:Class with `step`, or with methods that are tools; or an agent: module:function
    with a parameter `chat`, or with `base_url` and `api_key` for a client of OpenAI's API."""
    args: dict[str, object] = {}
    """Further columns of every row, for tools and environment."""
    max_turns: Positive = 8
    """Replies of one attempt at most."""
    thinking: Literal["keep", "template", "drop"] = "keep"
    """Thoughts of past replies: kept, as the chat template has it, or dropped each turn (docs/agents.md)."""
    tool_parser: Text | None = None
    """How calls are read from a reply: the name of a parser of vLLM, or module:function; else `[name arguments]`."""
    timeout: Rate = 10.0
    """Seconds that one call of a tool or environment may take."""
    on_error: Literal["tell", "fail", "raise"] = "tell"
    """Effect of a call that raises or takes too long: its text for the policy, the end of the attempt, or of the run.
    An environment's own error ends the attempt with `tell` as well."""
    workers: Positive = 2
    """Processes that run tools and environments."""


class Curriculum(Section):
    drop_above: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), _NUMBER] | None = None
    """A prompt is never sampled again once at least this share of its last group was right (ScaleRL: 0.9)."""
    weighting: Literal["uniform", "difficulty"] = "uniform"
    """How prompts are drawn: each once an epoch, or by p (1 - p) of their estimated pass rate p."""
    length_stages: list[tuple[NotNegative, Positive]] = []
    """[step, tokens] pairs: from that training step on, completions in training have at most so many tokens."""


class Algorithm(Section):
    name: Text = "cispo"
    """cispo, ppo, grpo, dapo, dr_grpo, gspo, rloo, reinforce, reinforce_pp, a preset, or module:NAME of a record."""
    ratio_max: Bound | None = None
    """CISPO: absolute cap on the importance weight (the paper's 1 + eps_high)."""
    ratio_min: Bound | None = None
    """CISPO: absolute floor of the importance weight; 0 is none."""
    mask_low: Annotated[float, Field(ge=0), _NUMBER, AfterValidator(_ordered)] | None = None
    """CISPO's token mask (eq. 7): drops tokens with a negative advantage and a ratio below this."""
    mask_high: Annotated[float, Field(ge=0), _NUMBER, AfterValidator(_ordered)] | None = None
    """CISPO's token mask (eq. 7): drops tokens with a positive advantage and a ratio above this."""
    clip_low: Bound | None = None
    """PPO, GRPO and kin: the ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: Bound | None = None
    """PPO, GRPO and kin: see clip_low."""
    dual_clip: Bound | None = None
    """PPO, GRPO and kin: drops tokens with a negative advantage and a ratio above this."""
    ratio_anchor: Literal["rollout", "old"] | None = None
    """Denominator of the ratio: the engine's logprobs, or the learner's before this batch."""
    advantage: Text | None = None
    """group_norm, group_norm_sample (std with n-1), group_mean, leave_one_out, batch_baseline, batch_whiten,
    reward_to_go, turn_to_go or gae."""
    gamma: Share | None = None
    """GAE: discount of later rewards, per token."""
    lam: Share | None = None
    """GAE: 1 trusts the rewards alone, 0 the critic's next value."""
    reduction: Literal["token", "prompt", "sequence", "sequence_sum", "constant"] | None = None
    """Divisor of a token's loss: the tokens of its batch, prompt or sequence, the sequences, or a constant."""
    kl: Literal["k1", "k2", "k3"] | None = None
    """Estimator of the KL to the policy at the start."""
    kl_coef: Amount | None = None
    """Factor of that KL; 0 keeps no reference policy."""
    kl_in: Literal["loss", "reward"] | None = None
    """Whether the KL is added to the loss or taken off each token's reward."""
    correction: Literal["none", "tis", "icepop", "sequence_mask"] | None = None
    """Correction of the engine's probabilities to the learner's, with ratio_anchor old."""
    correction_low: Amount | None = None
    """Lower bound of learner / engine (icepop: per token; sequence_mask: geometric mean)."""
    correction_high: Amount | None = None
    """Upper bound of it (tis: truncation)."""
    zero_variance: Literal["drop", "keep"] | None = None
    """Whether groups with all rewards equal still count in the reduction."""
    dynamic_sampling: NotNegative | None = None
    """Most further rounds of sampling that replace groups with all rewards equal (DAPO); 0 is off."""
    overlong_buffer: NotNegative | None = None
    """DAPO's soft penalty over the last so many tokens before max_tokens; 0 is off."""
    overlong_penalty: Amount = 1.0
    """The penalty at max_tokens."""
    updates_per_batch: Positive = 1
    """Minibatches of a batch of rollouts: optimizer steps, each on its own share of the completions."""
    epochs: Positive = 1
    """Passes over a batch, each with minibatches cut anew."""

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps on one batch of rollouts, all epochs together."""
        return self.updates_per_batch * self.epochs


class Critic(Section):
    lr: Rate = 1e-5
    """Peak learning rate of the value function; it follows learner.schedule."""
    warmup_steps: NotNegative = 0
    """Training steps at the start in which only the critic learns."""
    value_clip: Rate = 0.2
    """How far a value may move from the batch's old one before its gradient ends."""


class Learner(Section):
    ranks: Positive = 1
    """Learner processes."""
    shard: bool | Literal["auto"] = "auto"
    """Whether weights, gradients and AdamW's state are split over the ranks; auto is true on GPUs."""
    context_parallel: Positive = 1
    """Ranks that read one micro-batch together; the batch has ranks / context_parallel shares."""
    expert_parallel: Positive = 1
    """Ranks between which the experts of a layer are distributed; their tokens travel."""
    expert_tensor_parallel: Positive = 1
    """Ranks between which the width of each expert is cut, on top of expert_parallel."""
    lr: Rate = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up."""
    warmup_steps: NotNegative = 0
    """Optimizer steps of linear warm-up."""
    final_lr_ratio: Share = 0.0
    """Learning rate at the last step, as a share of the peak."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's betas."""
    eps: Rate = 1e-15
    """AdamW's epsilon."""
    weight_decay: Amount = 0.0
    """Decoupled weight decay of matrices (norms have none)."""
    max_grad_norm: Rate = 1.0
    """Gradients are scaled down to this norm."""
    tokens_per_micro_batch: Positive = 8192
    """Most packed tokens of one forward pass."""
    share_prompts: bool = False
    """Read a prompt once for all completions of it in a micro-batch: the same gradient, summed in another order."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute layers in the backward pass to save memory; auto is true where policy.model is given and the device is
    a GPU, and where activations are offloaded."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW with moments in float32, or in blocks of 8 bits: 2.1 bytes a parameter instead of 8."""
    offload: list[Literal["optimizer", "activations", "reference"]] = []
    """Parts that stay in host memory while they are not used; no number changes (docs/memory.md)."""
    router_aux_coef: Amount = 0.0
    """Factor of the experts' load-balancing loss."""
    router_aux_tokens: Literal["completion", "all"] = "completion"
    """Which tokens the balancing loss counts, and the balancing by bias."""
    router_bias_rate: Amount = 0.0
    """Step of the routers' correction biases after an update, towards an even load of the experts; 0 leaves them."""

    @property
    def recomputes(self) -> bool:
        """Whether layers are recomputed; of an auto, `choice.settled` knows the device."""
        auto = self.gradient_checkpointing == "auto"
        return "activations" in self.offload if auto else bool(self.gradient_checkpointing)

    @property
    def data_parallel(self) -> int:
        """Shares of a batch."""
        return self.ranks // self.context_parallel

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold one set of experts together."""
        return self.expert_parallel * self.expert_tensor_parallel


class Sft(Section):
    data: Data
    """Demonstrations: rows with a prompt and a column `completion`."""
    steps: Positive = 100
    """Optimizer steps."""
    batch_size: Positive = 128
    """Demonstrations of one step."""
    lr: Rate = 1e-3
    """Peak learning rate."""
    warmup_steps: NotNegative = 0
    """Steps of linear warm-up; constant afterwards."""


class Train(Section):
    steps: Positive = 100
    """Training steps (one batch of rollouts each)."""
    eval_every: NotNegative = 20
    """Steps between evaluations (counted by their prompts); 0 evaluates at the start and the end only."""
    eval_samples: Positive = 1
    """Completions of each held-out prompt."""
    max_prompts: NotNegative = 0
    """Ends the training once so many prompts were sampled, at any step; 0 is no bound."""
    save_every: NotNegative = 20
    """Steps between checkpoints, from which `--resume` goes on; the last step is always saved."""
    keep: Positive = 2
    """Number of newest checkpoints that stay, beside the best by held-out accuracy."""
    checkpoint: Literal["full", "weights"] = "full"
    """Contents of a checkpoint: all state, from which a resumed run is the undisturbed one, or no optimizer (2 instead
    of 14 bytes a parameter in bfloat16), after which AdamW's moments start again from zero."""
    best: Text | None = None
    """Metric of the best checkpoint, the higher the better (eval/NAME/pass@4); accuracy of the first held-out set when
    left out."""
    token_samples: NotNegative = 64
    """Attempts of a step that are logged token by token (log-probabilities, ratio, weight, entropy): `cispo view`."""


class Control(Section):
    max_staleness: NotNegative = 0
    """Versions by which a completion may be older than the policy that it trains; 0 samples and learns in turn."""
    window: Share = 0.25
    """How far finished groups may overtake unfinished ones, as a share of max_staleness batches."""
    on_update: Literal["wait", "keep", "recompute", "abort"] = "keep"
    """How unfinished completions meet new weights: they end first (wait), go on with the old keys, values and states
    (keep), have those recomputed under the new weights (recompute), or begin anew (abort)."""
    max_restarts: NotNegative = 3
    """Engines that may die and be started again during a run."""
    watchdog: NotNegative = 1800
    """Seconds without progress after which a run reports its waiting calls; after twice that it ends; 0 is never."""


class Recipe(Section):
    base: Text | None = None
    """Another recipe that this one changes."""
    name: str = Field(default="run", pattern=NAME, max_length=MAX_NAME)
    """Name of the run folder."""
    seed: Seed = 0
    """Seed of all random numbers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where policies run."""
    runtime: Literal["ray", "local"] = "ray"
    """Ray actors, or the same classes in this process."""
    output_dir: Text = "runs"
    """Where run folders go; on a cluster a file system that all nodes share."""
    logging: list[Text] = ["tensorboard"]
    """Trackers of the metrics: tensorboard, wandb, mlflow, trackio, swanlab, comet_ml, aim, clearml, dvclive, or
    module:Class (docs/trackers.md)."""
    policy: Policy = Policy()
    """The language model that is trained."""
    data: TrainData | None = None
    """Training prompts."""
    eval: EvalSets | None = None
    """Held-out prompts: one set, or a list of sets with a name each."""
    sft: Sft | None = None
    """Supervised warm-up, before the first training step."""
    rollout: Rollout = Rollout()
    """How completions are sampled."""
    env: Env | None = None
    """Several turns: the tools or the environment that answer the policy."""
    reward: Reward | None = None
    """How completions are scored."""
    curriculum: Curriculum = Curriculum()
    """Which prompts are sampled how often, and how long their completions may be."""
    algorithm: Algorithm = Algorithm()
    """Advantage, loss and reduction: from rewards to a gradient."""
    learner: Learner = Learner()
    """How the policy is updated."""
    critic: Critic = Critic()
    """How a value function is trained, where the algorithm has one."""
    train: Train = Train()
    """Length of the training, evaluations and checkpoints."""
    control: Control = Control()
    """Overlap of sampling and learning; processes that die or hang."""
    _kept: Kept = PrivateAttr(default_factory=dict)

    @property
    def kept(self) -> Kept:
        """Interpolations that are stored instead of their values: place in the recipe -> (text, value in force)."""
        return self._kept

    def set_kept(self, kept: Kept) -> None:
        self._kept = kept


def known_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every key of the schema, nested sections included."""
    for name, info in section.model_fields.items():
        yield prefix + name, info
        for inner in _sections(info.annotation):
            yield from known_keys(inner, f"{prefix}{name}.")


def _sections(annotation: object) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    found = (s for part in getattr(annotation, "__args__", ()) for s in _sections(part))
    return list(dict.fromkeys(found))
