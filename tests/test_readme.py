"""The README and the pages of docs/ say what the program does, and lead where they say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rlhf_recipes
from rlhf_recipes.data.first_rows import check_rows
from rlhf_recipes.recipe.load import load_recipe, shipped_recipes
from rlhf_recipes.stats import wilson

ROOT = Path(__file__).parents[1]
HELP = ROOT / "docs" / "commands.md"
PAGES = {str(file.relative_to(ROOT)): file for file in sorted(ROOT.glob("docs/*.md"))}
PAGES["README.md"] = ROOT / "README.md"
COMMANDS = "init run sweep plan check fork fetch recipes schema runs compare report doctor clean"
COMMANDS = [*COMMANDS.split(), *"chat export label sample feedback judge ui".split()]
MOST_LINES = 150
LINK = re.compile(r"(?:\]\(|\bsrc=\"|\bsrcset=\")([^)\s\"]+)")
each_page = pytest.mark.parametrize("page", PAGES)


def helps() -> str:
    """Every command's help, as a terminal of 80 columns shows it."""
    said = []
    for name in COMMANDS:
        words = [sys.executable, "-m", "rlhf_recipes", name, "--help"]
        environment = {**os.environ, "COLUMNS": "80", "TERMINAL_WIDTH": "80"}
        out = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
        said.append(out.stdout.strip())
    return "\n\n".join(said)


def read(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def fenced(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """What GitHub and the site call the headings: plain words, joined by hyphens."""
    bare = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.+?) *$", bare, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_commands_help_stands_on_its_page() -> None:
    shown = re.search(r"<!-- help -->\n```text\n(.*?)\n```\n", HELP.read_text(), re.DOTALL)
    assert shown and shown[1] == helps()


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= MOST_LINES


def test_the_index_names_every_page() -> None:
    named = set(re.findall(r"\]\(([\w-]+\.md)\)", read("docs/README.md")))
    assert named == {file.name for file in PAGES.values()} - {"README.md"}
    listed = re.findall(r"^  - .*: ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted({*named, "README.md"})  # the site's navigation


@each_page
def test_every_link_leads_somewhere(page: str) -> None:
    for link in LINK.findall(re.sub(r"^```.*?^```$", "", read(page), flags=re.S | re.M)):
        place, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        file = (PAGES[page].parent / place).resolve() if place else PAGES[page]
        assert file.exists(), f"{page}: {link}"
        assert ROOT / "docs" in file.parents or page == "README.md", f"{link} is not on the site"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {link}"


@each_page
def test_every_command_target_and_file_that_it_names_is_there(page: str) -> None:
    text, makefile = read(page), (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^    |`)make ([a-z]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in re.findall(r"(?:^    |`)rlhf-recipes (?:--debug )?([a-z]+)", text, re.MULTILINE):
        assert name in COMMANDS, name
    package = list((ROOT / "rlhf_recipes").rglob("*.py"))
    written = "".join(file.read_text(encoding="utf-8") for file in package)
    for name in re.findall(r"`([a-z_]+\.(?:py|json))`", text):
        assert name in {file.name for file in package} or name in written, name
    for name in re.findall(r"`((?:recipes|tools|docs)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


@each_page
def test_every_option_beside_a_command_is_its_own(page: str) -> None:
    helped = HELP.read_text()
    for line in re.findall(r"(?:^    |`)rlhf-recipes ([a-z]+ [^`\n]*)", read(page), re.MULTILINE):
        name, _, rest = line.partition(" ")
        own = helped.partition(f"Usage: rlhf-recipes {name} ")[2].partition("Usage:")[0]
        rest = re.sub(r'"[^"]*"', "", rest)  # a launcher has options of its own
        for option in re.findall(r"(?<!\S)--[a-z-]+", rest.partition("#")[0]):
            assert re.search(rf"^  (?:--[a-z]+, )?{option}\b", own, re.MULTILINE), f"{page}: {line}"


@each_page
def test_every_whole_recipe_passes_check(page: str, tmp_path: Path) -> None:
    for number, text in enumerate(fenced(page, "toml")):
        if "stages" in tomllib.loads(text):
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / "pairs.csv").write_text("question,good_answer,bad_answer\nWhy?,So.,No.\n")
            row = '{"prompt": "Why?", "chosen": "So.", "rejected": "No."}\n'
            (tmp_path / "data" / "pairs.jsonl").write_text(row)
            (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
            file = tmp_path / f"{number}.toml"
            file.write_text(text)
            recipe = load_recipe(file)
            assert not recipe.notes
            check_rows(recipe)


@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md"])
def test_the_tables_name_every_shipped_recipe(page: str) -> None:
    listed = re.findall(r"^\| `([\w-]+)` \|", read(page), re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in shipped_recipes())


def test_the_map_of_the_code_names_every_module() -> None:
    package = ROOT / "rlhf_recipes"
    rows = re.findall(r"^\| (`.*)", read("docs/design.md"), re.MULTILINE)
    names = [file for file in package.glob("*/*.py")] + list(package.glob("*.py"))
    names += [file.parent for file in package.glob("*/*/__init__.py")]
    for file in names:
        if not file.name.startswith("__"):
            home = f"`{file.parent.name}/`" if file.parent != package else f"`{file.stem}`"
            (row,) = [row for row in rows if home in row.partition(" | ")[0]]
            assert f"`{file.stem}`" in row or f"`{file.name}/`" in row, f"{file} is not in {row}"


def test_python_imports_what_there_is() -> None:
    (example,) = fenced("docs/python.md", "python")
    for node in ast.walk(ast.parse(example)):
        if isinstance(node, ast.ImportFrom) and node.module == "rlhf_recipes":
            assert {alias.name for alias in node.names} == set(rlhf_recipes.__all__)


def test_how_many_prompts_prove_what() -> None:
    page = "docs/how-many.md"
    rows = re.findall(r"^\| (\d+) \| (\d+)–(\d+) % \| ([\d.]+) % \|$", read(page), re.M)
    assert len(rows) >= 6
    for prompts, *shown, least in rows:
        count = int(prompts)
        assert shown == [f"{100 * end:.0f}" for end in wilson(0.5, count)], count
        won = next(won for won in range(count) if wilson(won / count, count)[0] > 0.5)
        assert least == f"{100 * won / count:.1f}", count


if __name__ == "__main__":  # python -m tests.test_readme: writes the help into its page
    written = re.sub(
        r"<!-- help -->\n(```text\n.*?\n```\n)?",
        lambda _: f"<!-- help -->\n```text\n{helps()}\n```\n",
        HELP.read_text(),
        flags=re.DOTALL,
    )
    HELP.write_text(written)
