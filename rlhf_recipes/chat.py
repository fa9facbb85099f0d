"""Talk to the model of a run: streamed, with the turns kept."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from rlhf_recipes.export import finished_stage, load_policy
from rlhf_recipes.models import device
from rlhf_recipes.progress import plain
from rlhf_recipes.recipe import load_recipe
from rlhf_recipes.shared import Shared

HELP = "type a message · an empty line forgets the conversation · Ctrl-D ends"


class _Stream(TextStreamer):
    """Prints an answer as it comes, without what a terminal would obey; keeps the whole of it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        lines = "\n".join(_keep_spaces(line) for line in text.split("\n"))
        print(lines, end="\n" if stream_end else "", flush=True)


def chat(*, run_folder: Path, stage: str | None, console: Any) -> None:
    """Read messages from stdin, write the policy's answers to stdout, until the input ends."""
    recipe = load_recipe(run_folder / "resolved.toml")
    name, _, output = finished_stage(run_folder, stage)
    shared = Shared(recipe)
    tokens = shared.tokens
    lm = load_policy(shared, output)
    ppo = [n for n in recipe.stages if recipe.table(n).kind == "ppo"]
    settings = GenerationConfig(
        max_new_tokens=recipe.dataset.max_answer_tokens,
        do_sample=True,
        temperature=recipe.table(ppo[-1]).options["temperature"] if ppo else 0.7,
        eos_token_id=tokens.eos_id,
        pad_token_id=tokens.pad_id,
    )
    torch.manual_seed(recipe.seed)
    system = recipe.dataset.system
    start = [] if system is None else [{"role": "system", "content": system}]
    turns = list(start)
    console.print(f"{name} of {run_folder.name} · {HELP}")
    while (message := _ask()) is not None:
        if not message.strip():
            turns = list(start)
            continue
        turns.append({"role": "user", "content": message})
        text = tokens.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        )
        ids = tokens.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        stream = _Stream(tokens.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.no_grad():
            lm.generate(
                input_ids=ids.to(device()),
                attention_mask=torch.ones_like(ids).to(device()),
                generation_config=settings,
                streamer=stream,
            )
        turns.append({"role": "assistant", "content": stream.text})


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _keep_spaces(text: str) -> str:
    """`plain` for a piece of a line: the spaces at its ends part words."""
    return "".join(c if c == " " else plain(c) for c in text)
