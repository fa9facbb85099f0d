"""What the shell offers for the last word of a line."""

from __future__ import annotations

from pathlib import Path

import pytest


def completed(line: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the shell is offered for the last word of a line."""
    from typer.main import get_command

    from rlhf_recipes.cli import app

    words = line.split(" ")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    monkeypatch.setenv("_RLHF_RECIPES_COMPLETE", "complete_bash")
    said: list[str] = []
    monkeypatch.setattr("typer._click.echo", lambda text, **_: said.append(str(text)))
    with pytest.raises(SystemExit):
        get_command(app).main([], prog_name="rlhf-recipes", standalone_mode=False)
    return "\n".join(said).split()


def test_the_shell_completes_commands_recipes_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "thyme").mkdir(parents=True)
    (tmp_path / "runs" / "thyme" / "manifest.json").write_text("{}")
    (tmp_path / "thing.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert completed("rlhf-recipes ch", monkeypatch) == ["check", "chat"]
    assert completed("rlhf-recipes run th", monkeypatch) == ["thumbs", "thing.toml"]
    assert completed("rlhf-recipes chat th", monkeypatch) == ["thyme"]
    assert completed("rlhf-recipes plan --dev", monkeypatch) == ["--devices", "--device"]
