"""Talk to the model of a run: streamed, with the turns kept."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TextStreamer

from rlhf_recipes.export import finished_stage, load_policy
from rlhf_recipes.progress import plain
from rlhf_recipes.recipe import load_recipe
from rlhf_recipes.sequences import sampling
from rlhf_recipes.shared import Shared
from rlhf_recipes.tokens import encode

Quiet = Callable[[], contextlib.AbstractContextManager[None]]  # keeps the libraries' noise away
HELP = "type a message · an empty line forgets the conversation · Ctrl-D ends"


class _Stream(TextStreamer):
    """Prints an answer as it comes, without what a terminal would obey."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        lines = "\n".join(_keep_spaces(line) for line in text.split("\n"))
        print(lines, end="\n" if stream_end else "", flush=True)


def chat(*, run_folder: Path, stage: str | None, quiet: Quiet) -> None:
    """Read messages from stdin, write the policy's answers to stdout, until the input ends."""
    recipe = load_recipe(run_folder / "resolved.toml")
    name, _, output = finished_stage(run_folder, stage)
    shared = Shared(recipe)
    with quiet():
        tokens = shared.tokens
        lm = load_policy(shared, output)
    ppo = [n for n in recipe.stages if recipe.table(n).kind == "ppo"]
    settings = sampling(
        recipe.dataset.max_answer_tokens,
        recipe.table(ppo[-1]).options["temperature"] if ppo else 0.7,
        eos=tokens.eos_id,
        pad=tokens.pad_id,
    )
    torch.manual_seed(recipe.seed)
    system = recipe.dataset.system
    start = [] if system is None else [{"role": "system", "content": system}]
    turns = list(start)
    print(f"{name} of {run_folder.name} · {HELP}")
    while (message := _ask()) is not None:
        if not message.strip():
            turns = list(start)
            continue
        turns.append({"role": "user", "content": message})
        ids = torch.tensor([encode(tokens, turns)[0]], device=lm.device)
        stream = _Stream(tokens.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.no_grad():
            whole = lm.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                streamer=stream,
            )
        turns.append({"role": "assistant", "content": tokens.decode(whole[0, ids.shape[1] :])})


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _keep_spaces(text: str) -> str:
    """`plain` for a piece of a line: the spaces at its ends part words."""
    return "".join(c if c == " " else plain(c) for c in text)
