"""Supervised fine-tuning with TRL alone: load, train a LoRA, merge it, save the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config


@dataclass
class Script:
    data: str  # JSON lines: prompt and completion, or prompt and chosen


def messages(row: dict[str, Any]) -> dict[str, Any]:
    answer = row["completion"] if "completion" in row else row["chosen"]
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": answer}],
    }


if __name__ == "__main__":
    parser = HfArgumentParser((Script, SFTConfig, ModelConfig))
    script, config, model = parser.parse_args_into_dataclasses()

    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path)
    tokenizer.pad_token = config.pad_token or tokenizer.pad_token
    lm = AutoModelForCausalLM.from_pretrained(model.model_name_or_path, dtype=model.dtype)
    rows = load_dataset("json", data_files=script.data, split="train")
    rows = rows.map(messages, remove_columns=rows.column_names)

    trainer = SFTTrainer(
        model=lm,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
    )
    trainer.train()

    trainer.model.merge_and_unload().save_pretrained(config.output_dir)
    tokenizer.save_pretrained(config.output_dir)
