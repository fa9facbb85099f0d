"""What Ollama needs beside a GGUF: how a conversation is written, where it ends, how to sample.

Only newer versions of Ollama run the chat template that is in the GGUF. Older ones know the
templates of some models, and send any other model the bare message. So where the template is a text
before and after each turn, the Modelfile says the same in Go's template language. A template that
does more is not translated, and a comment says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from os.path import commonprefix

from jinja2 import TemplateError

from rlhf_recipes.data.tokens import Tokens, render
from rlhf_recipes.data.turns import Messages

MARKS = {"s": "SYSTEM-TEXT", "u": "A-QUESTION", "a": "AN-ANSWER"}
ROLES = {"s": "system", "u": "user", "a": "assistant"}
# Conversations, by the first letters of their roles: without a system turn, and with one.
TRIALS = ("u", "su", "uau", "suauau")
NOT_GO = ("{{", "}}", '"""')  # what would end a text there
UNKNOWN = (
    "# The chat template is more than a text around each turn, so there is no TEMPLATE here.\n"
    "# Ollama takes the template in the GGUF, or one of its own: look at a prompt before use.\n"
)


@dataclass(frozen=True)
class Turns:
    """The texts around the turns of a conversation; `opening` is for one without a system turn."""

    opening: str
    before: dict[str, str]  # by role
    after: dict[str, str]
    answer: str  # asks for an answer

    def write(self, turns: Messages) -> str:
        opening = "" if turns[0]["role"] == "system" else self.opening
        said = (self.before[t["role"]] + t["content"] + self.after[t["role"]] for t in turns)
        return "".join([opening, *said, self.answer])

    def go(self) -> str:
        cases = " else ".join(
            f'if eq .Role "{role}" }}}}{self.before[role]}{{{{ .Content }}}}{self.after[role]}{{{{'
            for role in ROLES.values()
        )
        each = f"{{{{ range .Messages }}}}{{{{ {cases} end }}}}{{{{ end }}}}"
        return f"{{{{ if not .System }}}}{self.opening}{{{{ end }}}}{each}{self.answer}"


def modelfile(tokens: Tokens, gguf: str, *, temperature: float, system: str | None) -> str:
    """The text of a Modelfile for the file `gguf` beside it.

    Sampling is as in the run's evaluation: by temperature alone. `system` is the message that the
    run gave every prompt without one; None leaves that to the template.
    """
    turns = turns_of(tokens, system)
    texts = [] if turns is None else [turns.opening, turns.answer]
    texts += [] if turns is None else [*turns.before.values(), *turns.after.values()]
    safe = not any(sign in text for text in texts for sign in NOT_GO)
    lines = [f"FROM ./{gguf}\n", UNKNOWN]
    if turns is not None and safe and all(map(_printable, texts)):
        lines[1] = f'TEMPLATE """{turns.go()}"""\n'
    stop = tokens.tokenizer.convert_ids_to_tokens(tokens.eos_id)
    parameters = {"temperature": f"{temperature:g}", "top_k": "0", "top_p": "1", "min_p": "0"}
    parameters |= {"repeat_penalty": "1", "stop": f'"{stop}"'}
    return "".join([*lines, *(f"PARAMETER {key} {value}\n" for key, value in parameters.items())])


def _printable(text: str) -> bool:
    """Whether Ollama's parser keeps every sign: it drops what Go calls unprintable."""
    return all(sign in " \n\t" or sign.isprintable() for sign in text)


def turns_of(tokens: Tokens, system: str | None) -> Turns | None:
    """The chat template as texts around turns; None where it is not that.

    BOS is left out where the tokenizer adds it: so does Ollama.
    """
    tokenizer = tokens.tokenizer
    bos = tokenizer.bos_token or ""
    doubled = bos if tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1] else ""

    def written(roles: str, **said: str) -> str:
        given = [{"role": ROLES[r], "content": said.get(r, MARKS[r])} for r in roles]
        return render(tokenizer, given, add_generation_prompt=True).removeprefix(doubled)

    try:
        start, *between, answer = _split(written("suau"), "suau")
        [opening, _] = _split(written("u") if system is None else written("su", s=system), "u")
        # Where a question begins is what all texts before a question end with.
        question = _common_end([between[0], between[2], opening])
        made = Turns(
            opening=opening.removesuffix(question),
            before={"system": start, "user": question, "assistant": between[1]},
            after={"system": between[0].removesuffix(question), "user": ""}
            | {"assistant": between[2].removesuffix(question)},
            answer=answer,
        )
        for roles in TRIALS if system is None else TRIALS[1::2]:
            turns = [
                {"role": ROLES[r], "content": f"Turn {i},\nof {r}"} for i, r in enumerate(roles)
            ]
            wanted = render(tokenizer, turns, add_generation_prompt=True).removeprefix(doubled)
            if made.write(turns) != wanted:
                return None
    except (TemplateError, ValueError):
        return None
    return made


def _split(text: str, roles: str) -> list[str]:
    """`text` around the marks of these turns. Raises ValueError where they are not all there."""
    parts = []
    for role in roles:
        part, found, text = text.partition(MARKS[role])
        if not found:
            raise ValueError(text)
        parts.append(part)
    return [*parts, text]


def _common_end(texts: list[str]) -> str:
    return commonprefix([text[::-1] for text in texts])[::-1]
