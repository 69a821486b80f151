"""Configures and builds an engine of vLLM: arguments by device, cache size, our models and weight transfer.

Imports vLLM when called, which takes about 9 s in a new process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from cispo.engines.draft_arguments import check_path, check_states, drafts_of, proposed_on
from cispo.errors import UserError
from cispo.files import read_json
from cispo.policies.families import FAMILIES, PARSED, POLICY_MODEL, family_of
from cispo.policies.loading import check_weights
from cispo.policies.replay import ROUTES_KEY
from cispo.recipe.drafts import asks_heads
from cispo.runtime.start_parts import Parts
from cispo.weights.vllm_receiver import TRANSFER_BACKEND, register_transfer_backend

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.config import SchedulerConfig, VllmConfig
    from vllm.v1.executor import Executor

# Read when vLLM and torch are imported. One process holds the whole engine: the two that vLLM would spawn import it
# again, 20 s. Without compilation the sampler's helpers start 2 s sooner and run as fast.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

_EXTENSION = "cispo.engines.vllm_logprobs.RecorderExtension"


# Modules that an engine of one process loads for its device, beside those that `vllm` brings.
_OF_A_WORKER = ("vllm.v1.engine.core", "vllm.v1.engine.core_client", "vllm.v1.executor.uniproc_executor")
_OF_A_GPU = ("vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu.model_runner")
_OF_A_CPU = ("vllm.v1.worker.cpu_worker",)


def import_vllm(*, exact: bool, folder: Path | None = None) -> None:
    """Imports vLLM with our settings, and registers our models and weight transfer; a second call does little.

    `exact`: float32 products in Triton's kernels are true float32. The class of the model in `folder` is imported too.
    """
    import torch._dynamo

    for name, value in (_ENVIRONMENT | ({"TRITON_F32_DEFAULT": "ieee"} if exact else {})).items():
        os.environ.setdefault(name, value)
    torch._dynamo.config.disable = True  # the environment is read once, perhaps before this call
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # says that a CPU has no Triton

    from vllm import LLMEngine  # noqa: F401
    from vllm.platforms import current_platform

    _register_models()
    _leave_classes_alone()
    _search_any_module()
    register_transfer_backend()
    if folder is not None:
        _import_model(read_json(folder / "config.json").get("architectures"))
    for module in (*_OF_A_WORKER, *(_OF_A_GPU if current_platform.device_type == "cuda" else _OF_A_CPU)):
        # One that this machine lacks may not be needed; vLLM says so when it is.
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def start_vllm(
    arguments: Mapping[str, Any], *, memory: float, record_routes: bool = False, parts: Parts | None = None
) -> LLMEngine:
    """Builds the engine; `memory` is the share of a GPU's memory that its cache may take. With `record_routes` the
    worker has the methods of `vllm_routes`. The seconds of the start are left in `parts`: import, config, load (of
    weights, on a device), profile, cache, warm_up and graphs, which is a part of warm_up.

    Raises UserError where vLLM refuses the model or an argument.
    """
    parts = Parts() if parts is None else parts
    exact = arguments["dtype"] == "float32"
    with parts.timed("import"):
        # A class may touch CUDA, which workers that are forked could not use then.
        alone = arguments["tensor_parallel_size"] == 1
        import_vllm(exact=exact, folder=Path(arguments["model"]) if alone else None)

    from vllm import EngineArgs, LLMEngine
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform
    from vllm.v1.executor import Executor

    device = current_platform.device_type
    transfer = WeightTransferConfig(backend=TRANSFER_BACKEND)
    unknown = arguments.keys() - {field.name for field in dataclasses.fields(EngineArgs)}
    if unknown:
        raise UserError(f"rollout.engine_args: vLLM's engine has no argument {min(unknown)!r}")
    by_device = _cuda_arguments(arguments, exact) if device == "cuda" else {"enforce_eager": True}
    with parts.timed("config"):
        own = _own_arguments(Path(arguments["model"]), arguments)
        recorded = _recording(arguments) if record_routes else {}
        drafts = {**proposed_on(device, arguments), "worker_extension_cls": _EXTENSION} if drafts_of(arguments) else {}
        added = {**own, **recorded, **drafts}
        settings = EngineArgs(**{"weight_transfer_config": transfer, **by_device, **arguments, **added})
        try:
            config = settings.create_engine_config()
        except ValueError as error:
            raise UserError(f"vLLM refuses {arguments['model']}: {_reason(error)}") from error
    check_states(config)
    if device == "cpu":
        _check_cpu(config)
    if config.cache_config.kv_cache_memory_bytes is None and "gpu_memory_utilization" not in arguments:
        config.cache_config.kv_cache_memory_bytes = min(_cache_bytes(config), _free_bytes(device, memory))
    choose_scheduler(config.scheduler_config)
    try:
        # As LLMEngine.from_vllm_config, in this process.
        return LLMEngine(
            vllm_config=config,
            executor_class=_timed(Executor.get_class(config), parts),
            log_stats=not settings.disable_log_stats,
        )
    except SafetensorError as error:
        raise UserError(f"{arguments['model']}: a weight file is broken or cut short: {error}") from error


def choose_scheduler(config: SchedulerConfig) -> None:
    """Ours, unless `rollout.engine_args` name another one."""
    from cispo.engines.vllm_scheduler import SteadyAsyncScheduler, SteadyScheduler

    if config.scheduler_cls is None:
        config.scheduler_cls = SteadyAsyncScheduler if config.async_scheduling else SteadyScheduler


def _timed(executor: type[Executor], parts: Parts) -> type[Executor]:
    """The class of executors, with the seconds of each phase of their start left in `parts`."""
    base: Any = executor

    class Timed(base):
        def _init_executor(self) -> None:
            with parts.timed("load"):
                super()._init_executor()
            worker: Any = getattr(getattr(self, "driver_worker", None), "worker", None)
            runner: Any = getattr(worker, "model_runner", None)
            if hasattr(runner, "capture_model"):
                runner.capture_model = parts.counted("graphs", runner.capture_model)

        def determine_available_memory(self) -> list[int]:
            with parts.timed("profile"):
                return super().determine_available_memory()

        def initialize_from_config(self, kv_cache_configs: Any) -> None:
            with parts.timed("cache"):
                super().initialize_from_config(kv_cache_configs)

        def compile_or_warm_up_model(self) -> None:
            with parts.timed("warm_up"):
                super().compile_or_warm_up_model()

    return Timed


def _register_models() -> None:
    """Registers the families' models as classes: to inspect a lazy one, vLLM starts a process, 8 s on a new machine."""
    from vllm import ModelRegistry

    from cispo.policies.vllm_plugin import HEADS, HEADS_MODEL, register

    register()
    for family in FAMILIES.values():
        if family.vllm is not None:
            for architecture in family.vllm.architectures:
                ModelRegistry.register_model(architecture, resolve_name(family.vllm.model))
    ModelRegistry.register_model(HEADS, resolve_name(HEADS_MODEL))


