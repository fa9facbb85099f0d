"""What ships can be checked anywhere, says whether it was ever run, and one names every key."""

from __future__ import annotations

import re
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_recipes.recipe.edit import rebase
from rlhf_recipes.recipe.fields import Field, Keys
from rlhf_recipes.recipe.kinds import listed
from rlhf_recipes.recipe.load import Recipe, load_recipe, shipped_recipes
from rlhf_recipes.recipe.tables import kinds_in, stage_keys, top_keys
from tools.make_docs import field_tables

RECIPES = {path.stem: path for path in shipped_recipes()}
ANNOTATED = RECIPES["annotated"]
KEY = re.compile(r"(#?)(\w+) = ")  # a key, or with "#" right before it one that is left out
TABLE = re.compile(r"\[+([\w.]+)\]+")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a check asked the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def data_on_hub(recipe: Recipe) -> bool:
    return not all(table.is_local for table in (recipe.dataset, *recipe.dataset.more))


# ---- every recipe


def test_they_are_all_there() -> None:
    names = "8b-24gb annotated arithmetic hh-helpful qwen-16gb"
    names += " rules smoke sorting thumbs ultrafeedback"
    assert {*names.split()} <= {*RECIPES}
    assert len(RECIPES) == len(shipped_recipes())  # none hides another: they go by their stems


@pytest.mark.parametrize("name", RECIPES)
def test_it_passes_and_leaves_nothing_unused(name: str) -> None:
    assert load_recipe(RECIPES[name]).notes == ()


@pytest.mark.parametrize("name", RECIPES)
def test_from_the_hub_it_says_whether_it_was_run_and_why_each_number(name: str) -> None:
    recipe = load_recipe(RECIPES[name])
    if recipe.model.is_local and not data_on_hub(recipe):
        return
    opening = recipe.text.partition("\ntitle = ")[0]
    assert re.search(r"Checked,\s(# )?not run|Measured", opening)
    bare = re.findall(r"^\w+ = [\d.e-]+$", recipe.text, re.MULTILINE)
    assert [line for line in bare if not line.startswith("seed")] == []


@pytest.mark.parametrize("name", RECIPES)
def test_on_data_from_the_hub_its_sizes_agree(name: str) -> None:
    recipe = load_recipe(RECIPES[name])
    for table in recipe.tables.values():
        if table.kind == "ppo" and data_on_hub(recipe):
            ppo = table.options
            update = ppo["per_device_train_batch_size"] * ppo["gradient_accumulation_steps"]
            assert ppo["total_episodes"] % update == 0
            assert ppo["local_rollout_forward_batch_size"] <= update


@pytest.mark.parametrize("name", RECIPES)
def test_an_answer_a_little_longer_than_the_longest_can_still_end(name: str) -> None:
    recipe = load_recipe(RECIPES[name])
    for table in recipe.tables.values():
        if table.of.explores:
            assert table.said("response_length") >= 1.2 * recipe.dataset.max_answer_tokens


# ---- the annotated one


@pytest.mark.parametrize("name", ["8b-24gb", "hh-helpful", "qwen-16gb", "ultrafeedback"])
def test_ppo_that_nobody_ran_takes_steps_of_a_length_that_was_measured(name: str) -> None:
    """Summed, one to two and a quarter times chat's 4.7e-3, which moved it 5.8 nats."""
    recipe = load_recipe(RECIPES[name])
    ppo, data = recipe.table("ppo").options, recipe.dataset
    assert ppo["adam_epsilon"] == 1e-5
    answers = ppo["per_device_train_batch_size"] * ppo["gradient_accumulation_steps"]
    updates = ppo["total_episodes"] // answers
    steps = updates * ppo["num_ppo_epochs"] * ppo["num_mini_batches"]
    assert updates >= 96
    assert 4.7e-3 <= steps * ppo["learning_rate"] / 2 <= 2.25 * 4.7e-3  # linear, to 0
    assert recipe.evaluation.prompts >= 200 and data.judge_fraction >= 0.1


