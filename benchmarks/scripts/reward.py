"""A reward model with TRL alone: load a sequence classifier, train a LoRA and the head, save it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
from trl import ModelConfig, RewardConfig, RewardTrainer, get_peft_config


@dataclass
class Script:
    data: str  # JSON lines: prompt, chosen, rejected


def messages(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


if __name__ == "__main__":
    parser = HfArgumentParser((Script, RewardConfig, ModelConfig))
    script, config, model = parser.parse_args_into_dataclasses()
    model.lora_task_type = "SEQ_CLS"  # else the random head stays frozen

    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        model.model_name_or_path, num_labels=1, dtype=model.dtype
    )
    rows = load_dataset("json", data_files=script.data, split="train").map(messages)

    trainer = RewardTrainer(
        model=classifier,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
    )
    trainer.train()

    trainer.model.merge_and_unload().save_pretrained(config.output_dir)
    tokenizer.save_pretrained(config.output_dir)
