"""Seeded mutations of the shipped recipes: whatever a file holds, `check` answers, and soon.

    python tools/fuzz.py [CASES] [SEED]

Each case is one or a few mutations of one recipe, checked in this process as `check` does it, with
`--resolved` where nothing is wrong. A traceback, a problem that is no line of plain text, or more
than two seconds of processor time is a finding; the mutant is kept and its path printed.
"""

import contextlib
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from rlhf_recipes.errors import RecipeError, UsageError
from rlhf_recipes.recipe.aliases import names
from rlhf_recipes.recipe.edit import rebase
from rlhf_recipes.recipe.fields import Field
from rlhf_recipes.recipe.kinds import listed
from rlhf_recipes.recipe.load import load_recipe, shipped_recipes
from rlhf_recipes.recipe.tables import stage_keys, top_keys
from rlhf_recipes.recipe.toml import WORD

SECONDS, MEGABYTES = 2.0, 200

TABLES = [
    "model",
    "model.mirror",
    "lora",
    "dataset",
    "evaluation",
    "rounds",
    "sft.dataset",
    "ppo.guard",
    *listed(),
]
INNER = (key for keys in top_keys().values() if not isinstance(keys, Field) for key in keys)
KEYS = sorted({*top_keys(), *INNER, *(key for kind in listed() for key in stage_keys(kind))})
KEYS += [
    n.replace("*", "x") for said in names().values() for theirs in said.values() for n in theirs
]
VALUES = [
    *("true", "false", "0", "1", "-1", "0.5", "1e400", "nan", "-inf", "0x7f", "1_000", "1e-9"),
    *("9" * 19, "9" * 150, "0x" + "f" * 150, "1979-05-27T07:32:00Z", "07:32:00", "1979-05-27"),
    *('""', "'./'", '"~"', '"~nobody/x"', '"../../../etc"', '"/dev/zero"', '"none"', '"auto"'),
    *('"\\u0000"', '"\\u001b[2J"', '"\\u202e"', '"a/b"', '"a\\nb"', '"python:x.py:f"'),
    *(f'"{"x" * 5000}"', f'"./{"y" * 300}"', f'"./{"z/" * 3000}"'),
    *('"(a+)+$"', '"(.|.)*(.|.)*x"', '".*"', '"("', '"[a-z_.]?"', '"a{9}{9}"'),
    *("[]", "{}", "[[]]", "[{}]", '["sft", "sft"]', "[1, 'a', {}]", "{ a = { b = [1] } }"),
    *("[" * 20 + "]" * 20, "[" * 40 + "]" * 40, "{a=" * 40 + "1" + "}" * 40, "{ kind = 'ppo' }"),
]  # fmt: skip
HUGE = [
    "[" * 50_000,
    "a = " + "{ a = " * 20_000,
    "a" + ".a" * 40_000 + " = 1",
    "a" + " . a" * 20_000 + " = 1",
    "[a" + ".a" * 40_000 + "]",
    "a = " + "1" * 90_000,
    "a = 0x" + "f" * 90_000,
    'a = """' + '\\"""' * 20_000,
    "'''" * 30_000,
    "\\" * 90_000,
    "\n".join(f"k{n}=1" for n in range(10_000)),
    "\n".join(f"[t{n}]" for n in range(10_000)),
    "\n".join("[[dataset]]" for _ in range(8_000)),
    "stages = [" + ",".join(f"'s{n}'" for n in range(10_000)) + "]",
    "[sft]\n" + "\n".join(f"lerning_rate{n}=1" for n in range(4_000)),
    "sft = {" + ",".join(f"k{n}=1" for n in range(9_000)) + "}",
    "x" * 10_000_000,
    "# " * 10_000_000,
]


def of_bytes(text: str, draw: Random) -> bytes:
    raw = bytearray(text.encode())
    for _ in range(draw.randint(1, 4)):
        place, what = draw.randrange(len(raw) + 1), draw.randrange(4)
        if what == 0:
            raw[place:place] = draw.randbytes(draw.randint(1, 4))
        elif what == 1:
            del raw[place : place + draw.randint(1, 40)]
        elif what == 2:
            raw[place : place + 1] = draw.choice(b"\"'[]{}=.,#\n\r\t\\\0\xff\xc3").to_bytes()
        else:
            raw[place:place] = raw[place - draw.randint(1, 200) : place]
    return bytes(raw)


def of_words(text: str, draw: Random) -> str:
    words = list(WORD.finditer(text))
    one, other = draw.choice(words), draw.choice(words)
    new = draw.choice(["", other[0], one[0] * 2, draw.choice(VALUES), draw.choice("[]{}=.,\n")])
    return text[: one.start()] + new + text[one.end() :]


def of_lines(text: str, draw: Random) -> str:
    lines = text.split("\n")
    place, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    match draw.randrange(3):
        case 0:
            del lines[place]
        case 1:
            lines.insert(place, lines[other])
        case _:
            lines[place], lines[other] = lines[other], lines[place]
    return "\n".join(lines)


