"""The best of n: its numbers from its answers, and the stage added to a finished run."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest

from rlhf_recipes.data.rows import unique_prompts
from rlhf_recipes.models.reward_model import open_reward, read_floor
from rlhf_recipes.models.sampling import score_ids
from rlhf_recipes.pipeline.runner import run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages import answers
from rlhf_recipes.store.digests import derive_seed
from tests.helpers.chains import Chain
from tests.helpers.counting import Counting, toy

pytestmark = pytest.mark.train


def test_the_best_of_n_is_reckoned_from_the_start_s_own_answers(
    tiny_recipe: Path, tmp_path: Path, trained: SimpleNamespace
) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text("def rule(prompt, answer):\n    return float(len(answer))\n")
    penalty = 1.5  # of the reward that PPO trains on, and that the best is therefore best by
    changes = ["evaluation.best_of=4", f"evaluation.judge=python:{rule}:rule"]
    changes.append(f"ppo.missing_eos_penalty={penalty}")
    recipe = load_recipe(tiny_recipe, set=changes)
    chain = Chain(recipe, tmp_path / "stages", outputs=dict(trained.outputs))
    result = chain.run("best_of", {"policy": "sft", "reward_model": "reward"})
    output = chain.outputs["best_of"]
    floor = read_floor(chain.outputs["reward"])
    rows = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    curve = json.loads((output / "best_of.json").read_text())
    assert len(rows) == 12 and {len(row["answers"]) for row in rows} == {4}
    assert (curve["policy"], curve["against"], curve["n"]) == ("sft", "ppo", [1, 2, 4])

    for key, said in (("score_gain", "scores"), ("judge_gain", "judged")):
        for place, n in enumerate(curve["n"]):
            by_hand = []
            for row in rows:
                best = []
                both = zip(row["scores"], row["ended"], strict=True)
                rewards = [s if ended else min(s, floor) - penalty for s, ended in both]
                for chosen in combinations(range(4), n):
                    top = max(rewards[i] for i in chosen)
                    best.append(fmean(row[said][i] for i in chosen if rewards[i] == top))
                by_hand.append(fmean(best) - fmean(row[said]))
            assert curve[key][place] == pytest.approx(fmean(by_hand), abs=1e-9)
            if n > 1:
                assert result.metrics[f"best_of.{n}.{key}"] == curve[key][place]
                low, high = (result.metrics[f"best_of.{n}.{key}_{e}"] for e in ("low", "high"))
                half = 1.96 * math.sqrt(sum((g - fmean(by_hand)) ** 2 for g in by_hand)) / 12
                assert [low, high] == pytest.approx(
                    [fmean(by_hand) - half, fmean(by_hand) + half], abs=half / 3
                )
    assert result.metrics["best_of.4.kl"] == curve["kl"][2] == math.log(4) - 0.75
    assert curve["kl"][0] == 0.0 and "best_of.1.kl" not in result.metrics
    whole = [row["ended"][max(range(4), key=row["scores"].__getitem__)] for row in rows]
    assert not all(whole)  # the penalty has a say

    # Whose answers they are, and who says what of them.
    tested = unique_prompts(chain.session.data(chain.recipe.dataset).test)[:12]
    setting = answers.Setting(6, 1.0, 0)
    seeds = [derive_seed(derive_seed(7, "best_of"), "draw", draw) for draw in range(4)]
    draws = answers.ask(chain.session, chain.outputs["sft"], tested, setting, seeds)
    reward = None
    for place, ids in enumerate(list(draws)):
        texts = [chain.session.tokens.decode(answer) for answer in ids]
        assert texts == [row["answers"][place] for row in rows]
        eos = chain.session.tokens.eos_id
        assert [answer[-1] == eos for answer in ids] == [row["ended"][place] for row in rows]
        reward = reward or open_reward(chain.session.base, chain.outputs["reward"])
        said = [(e.prompt_ids, a) for e, a in zip(tested, ids, strict=True)]
        scores = score_ids(reward, said, 0, 5).tolist()
        assert [row["scores"][place] for row in rows] == pytest.approx(scores, abs=1e-4)
        assert [row["judged"][place] for row in rows] == [float(len(text)) for text in texts]
    assert len({tuple(row["answers"]) for row in rows}) > 6


# ---- in a finished run


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


def ran(recipe: Path, *changes: str, **options: object) -> Path:
    return run(load_recipe(recipe, set=changes), runs=recipe.parent / "runs", **options).run_folder


def test_a_run_gets_the_stage_that_it_lacks_and_nothing_else(
    tmp_path: Path, count: Counting
) -> None:
    recipe = toy(tmp_path)
    folder = ran(recipe, "evaluation.judge=independent", name="mine")
    before = json.loads((folder / "manifest.json").read_text())
    count.ran.clear()
    words = ["evaluation.judge=independent", "evaluation.best_of=8"]
    assert ran(recipe, *words, name="mine") == folder
    assert count.ran == ["best_of"] and count.exported == ["ppo"]
    after = json.loads((folder / "manifest.json").read_text())
    *others, last = after["stages"]
    assert (last["name"], last["outcome"], after["outcome"]) == ("best_of", "ran", "finished")
    assert [s["key"] for s in others] == [s["key"] for s in before["stages"]]
    ran(recipe, *words, name="mine")
    assert count.ran == ["best_of"]
