"""TRL's side of `bench_step.py`: GRPOTrainer, which waits for its turn before each step."""

from __future__ import annotations

import math
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from bench_jobs import Clock, Job, digit_share, problems

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run_peer(job: Job, pipe: Connection) -> None:
    """Steps of TRL's trainer, one for each message of the pipe."""
    from datasets import Dataset
    from trl import GRPOConfig  # pyright: ignore[reportMissingImports]

    from cispo.rollout.renderer import load_tokenizer

    cuda = job.device == "cuda"
    completions = len(job.lengths)
    own: dict[str, object] = {"use_cpu": True, "bf16": False}
    if cuda:
        assert len(set(job.lengths)) == 1, "TRL hands vLLM one length for all completions"
        own = {
            "bf16": True,
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": job.memory,
            "vllm_max_model_length": job.context,
            "generation_kwargs": {"ignore_eos": True},
        }
    config = GRPOConfig(
        output_dir=job.folder,
        loss_type="cispo",
        epsilon_high=5.0,
        beta=0.0,
        per_device_train_batch_size=job.peer_batch,
        gradient_accumulation_steps=completions // job.peer_batch,
        num_generations=job.group,
        max_completion_length=max(job.lengths),
        max_steps=job.steps,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        temperature=1.0,
        disable_tqdm=True,
        gradient_checkpointing=cuda,
        **own,
    )
    trainer = _timed_trainer(pipe)(
        model=_peer_model(job),
        reward_funcs=lambda completions, **_: [digit_share(text) for text in completions],
        args=config,
        train_dataset=Dataset.from_list(problems(512)),
        processing_class=load_tokenizer(job.model),
    )
    pipe.send("ready")
    trainer.train()
    trainer.report()


def _timed_trainer(pipe: Connection) -> type[Any]:
    """GRPOTrainer that waits before each step and reports the last one's duration."""
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOTrainer  # pyright: ignore[reportMissingImports]

    class Timed(GRPOTrainer):
        def __init__(self, **kwargs: object) -> None:
            super().__init__(**kwargs)
            self.remove_callback(PrinterCallback)
            self.clock: Clock | None = None
            self.generating = self.sampling = 0.0
            self.add_callback(Turns(self))

        def report(self) -> None:
            if self.clock is not None:
                seconds = self.clock.read(self.generating, 0.0)
                last = self.state.log_history[-1] if self.state.log_history else {}
                mismatch = last.get("sampling/sampling_logp_difference/mean", math.nan)
                pipe.send(seconds._replace(learning=seconds.step - self.sampling, mismatch=mismatch))

        def _generate_single_turn(self, *args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            result = super()._generate_single_turn(*args, **kwargs)
            self.generating += time.perf_counter() - started
            return result

        def _generate_and_score_completions(self, *args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            result = super()._generate_and_score_completions(*args, **kwargs)
            self.sampling += time.perf_counter() - started
            return result

    class Turns(TrainerCallback):
        def __init__(self, trainer: Timed) -> None:
            self.trainer = trainer

        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            self.trainer.report()
            pipe.recv()
            self.trainer.generating = self.trainer.sampling = 0.0
            self.trainer.clock = Clock()

    return Timed


def _peer_model(job: Job) -> PreTrainedModel:
    """The model in float32; on a CPU its `generate` gives completion i its length."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, LogitsProcessor, LogitsProcessorList

    plain: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(job.model))]
    if job.device == "cuda":
        return plain.from_pretrained(job.model, dtype=torch.float32)
    lengths = torch.tensor(job.lengths)

    class Lengths(LogitsProcessor):
        def __init__(self, prompt: int, eos: int) -> None:
            self.prompt, self.eos = prompt, eos

        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            sampled = input_ids.shape[1] - self.prompt
            end = scores[:, self.eos].clone()
            scores[:, self.eos] = -torch.inf
            ends = lengths == sampled + 1
            if ends.any():
                scores[ends] = -torch.inf
                scores[ends, self.eos] = end[ends]
            return scores

    def generate(self: PreTrainedModel, input_ids: torch.Tensor, **kwargs: object) -> object:
        processor = Lengths(input_ids.shape[1], self.config.eos_token_id)
        return plain.generate(self, input_ids, logits_processor=LogitsProcessorList([processor]), **kwargs)

    # Of the same name: transformers looks there for the kind of cache that a model needs.
    return type(plain.__name__, (plain,), {"generate": generate}).from_pretrained(job.model, dtype=torch.float32)
