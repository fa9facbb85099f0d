"""Text on a terminal: wrapped under its own start, and in signs that the encoding has."""

from __future__ import annotations

from rlhf_recipes.text import dressed, writable

FINDING = "✗ rows       none for reward, and the file holds 45 % of what it should"


def test_a_finding_is_wrapped_under_its_own_text() -> None:
    lines = dressed(FINDING, 40, colours=False).split("\n")
    assert lines == [
        "✗ rows       none for reward, and the",
        "             file holds 45 % of what it",
        "             should",
    ]


def test_a_number_keeps_its_unit() -> None:
    for width in range(24, 80):
        assert not any(
            line.lstrip()[:1] == "%" for line in dressed(FINDING, width, False).split("\n")
        )


def test_a_table_stays_as_it_is() -> None:
    table = "stage   time  result\nsft     1 s   " + "loss " * 30
    assert dressed(table, 40, colours=True) == table


def test_signs_that_an_encoding_lacks() -> None:
    assert writable("✓ ±9 points → plan", "ascii") == "+ +/-9 points -> plan"
    assert writable("✓ ±9 points → plan", "utf-8") == "✓ ±9 points → plan"
    assert writable("größer", "ascii") == "gr??er"
