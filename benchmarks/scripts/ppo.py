"""PPO with TRL alone, in the layout of TRL's own example (examples/scripts/ppo/ppo.py of 1.12).

Four models: a policy with a LoRA, a reference that is the policy without it, and a value and a
reward model that are sequence classifiers of their own, the value trained in full. Beside what the
example does: prompts go through the chat template, `--frozen_value` freezes the value model,
`--measure` keeps seconds and bytes, and a classifier whose config says its `reward_unit` is read in
that unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
)
from trl import ModelConfig, get_peft_config
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.meter import MeterCallback


@dataclass
class Script:
    data: str  # JSON lines with a prompt
    frozen_value: bool = False
    measure: str | None = None


def load_classifier(folder: str, dtype: str) -> PreTrainedModel:
    """A reward model; with its unit, if it says one, folded into the head."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
    unit = getattr(model.config, "reward_unit", None)
    if unit is not None:
        head = model.score
        head.weight.data /= unit["std"]
        shift = torch.full_like(head.weight[:, 0], -unit["mean"] / unit["std"])
        head.bias = torch.nn.Parameter(shift)
    return model


if __name__ == "__main__":
    parser = HfArgumentParser((Script, PPOConfig, ModelConfig))
    script, config, model = parser.parse_args_into_dataclasses()
    callbacks = [MeterCallback(script.measure)] if script.measure else None

    tokenizer = AutoTokenizer.from_pretrained(config.sft_model_path, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(config.sft_model_path, dtype=model.dtype)
    reward_model = load_classifier(config.reward_model_path, model.dtype)
    value_model = load_classifier(config.reward_model_path, model.dtype)
    if script.frozen_value:
        value_model.requires_grad_(False)

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        turns = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    rows = load_dataset("json", data_files=script.data, split="train")
    rows = rows.map(encode, remove_columns=rows.column_names)

    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=rows,
        callbacks=callbacks,
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.save_model(config.output_dir)
