"""Prompts and completions as messages, an asynchronous reward, and an evaluation set."""

import asyncio
import os

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer


def make_conversation(example):
    return {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": example["problem"]}]}


dataset = Dataset.from_list([{"problem": f"{a}+1=", "solution": str(a + 1)} for a in range(9)]).map(make_conversation)
dataset = dataset.remove_columns("problem")


def format_reward(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [sum(character.isdigit() for character in content) / max(len(content), 1) for content in contents]


async def solution_reward(prompts, completions, solution, **kwargs):
    await asyncio.sleep(0)
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [float(c[0]["content"].startswith(s)) for c, s in zip(completions, solution, strict=True)]


def main():
    training_args = GRPOConfig(
        output_dir=os.environ["OUTPUT"],
        learning_rate=1e-3,
        num_generations=4,
        per_device_train_batch_size=8,
        max_prompt_length=32,
        max_completion_length=6,
        num_train_epochs=0.4,
        eval_strategy="steps",
        eval_steps=1,
        loss_type="cispo",
        epsilon_high=5.0,
        bf16=False,
        report_to=[],
    )
    trainer = GRPOTrainer(
        model=os.environ["MODEL"],
        reward_funcs=[format_reward, solution_reward],
        args=training_args,
        train_dataset=dataset.select(range(6)),
        eval_dataset=dataset.select(range(6, 9)),
    )
    trainer.train()


if __name__ == "__main__":
    main()