def keys_in(keys: Keys, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key that may be set, tables gone into."""
    for name, field in keys.items():
        if not isinstance(field, Field):
            yield from keys_in(field, (*at, name))
        elif field.standing == "passed":
            yield (*at, name)


def keys_named(text: str) -> Iterator[tuple[str, ...]]:
    """The path of every key that a line holds, left out or not, and of those in its braces."""
    table: tuple[str, ...] = ()
    for line in text.splitlines():
        if header := TABLE.match(line):
            table = tuple(header[1].split("."))
        elif key := KEY.match(line):
            path = (*table, key[2])
            yield path
            inner = re.match(r"\{.*?\}", line[key.end() :])
            yield from (
                (*path, name) for name in re.findall(r"(\w+) = ", inner[0] if inner else "")
            )


def test_the_annotated_recipe_names_every_key_of_ours() -> None:
    text = ANNOTATED.read_text()
    named = set(keys_named(text))
    top = {name: keys for name, keys in top_keys().items() if name != "lora"}  # its keys are PEFT's
    assert {*keys_in(top), ("lora",)} - named == set()
    stages = kinds_in(tomllib.loads(text))
    assert {*stages.values()} == {*listed()}
    ours: set[tuple[str, ...]] = set()
    for kind in listed():
        upstream = field_tables().get(kind, {})
        own = {name: keys for name, keys in stage_keys(kind).items() if name not in upstream}
        ours |= {*keys_in(own | {"dataset": Field()})}  # [dataset] names what is in it
    assert ours - {path[1:] for path in named if path[0] in stages} == set()


def put_in(text: str, place: int) -> str:
    """`text` with the key that line `place` leaves out, and without what it stands in place of."""
    lines = text.splitlines()
    tables = [i for i, line in enumerate(lines) if TABLE.match(line)]
    first = max((i for i in tables if i <= place), default=0)
    last = min((i for i in tables if i > place), default=len(lines))
    lines[place] = lines[place].removeprefix("#")
    name = lines[place].split()[0]
    gone = {i for i in range(first, last) if i != place and lines[i].startswith(f"{name} = ")}
    instead = re.search(r"# in place of ([^:]+):", lines[place])
    for word in instead[1].split(", ") if instead else ():
        starts = [i for i, line in enumerate(lines) if re.match(rf"{re.escape(word)}(\s|$)", line)]
        assert starts, f"{name} stands in place of {word}, which is not there"
        for i in starts:
            end = min((j for j in tables if j > i), default=len(lines)) if word[0] == "[" else i + 1
            gone |= {*range(i, end)}
    return "\n".join(line for i, line in enumerate(lines) if i not in gone)


LEFT_OUT = [
    (i, line.split(" = ")[0])
    for i, line in enumerate(ANNOTATED.read_text().splitlines())
    if line.startswith("#") and KEY.match(line)
]


@pytest.mark.parametrize(("place", "key"), LEFT_OUT)
def test_each_key_that_it_leaves_out_is_right_where_it_stands(
    tmp_path: Path, place: int, key: str
) -> None:
    text = put_in(ANNOTATED.read_text(), place)
    file = tmp_path / "put-in.toml"
    file.write_text(rebase(text, ANNOTATED.parent, tmp_path))
    assert load_recipe(file).resolved() != load_recipe(ANNOTATED).resolved()


def test_alternatives_are_taken(tmp_path: Path) -> None:
    """That a key is put in, in place of another, and not beside it or nowhere."""
    found = {}
    for place, key in LEFT_OUT:
        file = tmp_path / f"{place}.toml"
        file.write_text(rebase(put_in(ANNOTATED.read_text(), place), ANNOTATED.parent, tmp_path))
        found[key] = load_recipe(file)
    assert found["#lora"].lora is None and found["#evaluation"].evaluation is None
    assert found["#reward_model"].table("ppo").reward_model == "your-name/your-model"
    assert found["#keep"].table("ppo").extras["keep"] == "last"
    assert found["#test_split"].dataset.more[0].test_split == "validation"
    assert found["#judge"].evaluation.judge == "none"
