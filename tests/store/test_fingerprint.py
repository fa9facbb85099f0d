from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.store.digests import canonical, derive_seed, digest
from rlhf_recipes.store.fingerprint import (
    Identities,
    difference,
    differences,
    fingerprints,
    tables_read,
)
from tests.helpers.counting import toy


def test_the_encoding_is_the_same_for_ever() -> None:
    # A changed encoding would make every finished stage of every user run again.
    value = {"b": [1, 2.0, None], "a": {"é": True, "lr": 1e-05}}
    assert canonical(value) == b'{"a":{"lr":1e-05,"\\u00e9":true},"b":[1,2.0,null]}'
    assert digest(value) == "5328d17fc998ba13b142f32dfbe72810625843e9eb862ea4eb5bf312d20e3f2a"


def test_key_order_and_tuples_do_not_count_but_types_do() -> None:
    assert digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1})
    assert digest(1) != digest(1.0) != digest(True)
    assert digest("1") != digest(1)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": {"b": float("nan")}}, "value.a.b: nan has no stable form"),
        ([float("inf")], "value[0]: inf has no stable form"),
        ({"a": {1, 2}}, "value.a: set {1, 2} has no stable form"),
        ({"p": Path("x")}, "value.p: PosixPath PosixPath('x') has no stable form"),
        ({1: "a"}, "value: the key 1 is no string, so it has no stable form"),
    ],
)
def test_what_has_no_stable_form_is_refused(value: object, words: str) -> None:
    with pytest.raises(TypeError) as caught:
        canonical(value)
    assert str(caught.value) == words


def test_seeds_depend_on_the_place_alone() -> None:
    seeds = [derive_seed(42, "ppo", "update", n) for n in range(1000)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seeds[3] == derive_seed(42, "ppo", "update", 3) != derive_seed(43, "ppo", "update", 3)
    assert derive_seed(42, "a", "b") != derive_seed(42, "ab")


def test_differences_are_phrases() -> None:
    old = {"learning_rate": 1e-5, "lora": {"r": 16}, "data": "a" * 64, "same": [1], "gone": "x"}
    new = {"learning_rate": 2e-5, "lora": {"r": 8}, "data": "b" * 64, "same": (1,), "new": True}
    assert difference(old, new) == [
        "learning_rate 1e-05 → 2e-05",
        "lora.r 16 → 8",
        "data changed",
        'gone "x" → unset',
        "new unset → true",
    ]
    assert difference(old, old) == []


def test_differences_of_lists_of_tables_and_of_files() -> None:
    old = {"more": [{"path": "a", "weight": 0.5}], "betas": [0.9, 0.99], "model": "a" * 64}
    new = {"more": [{"path": "a", "weight": 1.0}, {"path": "b"}], "betas": [0.9, 0.95]}
    new |= {"model": "b" * 64, "judge": "c" * 64}
    assert difference(old, new) == [
        "more[1].weight 0.5 → 1.0",
        'more[2] unset → {"path": "b"}',
        "betas [0.9, 0.99] → [0.9, 0.95]",
        "model changed",
        "judge added",
    ]
    files = {"a" * 64: {"x": "1" * 64, "y": "2" * 64}, "b" * 64: {"x": "3" * 64, "z": "2" * 64}}
    told = difference({"model": "a" * 64}, {"model": "b" * 64}, contents=files)
    assert told == ["model.x changed", "model.y removed", "model.z added"]


def test_a_record_of_another_version_stops_no_comparison(tmp_path: Path) -> None:
    """Of a kind that is not known here, or of when `lora = false` was kept as None."""
    recipe = load_recipe(toy(tmp_path))
    known = {table: {"content": "0" * 64} for table in tables_read(recipe)}
    _, now = next(iter(fingerprints(recipe, Identities({}, {}, known, {}))))
    assert differences(now, now) == []
    assert differences(now | {"lora": None}, now) == ["lora unset → {}"]
    assert differences(now | {"kind": "gone", "settings": {"x": 1}}, now) == [
        'kind "gone" → "sft"', "settings.x 1 → unset", "settings.learning_rate unset → 0.001"
    ]  # fmt: skip


def test_vllm_counts_where_answers_are_sampled_and_the_other_samplers_nowhere(
    tmp_path: Path,
) -> None:
    file = toy(tmp_path)
    known = {table: {"content": "0" * 64} for table in tables_read(load_recipe(file))}

    def prints(sampler: str) -> dict[str, dict]:
        recipe = load_recipe(file, set=[f"model.sampler={sampler}"])
        return dict(fingerprints(recipe, Identities({}, {}, known, {})))

    usual, vllm = prints("auto"), prints("vllm")
    assert prints("merged") == prints("adapters") == usual
    assert [name for name in usual if usual[name] != vllm[name]] == ["ppo", "evaluation"]
    assert differences(usual["ppo"], vllm["ppo"]) == ['settings.sampler unset → "vllm"']
