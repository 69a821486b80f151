"""TRL's front door: `from cispo.trl import GRPOConfig, GRPOTrainer` instead of `from trl import ...`.

    GRPOConfig(keys of TRL), model, reward_funcs, datasets --> recipe + files beside the run folder --> cispo.train

Every key is mapped, or has no effect here, or is refused with a reason. docs/from_trl.md has the table. A step of TRL
is an optimizer step; one here is a batch of rollouts.
"""

from __future__ import annotations

import difflib
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cispo.errors import UserError

_DEFAULTS: Mapping[str, object] = {
    "output_dir": "trainer_output",
    "run_name": None,
    "seed": 42,
    "bf16": None,
    "report_to": "tensorboard",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": None,
    "generation_batch_size": None,
    "num_generations": 8,
    "num_generations_eval": None,
    "num_iterations": 1,
    "max_steps": -1,
    "num_train_epochs": 3.0,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": True,
    "max_prompt_length": None,
    "max_completion_length": 256,
    "vllm_max_model_length": None,
    "temperature": 1.0,
    "chat_template_kwargs": None,
    "use_vllm": False,
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_tensor_parallel_size": 1,
    "vllm_enable_sleep_mode": False,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_cap": 3.0,
    "beta": 0.0,
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "loss_type": "dapo",
    "scale_rewards": "group",
    "importance_sampling_level": "token",
    "reward_weights": None,
    "model_init_kwargs": None,
    "eval_strategy": "no",
    "eval_steps": None,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": None,
}
"""Mapped keys and TRL's defaults."""

_WITHOUT_EFFECT = frozenset(
    "logging_steps logging_strategy logging_first_step logging_dir log_completions num_completions_to_print log_level "
    "disable_tqdm dataloader_num_workers dataloader_pin_memory dataloader_drop_last remove_unused_columns optim tf32 "
    "gradient_checkpointing_kwargs per_device_eval_batch_size shuffle_dataset data_seed ddp_find_unused_parameters "
    "ddp_timeout overwrite_output_dir do_train do_eval use_cpu vllm_mode cache_implementation "
    "save_safetensors save_only_model wandb_log_unique_prompts log_unique_prompts group_by_length "
    "use_liger_kernel use_liger_loss torch_empty_cache_steps eval_on_start label_names half_precision_backend "
    "ds3_gather_for_generation auto_find_batch_size".split()
)
"""Keys of another way to the same result, or of an output that is always written here."""

_SAMPLING = "truncated sampling makes the importance ratio wrong, so it must stay {}"
_FIXED: Mapping[str, tuple[Sequence[object], str]] = {
    "top_p": ((None, 1, 1.0), _SAMPLING.format(1)),
    "top_k": ((None, 0, -1), _SAMPLING.format(0)),
    "min_p": ((None, 0, 0.0), _SAMPLING.format(0)),
    "repetition_penalty": ((None, 1, 1.0), _SAMPLING.format(1)),
    "fp16": ((None, False), "use bf16"),
    "mask_truncated_completions": ((None, False), "give truncated completions a reward of their own (`truncated`)"),
    "push_to_hub": ((None, False), "upload trainer.run.checkpoint, a Hugging Face model folder"),
    "load_best_model_at_end": ((None, False), "trainer.run.best is the best checkpoint"),
    "sync_ref_model": ((None, False), "the reference is the policy at the start"),
    "top_entropy_quantile": ((None, 1, 1.0), "every token has its loss"),
    "deepspeed": ((None,), "learner.shard and learner.ranks shard a policy"),
    "fsdp": ((None, "", []), "learner.shard and learner.ranks shard a policy"),
    "generation_kwargs": ((None, {}), "sampling has a temperature alone"),
    "vllm_server_base_url": ((None,), "the run starts its own engines"),
    "vllm_server_host": ((None, "0.0.0.0"), "the run starts its own engines"),
    "torch_compile": ((None, False), "it is off by measurement (docs/performance.md)"),
}
"""Keys that may only have their neutral values, and the reason."""

_LOSSES = {"dapo": "token", "bnpo": "token", "grpo": "sequence", "dr_grpo": "constant"}
_CORRECTIONS = {"token_truncate": "tis", "token_mask": "icepop", "sequence_mask": "sequence_mask"}
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}