def _import_model(architectures: object) -> None:
    """Registers vLLM's own model as a class, for the reason of `_register_models`."""
    from vllm import ModelRegistry

    for name in architectures if isinstance(architectures, list) else ():
        lazy: Any = ModelRegistry.models.get(name)
        if hasattr(lazy, "class_name"):
            # Whatever its import breaks, vLLM says when it is told to load it.
            with contextlib.suppress(Exception):
                ModelRegistry.register_model(name, resolve_name(f"{lazy.module_name}:{lazy.class_name}"))


def _own_arguments(folder: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments of a policy that vLLM reads by our parser. Raises UserError where vLLM cannot sample it."""
    config, heads = read_json(folder / "config.json"), asks_heads(arguments)
    family = family_of(config).vllm
    if not heads and (family is None or family.parser is None):
        return {}
    from cispo.policies.hybrid.vllm_plan import check_context, plan_of

    dtype, ranks = getattr(torch, arguments["dtype"]), arguments["tensor_parallel_size"]
    plan = plan_of(config, folder, dtype, ranks, heads=heads)
    assert family is not None and family.parser is not None, "other families have no heads"
    resolve_name(family.parser)  # registers itself
    check_context(plan, arguments["max_model_len"])
    if heads:
        from cispo.policies.hybrid.vllm_config import name_heads

        check_path(folder)
        if arguments["load_format"] != "dummy":
            check_weights(folder, heads=True)
        name_heads()
    if arguments.get("config_format", PARSED) != PARSED:
        return {}
    from cispo.policies.hybrid.vllm_config import cached_heads

    overrides = {**(arguments.get("hf_overrides") or {}), **cached_heads(config, folder, ranks)}
    return {"config_format": PARSED, "hf_overrides": overrides}


def _leave_classes_alone() -> None:
    """Keeps vLLM's Transformers backend from changing transformers' own classes, which a learner of this process uses.

    The backend prepares a decoder's class for compilation, which is off here: instances that vLLM did not make would
    lack the attributes that its `__call__` reads (seen with vLLM 0.32).
    """
    from vllm.model_executor.models.transformers.base import Base

    Base._decorate_for_torch_compile = lambda self: None


def _search_any_module() -> None:
    """Lets vLLM look for its kernels in every module of the process, also in one that answers any attribute.

    The search reads `vars` of all objects; that of llvmlite's library, which numba loads, is a function (vLLM 0.32).
    """
    from vllm.triton_utils import dispatcher

    def attributes(value: object) -> Mapping[str, object]:
        found = vars(value)
        return found if isinstance(found, Mapping) else {}

    dispatcher.vars = attributes  # pyright: ignore[reportAttributeAccessIssue]  found before the builtin


def _cuda_arguments(arguments: Mapping[str, Any], exact: bool) -> dict[str, Any]:
    """Whole decode steps as CUDA graphs, captured without compiling, which would take minutes; `exact` runs eagerly.

    float32 is for checks: its grouped products read sizes on the host, which a graph cannot hold.
    """
    common = {
        "worker_extension_cls": _EXTENSION,
        # FlashInfer tunes kernels of quantised and fused layers, which no policy has: it is imported in vain.
        "kernel_config": {"enable_flashinfer_autotune": False},
        # The cache has a size of its own, and several engines may start on one GPU at a time.
        "gpu_memory_utilization": 0.01,
    }
    if exact:
        return common | {"enforce_eager": True}
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": _graph_sizes(arguments)}
    return common | {"compilation_config": graphs}


def _recording(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that make our models keep their routers' choices, and give the worker methods to read them."""
    config = {**(arguments.get("additional_config") or {}), ROUTES_KEY: True}
    return {"additional_config": config, "worker_extension_cls": _EXTENSION}


def _graph_sizes(arguments: Mapping[str, Any]) -> list[int]:
    """Tokens of the batches that get a graph, with their drafts; others are padded to the next, by a quarter at most
    above 8 sequences. A head reads one token of each sequence behind its first draft."""
    sequences, each = arguments["max_num_seqs"], 1 + drafts_of(arguments)
    sizes = {1, 2, 4, 8, *range(16, 128, 16), *range(128, 256, 32), *range(256, 1025, 64)}
    sizes = {size for size in sizes if size < sequences} | {sequences}
    one_each = sizes if asks_heads(arguments) else set()
    return sorted({each * size for size in sizes} | one_each)


def _reason(error: ValueError) -> str:
    """The first complaint, on one line, with the argument that it is about."""
    from pydantic import ValidationError

    text = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        text = ": ".join([".".join(map(str, first["loc"])), first["msg"]]).removeprefix(": ")
    return " ".join(text.split())


def _check_cpu(config: VllmConfig) -> None:
    """UserError where vLLM's attention on a CPU cannot run the model."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    model, sizes = config.model_config, CPUAttentionBackend.get_supported_head_sizes()
    # The plan of a policy pads heads to such a size, or caches latents, which are read without this backend.
    planned = model.architecture in POLICY_MODEL.architectures
    if not planned and not model.use_mla and model.get_head_size() not in sizes:
        raise UserError(f"head_dim {model.get_head_size()} cannot be sampled on a CPU, which takes one of {sizes}")


def _free_bytes(device: str, memory: float) -> int:
    """Memory that a cache may take: a share of a GPU's, a quarter of the free memory on a CPU."""
    import psutil

    if device == "cpu":
        return psutil.virtual_memory().available // 4
    return int(torch.cuda.get_device_properties(0).total_memory * memory)


def _cache_bytes(config: VllmConfig) -> int:
    """Memory for `max_num_seqs` sequences of full length.

    A page holds one block of keys and values of a softmax layer, or the state of one sequence in a linear layer, padded
    to whole blocks. Short of pages, vLLM preempts sequences and recomputes them.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.utils.torch_utils import get_dtype_size

    from cispo.policies.vllm_plugin import drafts_by_heads

    model, parallel = config.model_config, config.parallel_config
    softmax = model.get_num_layers_by_block_type(parallel, "attention")
    linear = model.get_num_layers(parallel) - softmax
    block = config.cache_config.block_size
    token_bytes = 2 * model.get_num_kv_heads(parallel) * model.get_head_size() * get_dtype_size(model.dtype)
    if linear:
        policy: Any = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)[0]
        shapes = policy.get_mamba_state_shape_from_config(config)
        dtypes = policy.get_mamba_state_dtype_from_config(config)
        if hasattr(policy, "count_cached_states"):
            linear = policy.count_cached_states(model)
        state = sum(math.prod(s) * get_dtype_size(d) for s, d in zip(shapes, dtypes, strict=True))
        block *= math.ceil(state / (block * token_bytes))
        # vLLM puts layers of a kind into groups of one size and pads the last group.
        group = min(softmax, linear) or linear
        softmax, linear = (math.ceil(layers / group) * group for layers in (softmax, linear))
    softmax += drafts_by_heads(config)  # the head's layer
    # With prefix caching a sequence keeps the states of up to three blocks.
    states = linear * (3 if config.cache_config.enable_prefix_caching else 1)
    pages = softmax * math.ceil(model.max_model_len / block) + states
    return (config.scheduler_config.max_num_seqs + 1) * pages * block * token_bytes
