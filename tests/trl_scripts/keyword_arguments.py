"""A model object and a tokenizer, LoRA, and one callable reward that takes everything by `**kwargs`."""

import os

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

model = AutoModelForCausalLM.from_pretrained(os.environ["MODEL"])
tokenizer = AutoTokenizer.from_pretrained(os.environ["MODEL"])
dataset = load_dataset("json", data_files=os.environ["ROWS"], split="train")
SCALE = {"easy": 1.0, "hard": 2.0}


class Scorer:
    __name__ = "scorer"

    def __call__(self, **kwargs):
        prompts, completions, levels = kwargs["prompts"], kwargs["completions"], kwargs["level"]
        assert len(prompts) == len(completions) == len(kwargs["completion_ids"])
        kwargs["log_metric"]("step", kwargs["trainer_state"].global_step)
        return [SCALE[level] * len(ids) / 8 for level, ids in zip(levels, kwargs["completion_ids"], strict=True)]


trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=Scorer(),
    args=GRPOConfig(
        output_dir=os.environ["OUTPUT"],
        num_generations=4,
        per_device_train_batch_size=4,
        num_iterations=2,
        max_completion_length=6,
        max_steps=4,
        beta=0.04,
        loss_type="dr_grpo",
        scale_rewards=False,
        lr_scheduler_type="cosine",
        warmup_ratio=0.25,
        gradient_checkpointing=False,
        bf16=False,
        report_to="none",
    ),
    train_dataset=dataset,
    peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
)
trainer.train()
