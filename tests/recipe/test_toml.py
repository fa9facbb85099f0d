"""The line of every key, and what is too deep or too large to be read."""

from __future__ import annotations

import tomllib

from rlhf_recipes.recipe.toml import key_lines


def test_the_line_of_every_key() -> None:
    text = '''\
# a = 1
title = """one
two = 2 """""
"quo.ted" = 'x # y'
stages = [
  "sft",  # = [
  1.5, 1979-05-27T07:32:00Z,
]

[model]  # [no]
name.first = "a\\"]"
[ppo.guard]
max_kl = +8.0
d = { a = 1, "b.c" = [1, [2, { x = 1 }]] }
[[array]]
k = ""
[[array]]
k = 1'''
    tomllib.loads(text)
    assert key_lines(text) == {
        ("title",): 2,
        ("quo.ted",): 4,
        ("stages",): 5,
        ("stages", 0): 6,
        ("stages", 1): 7,
        ("stages", 2): 7,
        ("model",): 10,
        ("model", "name"): 11,
        ("model", "name", "first"): 11,
        ("ppo",): 12,
        ("ppo", "guard"): 12,
        ("ppo", "guard", "max_kl"): 13,
        ("ppo", "guard", "d"): 14,
        ("ppo", "guard", "d", "a"): 14,
        ("ppo", "guard", "d", "b.c"): 14,
        ("ppo", "guard", "d", "b.c", 0): 14,
        ("ppo", "guard", "d", "b.c", 1): 14,
        ("ppo", "guard", "d", "b.c", 1, 0): 14,
        ("ppo", "guard", "d", "b.c", 1, 1): 14,
        ("ppo", "guard", "d", "b.c", 1, 1, "x"): 14,
        ("array",): 15,
        ("array", 0): 15,
        ("array", 0, "k"): 16,
        ("array", 1): 17,
        ("array", 1, "k"): 18,
    }