def of_keys(text: str, draw: Random) -> str:
    """A key misspelt, another's, or a new one."""
    lines = text.split("\n")
    place = draw.choice([n for n, line in enumerate(lines) if "=" in line and line[0] != "#"])
    key, _, rest = lines[place].partition("=")
    cut = draw.randrange(len(key))
    new = [key[:cut] + key[cut + 1 :], key[:cut] + draw.choice("aeiou_.") + key[cut:]]
    lines[place] = f"{draw.choice([*new, draw.choice(KEYS), f'{key}.x'])} = {rest}"
    return "\n".join(lines)


def of_values(text: str, draw: Random) -> str:
    lines = text.split("\n")
    place = draw.choice([n for n, line in enumerate(lines) if "=" in line and line[0] != "#"])
    lines[place] = f"{lines[place].partition('=')[0]}= {draw.choice(VALUES)}"
    return "\n".join(lines)


def of_tables(text: str, draw: Random) -> str:
    """A key in a table that may be there or not; a table more, as a table or in an array."""
    table, key = draw.choice(TABLES), draw.choice(KEYS)
    line = f"{key} = {draw.choice(VALUES)}"
    if f"[{table}]\n" in text:
        return text.replace(f"[{table}]\n", f"[{table}]\n{line}\n", 1)
    head = draw.choice([f"[{table}]", f"[[{table}]]", f"[{table}.{key}]", f"[{key}]"])
    return f"{text}\n{head}\n{line}\n"


def of_size(text: str, draw: Random) -> str:
    huge = draw.choice(HUGE)
    return huge if draw.random() < 0.5 else text + "\n" + huge


MUTATIONS = [of_bytes, of_words, of_lines, of_keys, of_values, of_tables]


def words(draw: Random) -> dict[str, list[str]]:
    """What may stand behind --set and --unset."""
    said: dict[str, list[str]] = {"set": [], "unset": []}
    for _ in range(draw.randint(1, 3)):
        path = draw.choice([*TABLES, "", "a.b"]).split(".") + [draw.choice(KEYS)]
        key = ".".join(filter(None, path)) + draw.choice(
            ["", "", "", ".x", ".", " y", "\0", ".z" * 50]
        )
        if draw.random() < 0.2:
            said["unset"].append(key)
        else:
            raw = draw.choice([*VALUES, "", "x", "{a = 1} # b", "1\nseed = 2", "[" * 9_000, '"'])
            said["set"].append(draw.choice([f"{key}={raw}"] * 9 + [key]))
    return said


def mutant(draw: Random, texts: list[str]) -> tuple[str | bytes, dict[str, list[str]]]:
    text: str | bytes = draw.choice(texts)
    if draw.random() < 0.02:
        return of_size(text, draw), {}
    said = words(draw) if draw.random() < 0.25 else {}
    for _ in range(draw.choice([0, 1, 1, 2, 3]) if said else draw.choice([1, 1, 1, 2, 3, 8])):
        with contextlib.suppress(IndexError, ValueError):  # nothing is left to mutate
            text = draw.choice(MUTATIONS)(text if isinstance(text, str) else text.decode(), draw)
    return text, said


def try_one(path: Path, said: dict[str, list[str]]) -> str:
    """What `check` comes to: "right", "wrong" or "no call". Raises whatever it should not."""
    import tomlkit

    try:
        recipe = load_recipe(path, **said)
    except UsageError as error:
        assert "\n" not in str(error), error
        return "no call"
    except RecipeError as error:
        lines = str(error).split("\n")
        assert len(lines) == len(error.problems) > 0, lines
        assert all(line.isprintable() and line for line in lines), lines
        return "wrong"
    tomlkit.dumps(recipe.resolved())
    rebase(recipe.text, path.parent, path.parent.parent)
    return "right"


def fuzz(cases: int, seed: int, folder: Path) -> tuple[Counter[str], list[str], float]:
    """Outcomes, findings, and the seconds of the slowest case."""
    home = folder / "recipes"
    shutil.copytree(shipped_recipes()[0].parent, home)
    texts = [path.read_text(encoding="utf-8") for path in sorted(home.glob("*.toml"))]
    outcomes: Counter[str] = Counter()
    findings, slowest = [], 0.0
    for case in range(cases):
        text, said = mutant(Random(f"{seed} {case}"), texts)
        path = home / "mutant.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
        began, found = time.process_time(), ""
        try:
            outcomes[try_one(path, said)] += 1
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        took = time.process_time() - began
        slowest = max(slowest, took)
        if took > SECONDS:
            found = found or f"{took:.1f} s"
        if found:
            kept = path.rename(folder / f"case-{case}.toml")
            findings.append(f"{kept} {said}: {found[:500]}")
    return outcomes, findings, slowest


def main(cases: int = 10_000, seed: int = 0) -> int:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    outcomes, findings, slowest = fuzz(cases, seed, folder)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(*findings, sep="\n")
    said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"{cases} mutants of seed {seed}: {said}; {len(findings)} findings")
    print(f"slowest {slowest:.2f} s of processor time; at most {memory:.0f} MB")
    if not findings:
        shutil.rmtree(folder)
    return bool(findings) or memory > MEGABYTES


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