class GRPOConfig:
    """TRL's keys. Raises UserError for one that CISPO does not know or cannot honour."""

    def __init__(self, output_dir: str = "trainer_output", **keys: object) -> None:
        values = {**_DEFAULTS, "output_dir": str(output_dir), **keys}
        for key, value in keys.items():
            if key in _FIXED:
                allowed, reason = _FIXED[key]
                if value not in allowed:
                    raise UserError(f"GRPOConfig: {key}={value!r} is not supported here: {reason}")
            elif key not in _DEFAULTS and key not in _WITHOUT_EFFECT:
                near = difflib.get_close_matches(key, [*_DEFAULTS, *_FIXED, *_WITHOUT_EFFECT], n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise UserError(f"GRPOConfig: unknown key {key}{hint}; docs/from_trl.md lists the keys")
        self.__dict__.update(values)

    # Any: the keys have TRL's types.
    def __getattr__(self, key: str) -> Any:
        raise AttributeError(f"GRPOConfig has no key {key}")


class GRPOTrainer:
    """TRL's trainer: `train()` runs the recipe that the arguments make; `recipe` shows it before."""

    def __init__(
        self,
        model: object,
        reward_funcs: object,
        args: GRPOConfig | None = None,
        train_dataset: object = None,
        eval_dataset: object = None,
        processing_class: object = None,
        peft_config: object = None,
        **others: object,
    ) -> None:
        """Raises UserError for an argument that has no counterpart here, such as callbacks."""
        unsupported = next((name for name, value in others.items() if value not in (None, [], (None, None))), None)
        if unsupported is not None:
            raise UserError(f"GRPOTrainer: {unsupported} is not supported here (docs/from_trl.md)")
        self.args = args or GRPOConfig()
        place = Path(self.args.output_dir)
        self._inputs = place.with_name(f"{place.name}-inputs")
        self._inputs.mkdir(parents=True, exist_ok=True)
        rows = _rows(train_dataset, "train_dataset")
        held_out = None if eval_dataset is None else _rows(eval_dataset, "eval_dataset")
        functions = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        policy = self._policy(model, processing_class, rows, peft_config)
        self.recipe: dict[str, object] = {
            **_run_keys(self.args, place),
            "policy": policy,
            "data": {"source": self._written(rows, "train"), **_data_keys(self.args)},
            "reward": {"functions": _terms(functions, self.args.reward_weights)},
            **_section_keys(self.args, len(rows), str(policy["model"])),
        }
        if held_out is not None:
            self.recipe["eval"] = {"source": self._written(held_out, "eval")}
        self.run: object = None
        """`cispo.TrainedRun` after `train`."""

    def train(self, resume_from_checkpoint: bool | None = None) -> object:
        """Trains; returns the `cispo.TrainedRun`. With True the last run of output_dir goes on."""
        from cispo.api import train

        if not isinstance(resume_from_checkpoint, bool | None):
            raise UserError(
                "GRPOTrainer: resume_from_checkpoint is True here: the newest whole checkpoint of output_dir"
            )
        self.run = train(self.recipe, resume=bool(resume_from_checkpoint))
        return self.run

    def save_model(self, output_dir: str | None = None) -> None:
        """Copies the newest checkpoint, a Hugging Face model folder, without the training's state."""
        from cispo.api import TrainedRun

        if not isinstance(self.run, TrainedRun) or self.run.checkpoint is None:
            raise UserError("GRPOTrainer: save_model needs a checkpoint: train first")
        target = Path(output_dir or self.args.output_dir)
        ignore = shutil.ignore_patterns("training", "cispo.json", ".*")
        shutil.copytree(self.run.checkpoint, target, ignore=ignore, dirs_exist_ok=True)

    def _policy(self, model: object, tokenizer: object, rows: _Rows, peft_config: object) -> dict[str, object]:
        # Any: a model or tokenizer of transformers, which this module does not import.
        saves: Any = model
        if not isinstance(model, str | Path):
            if not hasattr(model, "save_pretrained"):
                raise UserError(f"GRPOTrainer: model must be a path, a hub id or a model, not a {type(model).__name__}")
            saves.save_pretrained(str(self._inputs / "model"))
            model = self._inputs / "model"
        chosen: Any = tokenizer
        # TRL sends a prompt that is a text as it is, whatever template the tokenizer has.
        if rows.plain:
            from cispo.rollout.renderer import load_tokenizer

            chosen = chosen or load_tokenizer(str(model))
        policy: dict[str, object] = {"model": str(model)}
        if chosen is not None:
            template, chosen.chat_template = chosen.chat_template, None if rows.plain else chosen.chat_template
            try:
                chosen.save_pretrained(str(self._inputs / "tokenizer"))
            finally:
                chosen.chat_template = template
            policy["tokenizer"] = str(self._inputs / "tokenizer")
        policy["dtype"] = "bfloat16" if _bf16(self.args) else "float32"
        if peft_config is not None:
            lora: Any = peft_config
            targets = lora.target_modules
            policy["lora"] = {"rank": lora.r, "alpha": float(lora.lora_alpha)} | (
                {} if targets in (None, "all-linear") else {"targets": sorted(targets)}
            )
        return policy

    def _written(self, rows: _Rows, name: str) -> str:
        file = self._inputs / f"{name}.parquet"
        rows.dataset.to_parquet(str(file))
        return str(file)


class _Rows:
    """A dataset of `datasets`, or rows of one's own."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.plain = isinstance(dataset[0].get("prompt"), str)
        """Whether its prompts are texts, not messages."""

    def __len__(self) -> int:
        return len(self.dataset)


def _rows(given: object, name: str) -> _Rows:
    from datasets import Dataset

    if isinstance(given, Mapping) and not isinstance(given, Dataset):
        raise UserError(f"GRPOTrainer: {name} holds several splits: give one of them")
    if not isinstance(given, Dataset):
        if not isinstance(given, Iterable):
            raise UserError(f"GRPOTrainer: {name} must be a dataset, not {given!r:.40}")
        given = Dataset.from_list([dict(row) for row in given])
    if len(given) == 0 or "prompt" not in given.column_names:
        raise UserError(f"GRPOTrainer: {name} needs rows with a column 'prompt'; it has {len(given)} rows")
    return _Rows(given)


def _terms(functions: Sequence[object], weights: Sequence[float] | None) -> list[dict[str, object]]:
    from cispo.recipe.user_code import give

    if weights is not None and len(weights) != len(functions):
        raise UserError(f"GRPOConfig: reward_weights has {len(weights)} weights for {len(functions)} reward functions")
    terms: list[dict[str, object]] = []
    for function, weight in zip(functions, weights or [1.0] * len(functions), strict=True):
        if isinstance(function, str):
            # TRL's text is the hub id of a sequence classifier.
            terms.append({"fn": "rewards.model:classifier", "args": {"model": function}, "timeout": 600.0})
        elif isinstance(function, Callable):
            terms.append({"fn": give(function, "reward_funcs")})
        else:
            raise UserError(f"GRPOTrainer: reward_funcs holds a {type(function).__name__}, which is no function")
        terms[-1]["weight"] = weight
    names = [term["fn"] for term in terms]
    double = next((str(n) for n in names if names.count(n) > 1 and str(n).startswith("__main__:")), None)
    if double is not None:
        raise UserError(f"GRPOTrainer: two reward functions are called {double.partition(':')[2]}")
    return terms


def _bf16(args: GRPOConfig) -> bool:
    import torch

    given = (args.model_init_kwargs or {}).get("dtype", (args.model_init_kwargs or {}).get("torch_dtype"))
    if args.bf16 is not None:
        return bool(args.bf16)
    return "bfloat16" in str(given) if given is not None else torch.cuda.is_available()


def _run_keys(args: GRPOConfig, place: Path) -> dict[str, object]:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", place.name).strip("-.") or "run"
    to = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or [])
    return {
        "name": name,
        "output_dir": str(place.parent),
        "seed": args.seed,
        "runtime": "ray" if args.use_vllm else "local",
        "logging": [] if to == ["none"] else ["tensorboard"] if to == ["all"] else to,
    }


def _data_keys(args: GRPOConfig) -> dict[str, object]:
    return {} if args.chat_template_kwargs is None else {"template_args": dict(args.chat_template_kwargs)}


def _section_keys(args: GRPOConfig, rows: int, model: str) -> dict[str, object]:
    groups, updates = _batch(args)
    batches = math.ceil(args.num_train_epochs * rows / groups)
    if args.max_steps > 0:
        batches = math.ceil(args.max_steps / (updates * args.num_iterations))
    optimizer_steps = batches * updates * args.num_iterations
    if args.lr_scheduler_type not in _SCHEDULES:
        raise UserError(f"GRPOConfig: lr_scheduler_type={args.lr_scheduler_type!r} is none of {', '.join(_SCHEDULES)}")
    per_batch = updates * args.num_iterations
    evaluates = args.eval_strategy != "no"
    every = max(1, round((args.eval_steps or 500) / per_batch))
    return {
        "rollout": {
            "engine": "vllm" if args.use_vllm else "torch",
            "prompts_per_step": groups,
            "group_size": args.num_generations,
            "max_tokens": args.max_completion_length,
            "max_context": _context(args, model),
            "temperature": args.temperature,
            "repetition": {"run_length": 0},
            "gpu_memory": args.vllm_gpu_memory_utilization,
            "tensor_parallel": args.vllm_tensor_parallel_size,
            "placement": "sleep" if args.vllm_enable_sleep_mode else "auto",
        },
        "algorithm": _algorithm(args) | {"updates_per_batch": updates, "epochs": args.num_iterations},
        "learner": {
            "lr": args.learning_rate,
            "schedule": _SCHEDULES[args.lr_scheduler_type],
            "warmup_steps": args.warmup_steps or math.ceil(args.warmup_ratio * optimizer_steps),
            "betas": [args.adam_beta1, args.adam_beta2],
            "eps": args.adam_epsilon,
            "weight_decay": args.weight_decay,
            "max_grad_norm": args.max_grad_norm,
            "gradient_checkpointing": args.gradient_checkpointing,
        },
        "train": {
            "steps": batches,
            "eval_every": (batches if args.eval_strategy == "epoch" else every) if evaluates else 0,
            "eval_samples": args.num_generations_eval or 1,
            "save_every": 0 if args.save_strategy == "no" else max(1, round(args.save_steps / per_batch)),
            "keep": args.save_total_limit or 2,
        },
    }


def _batch(args: GRPOConfig) -> tuple[int, int]:
    """(prompts of a batch of rollouts, optimizer steps on it without epochs)."""
    accumulated = args.gradient_accumulation_steps
    steps = args.steps_per_generation or accumulated
    completions = args.generation_batch_size or args.per_device_train_batch_size * steps
    if args.generation_batch_size is not None:
        steps = max(1, args.generation_batch_size // args.per_device_train_batch_size)
    if completions % args.num_generations:
        raise UserError(
            f"GRPOConfig: a batch of {completions} completions (per_device_train_batch_size x steps_per_generation) is "
            f"no multiple of num_generations {args.num_generations}"
        )
    return completions // args.num_generations, max(1, steps // accumulated)


def _context(args: GRPOConfig, model: str) -> int:
    """Longest prompt and completion together."""
    if args.vllm_max_model_length is not None:
        return args.vllm_max_model_length
    if args.max_prompt_length is not None:
        return args.max_prompt_length + args.max_completion_length
    from cispo.files import read_json
    from cispo.policies.loading import local_folder

    positions = read_json(Path(local_folder(model)) / "config.json").get("max_position_embeddings")
    wanted = args.max_completion_length + 4096
    context = min(wanted, positions) if isinstance(positions, int) else wanted
    if context <= args.max_completion_length:
        raise UserError(
            f"GRPOConfig: max_completion_length {args.max_completion_length} leaves no room for a prompt in the "
            f"{positions} positions of the model"
        )
    return context


def _algorithm(args: GRPOConfig) -> dict[str, object]:
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.loss_type == "cispo":
        keys: dict[str, object] = {"name": "trl_cispo", "ratio_max": high}
    elif args.importance_sampling_level == "sequence":
        keys = {"name": "gspo", "clip_low": args.epsilon, "clip_high": high, "advantage": "group_norm_sample"}
    elif args.loss_type in _LOSSES:
        reduction = _LOSSES[args.loss_type]
        keys = {"name": "trl_grpo", "clip_low": args.epsilon, "clip_high": high, "reduction": reduction}
        if args.delta is not None:
            keys["dual_clip"] = args.delta
    else:
        raise UserError(f"GRPOConfig: loss_type={args.loss_type!r} is none of cispo, {', '.join(_LOSSES)}")
    if args.scale_rewards in (False, "none"):
        keys["advantage"] = "group_mean"
    elif args.scale_rewards not in (True, "group"):
        raise UserError(f"GRPOConfig: scale_rewards={args.scale_rewards!r} is not supported here: group or none")
    if args.beta:
        keys |= {"kl_coef": args.beta, "kl": "k3", "kl_in": "loss"}
    if args.use_vllm and args.vllm_importance_sampling_correction:
        mode = args.vllm_importance_sampling_mode
        if mode not in _CORRECTIONS:
            raise UserError(f"GRPOConfig: vllm_importance_sampling_mode={mode!r} is none of {', '.join(_CORRECTIONS)}")
        cap = args.vllm_importance_sampling_cap
        keys |= {"ratio_anchor": "old", "correction": _CORRECTIONS[mode], "correction_high": cap}
    return keys
