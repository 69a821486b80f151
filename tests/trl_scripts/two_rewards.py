"""Two rewards on plain-text prompts: one of accuracy with a column, one of length."""

import os

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]
dataset = Dataset.from_list(rows)


def accuracy_reward(completions, answer, **kwargs):
    return [1.0 if completion.strip() == a else 0.0 for completion, a in zip(completions, answer, strict=True)]


def length_reward(completions, **kwargs):
    return [-abs(8 - len(completion)) / 8 for completion in completions]


training_args = GRPOConfig(
    output_dir=os.environ["OUTPUT"],
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_generations=4,
    max_completion_length=6,
    max_steps=2,
    learning_rate=1e-3,
    reward_weights=[1.0, 0.5],
    logging_steps=1,
    bf16=False,
    report_to="none",
)
trainer = GRPOTrainer(
    model=os.environ["MODEL"],
    reward_funcs=[accuracy_reward, length_reward],
    args=training_args,
    train_dataset=dataset,
)
trainer.train()
trainer.save_model(training_args.output_dir + "-final")
