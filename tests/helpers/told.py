"""A run's folder as a chain leaves it, written by hand: what its readers are tested with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tomlkit

KEY = "0123456789ab" + "0" * 52
SETTINGS = {
    "sft": {"learning_rate": 3e-4, "num_train_epochs": 2.0},
    "reward": {"learning_rate": 1e-4, "num_train_epochs": 1.0, "policy": "sft"},
    "ppo": {
        "learning_rate": 1e-4, "kl_coef": 0.15, "response_length": 48, "missing_eos_penalty": 1.0,
        "total_episodes": 640, "policy": "sft", "reward_model": "reward",
        "guard": {"max_kl": 10.0, "min_entropy": 0.1, "min_length": 0.2},
    },
}  # fmt: skip
KINDS = ["sft", "reward", "ppo", "judge", "evaluation", "best_of"]


def shares(name: str, value: float, half: float) -> dict[str, float]:
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}


# A run in which all went well.
GOOD: dict[str, Any] = {
    "sft.validation_loss_before": 4.724, "sft.validation_loss": 3.673,
    **shares("reward.accuracy", 0.9, 0.04), "reward.test_pairs": 200, "reward.margin": 1.4,
    "reward.calibration_error": 0.03, "reward.length_accuracy": 0.56,
    "reward.shorter_accuracy": 0.85, "reward.shorter_pairs": 90,
    **shares("judge.accuracy", 0.8, 0.05), "judge.test_pairs": 200, "judge.length_accuracy": 0.56,
    "judge.shorter_accuracy": 0.75, "judge.shorter_pairs": 90,
    "base.length": 47.0, "base.ended": 0.05, "base.repetition": 0.04, "base.distinct_2": 0.6,
    "sft.length": 30.0, "sft.ended": 0.96, "sft.repetition": 0.01, "sft.distinct_2": 0.62,
    "sft.kl": 53.0, "ppo.length": 33.0, "ppo.ended": 0.94, "ppo.repetition": 0.02,
    "ppo.distinct_2": 0.58, "ppo.kl": 6.2, "ppo.updates": 36, "ppo.kept_update": 24,
    "ppo.stopped": "", "ppo.minimum_accuracy": 0.55,
    **shares("ppo.win_rate", 0.9, 0.05), **shares("ppo.judge_win_rate", 0.71, 0.08),
    "ppo.ended_pairs": 118, "ppo.win_rate_ended": 0.89, "ppo.judge_win_rate_ended": 0.7,
    "ppo.like_length_pairs": 40, "ppo.win_rate_like_length": 0.88,
    "ppo.judge_win_rate_like_length": 0.68,
    **shares("ppo.score_gain", 2.17, 0.2), **shares("ppo.judge_gain", 0.34, 0.08),
    **shares("best_of.16.judge_gain", 0.4, 0.1), **shares("best_of.16.score_gain", 1.9, 0.1),
    "best_of.16.kl": 1.835, "evaluation.prompts": 128,
}  # fmt: skip


def told(
    folder: Path,
    changes: dict[str, Any] | None = None,
    *,
    kinds: list[str] = KINDS,
    recipe: dict[str, Any] | None = None,
    manifest: dict[str, Any] | None = None,
    outputs: dict[str, dict[str, str]] | None = None,
    curves: dict[str, list[dict[str, Any]]] | None = None,
    not_run: tuple[str, ...] = (),
) -> Path:
    """A run `told` in `folder`; what `changes` has of results takes the place of GOOD's, None out.

    `outputs` are files of stages' output/, `curves` the rows of their metrics.jsonl.
    """
    run, entries = folder / "runs" / "told", []
    results = {k: v for k, v in (GOOD | (changes or {})).items() if v is not None}
    for kind in kinds:
        stage = folder / "runs" / ".stages" / f"{kind}-{KEY[:12]}"
        (stage / "output").mkdir(parents=True)
        entry = {"name": kind, "kind": kind, "key": KEY, "folder": f".stages/{stage.name}"}
        entries.append(entry | {"outcome": "not run" if kind in not_run else "ran"})
        if kind not in not_run:
            record = {"key": KEY, "started": "2026", "seconds": 61.0, "summary": f"{kind} done"}
            memory = {"memory": {"process_bytes": 5e8}}
            write(stage / "stage.json", {"format": 1, "kind": kind, **record, **memory})
            sides = {"rows": 500, "train": 400, "validation": 20, "test": 80, "judge": 0}
            write(stage / "data.json", {"format": 1, **sides, "dropped": {"too long": 3}})
        for name, text in (outputs or {}).get(kind, {}).items():
            (stage / "output" / name).write_text(text)
        rows = "".join(json.dumps(row) + "\n" for row in (curves or {}).get(kind, []))
        (stage / "metrics.jsonl").write_text(rows)
    run.mkdir(parents=True)
    resolved = {"title": "Told", "stages": kinds[:3], "model": {"name": "a/model"}}
    resolved |= {"dataset": {"path": "/home/me/pairs.jsonl", "test_fraction": 0.1}}
    resolved |= {"evaluation": {"prompts": 128, "judge": "independent"}}
    resolved |= {name: {"kind": name, **SETTINGS.get(name, {})} for name in kinds[:3]}
    for table, values in (recipe or {}).items():
        resolved[table] = {**resolved.get(table, {}), **values}
    text = tomlkit.dumps(resolved)
    for name in ("recipe.toml", "resolved.toml"):
        (run / name).write_text(text)
    head = {"format": 1, "title": "Told", "recipe": "/home/me/told.toml", "outcome": "finished"}
    head |= {"ended": "2026-11-22T22:09:00+00:00", "seed": 42, "stages": entries}
    head |= {"versions": {"trl": "1.12.0"}, "hardware": {"cores": 2, "gpus": []}}
    write(run / "manifest.json", head | (manifest or {}))
    write(run / "results.json", {"format": 1, **results})
    return run


def write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value))
