"""An independent judge on a base of its own, with another architecture and another tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, GPTNeoXForCausalLM

from rlhf_recipes.data.tokens import encode
from rlhf_recipes.errors import ModelError
from rlhf_recipes.models.reward_model import open_reward
from rlhf_recipes.models.sampling import score_ids
from rlhf_recipes.pipeline import fit, runner
from rlhf_recipes.pipeline.plan import plan_run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.report.facts import Facts
from rlhf_recipes.report.policy_rules import winning
from rlhf_recipes.stages.session import Session, check_models
from tests.helpers.architectures import save_model
from tests.helpers.tiny import byte_tokenizer

pytestmark = pytest.mark.train

SHORT = ["sft.max_steps=2", "reward.max_steps=2", "ppo.total_episodes=16", "evaluation.prompts=6"]
ROOM = ["dataset.max_prompt_tokens=64", "dataset.max_answer_tokens=64"]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX that reads and writes bytes."""
    folder = tmp_path_factory.mktemp("other")
    byte_tokenizer().save_pretrained(folder)
    words = {"vocab_size": 265, "num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 2}
    return save_model(folder, "gpt_neox", **words)


@pytest.fixture(autouse=True)
def quick(stages_alone: None) -> None: ...


def changes(other: Path, *more: str) -> list[str]:
    judge = ["evaluation.judge=independent", f"evaluation.judge_model={other}"]
    return [*SHORT, *ROOM, *judge, *more]


def test_a_judge_on_another_base_reads_the_answers_in_its_own_ids(
    tiny_recipe: Path, other: Path
) -> None:
    recipe = load_recipe(tiny_recipe, set=changes(other, "evaluation.best_of=2"))
    check_models(recipe)
    done = runner.run(recipe, runs=tiny_recipe.parent / "runs", name="mine")
    stages = {one.stage.name: one.stage for one in done.stages}
    assert stages["judge"].payload["model"] != stages["reward"].payload["model"]
    session = Session(recipe, {})
    judging = session.of("judge")
    assert session.of("reward") is session and judging.base.lm.config.model_type == "gpt_neox"
    judge = open_reward(judging.base, stages["judge"].folder / "output")
    file = stages["evaluation"].folder / "output" / "answers.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    read = []
    for row in rows:
        turns = [{"role": "user", "content": row["prompt"]}]
        ids, said = encode(judging.tokens, turns, row["answers"]["ppo"])
        read.append((ids, said if row["ended"]["ppo"] else said[:-1]))
    scores = score_ids(judge, read, judging.tokens.pad_id, 16).tolist()
    assert [row["judged"]["ppo"] for row in rows] == pytest.approx(scores, abs=1e-3)
    assert len({round(score, 3) for score in scores}) > 1
    assert "best_of.2.judge_gain" in done.results


def test_what_the_judge_is_on_changes_the_judge_and_what_asks_it(
    tiny_recipe: Path, other: Path
) -> None:
    runs = tiny_recipe.parent / "runs"
    keys = []
    for words in (changes(other), [*SHORT, *ROOM, "evaluation.judge=independent"]):
        plan = plan_run(load_recipe(tiny_recipe, set=words), runs)
        keys.append({stage.name: stage.key for stage in plan.stages})
    differ = {name for name in keys[0] if keys[0][name] != keys[1][name]}
    assert differ == {"judge", "evaluation"}


def test_the_recipes_own_base_is_not_another(tiny_recipe: Path, tiny_model: Path) -> None:
    recipe = load_recipe(tiny_recipe, set=changes(tiny_model))
    with pytest.raises(ModelError, match="judge_model is the recipe's own base"):
        plan_run(recipe, tiny_recipe.parent / "runs")


def test_the_memory_rule_looks_at_both_bases(tiny_recipe: Path, other: Path) -> None:
    plan = plan_run(load_recipe(tiny_recipe, set=changes(other)), tiny_recipe.parent / "runs")
    session = Session(plan.recipe, plan.model)
    config = fit.architecture(session.model_folder)
    room = fit.Room(plan.recipe, config, session, judge=fit.judging(plan))
    stages = {stage.name: stage for stage in plan.stages}
    own = 4 * sum(p.numel() for p in GPTNeoXForCausalLM.from_pretrained(other).parameters())
    assert room.need(stages["judge"])["weights"] == pytest.approx(own, abs=500)
    large = AutoConfig.from_pretrained(other, num_hidden_layers=4, intermediate_size=4096)
    larger = fit.Room(plan.recipe, config, session, judge=large)
    both = [one.need(stages["evaluation"]).total() for one in (room, larger)]
    assert both[0] < both[1]


def test_a_win_by_a_judge_on_another_base_is_a_success(tmp_path: Path) -> None:
    numbers = {"ppo.judge_win_rate": 0.71, "ppo.kl": 6.2, "evaluation.prompts": 128}
    run = tmp_path / "run"
    run.mkdir()
    stages = [{"name": n, "kind": n, "folder": f".stages/{n}-1"} for n in ("sft", "ppo")]
    (run / "manifest.json").write_text(json.dumps({"format": 1, "stages": stages}))
    (run / "results.json").write_text(json.dumps({"format": 1, **numbers}))
    (run / "resolved.toml").write_text('[evaluation]\njudge = "independent"\njudge_model = "./x"')
    (first, *_) = winning(Facts(run))
    assert first.level == "success"
    assert "by a second reward model on another base, at 6.2 nats." in first.text
