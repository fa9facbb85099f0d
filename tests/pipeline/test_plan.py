from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_recipes.errors import UsageError
from rlhf_recipes.pipeline.plan import Plan, plan_run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.store.files import write_json
from tests.helpers.counting import RECIPE, toy
from tests.helpers.records import finish
from tests.helpers.worlds import HEAD

STAGES = ["sft", "reward", "ppo", "evaluation"]


def plan(recipe: Path, *changes: str, **options: object) -> Plan:
    return plan_run(load_recipe(recipe, set=changes), recipe.parent / "runs", **options)


def reasons(planned: Plan) -> dict[str, str]:
    return {stage.name: stage.reason for stage in planned.stages if not stage.done}


def test_stages_and_what_serves_their_roles(tmp_path: Path) -> None:
    planned = plan(toy(tmp_path))
    assert [(s.name, s.kind, s.index, s.done) for s in planned.stages] == [
        (name, name, index, False) for index, name in enumerate(STAGES)
    ]
    assert [s.inputs for s in planned.stages] == [
        {},
        {"policy": "sft"},
        {"policy": "sft", "reward_model": "reward"},
        {"policy:sft": "sft", "policy:ppo": "ppo", "reward_model": "reward"},
    ]
    sft, reward, ppo, _ = planned.stages
    assert ppo.payload["inputs"] == {"policy": sft.key, "reward_model": reward.key}
    assert ppo.folder == tmp_path / "runs" / ".stages" / f"ppo-{ppo.key[:12]}"
    assert planned.run_folder == tmp_path / "runs" / "toy"
    assert set(reasons(planned).values()) == {"new"}


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        (["ppo.total_episodes=128"], ["ppo", "evaluation"]),
        (["evaluation.prompts=16"], ["evaluation"]),
        (["reward.learning_rate=2e-5"], ["reward", "ppo", "evaluation"]),
        (["dataset.judge_fraction=0.5"], STAGES),
        (["dataset.max_answer_tokens=64"], STAGES),
        (["seed=1"], STAGES),
        (["lora.r=8"], STAGES),
        (["model.dtype=float32"], STAGES),
        (["title=Another"], []),
        (["ppo.logging_steps=3", "sft.logging_steps=3"], []),  # neutral
        (["sft.per_device_train_batch_size=4", "sft.gradient_accumulation_steps=2"], []),  # layout
        (["sft.per_device_train_batch_size=4"], STAGES),  # … but at another batch
    ],
)
def test_a_change_redoes_what_depends_on_it_and_no_more(
    tmp_path: Path, changes: list[str], again: list[str]
) -> None:
    recipe = toy(tmp_path)
    finish(plan(recipe))
    assert [stage.name for stage in plan(recipe, *changes).stages if not stage.done] == again


def test_a_rerun_says_why(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    finish(plan(recipe))
    assert reasons(plan(recipe, "reward.learning_rate=2e-5")) == {
        "reward": "learning_rate 1e-05 → 2e-05",
        "ppo": "input reward changed",
        "evaluation": "input ppo changed, input reward changed",
    }
    assert reasons(plan(recipe, "seed=1", "lora.r=8"))["sft"] == "lora.r 16 → 8, seed 42 → 1"
    many = plan(
        recipe, *(f"ppo.{key}" for key in ("gamma=0.9", "lam=0.9", "kl_coef=1", "vf_coef=1"))
    )
    assert reasons(many)["ppo"].count("→") == 3
    assert reasons(many)["ppo"].endswith(", 1 more")
    assert len(many.stages[2].reasons) == 4


def test_a_rerun_says_which_files_changed(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    (tmp_path / "runs").mkdir()  # a run makes it first of all
    finish(plan(recipe))
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other")
    (tmp_path / "model" / "extra.json").write_text("{}")
    assert plan(recipe).stages[0].reasons == (
        "model model.safetensors changed", "model extra.json added", "pairs.jsonl changed"
    )  # fmt: skip
    (tmp_path / "runs" / ".stages" / "digests.json").unlink()
    assert plan(recipe).stages[0].reasons == ("model changed", "dataset changed")


def test_columns_and_a_test_file_are_in_the_key(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text('{"prompt": "a"}\n')
    files = '{ train = "train.jsonl", test = "test.jsonl" }'
    text = RECIPE.replace('"./pairs.jsonl"', f'"./data"\ndata_files = {files}\ntest_split = "test"')
    recipe = toy(tmp_path, text=text)
    (tmp_path / "runs").mkdir()
    first = plan(recipe)
    later = {"columns", "weight", "more"}  # keys of before there were any hold
    assert not later & first.stages[0].payload["dataset"].keys()
    finish(first)
    assert reasons(plan(recipe, "dataset.columns.prompt=a"))["sft"].startswith("dataset.columns")
    (folder / "test.jsonl").write_text('{"prompt": "b"}\n')
    assert reasons(plan(recipe))["sft"] == "test.jsonl changed"


def test_the_prompts_kept_out_of_a_stages_own_data_are_in_its_key(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        (tmp_path / "data" / f"{name}.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "own.jsonl").write_text('{"prompt": "a"}\n')
    text = RECIPE.replace('"./pairs.jsonl"', '"./data"\ntest_split = "test"')
    recipe = toy(tmp_path, text=text.replace("[sft]", '[sft]\ndataset.path = "./own.jsonl"'))
    (tmp_path / "runs").mkdir()
    finish(plan(recipe))
    (tmp_path / "data" / "test.jsonl").write_text('{"prompt": "b"}\n')
    assert reasons(plan(recipe))["sft"] == "test.jsonl changed"


def test_of_files_that_are_named_the_others_do_not_count(tmp_path: Path) -> None:
    """Rows to train on are not in the key of who only keeps off the rows to test on."""
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "test.jsonl", "own.jsonl", "rule.py", "other.jsonl"):
        (tmp_path / "data" / name).write_text("def score(prompt, answer): ...\n")
    files = '{ train = "train.jsonl", test = "test.jsonl" }'
    text = RECIPE.replace('"./pairs.jsonl"', f'"./data"\ndata_files = {files}\ntest_split = "test"')
    text = text.replace("[sft]", '[sft]\ndataset.path = "./data/own.jsonl"')
    recipe = toy(tmp_path, text=text + 'judge = "python:./data/rule.py:score"\n')
    for name, again in [
        ("train.jsonl", ["reward", "ppo", "evaluation"]),
        ("test.jsonl", STAGES),
        ("own.jsonl", STAGES),
        ("rule.py", ["evaluation"]),
        ("other.jsonl", []),
    ]:
        finish(plan(recipe))
        (tmp_path / "data" / name).write_text("def score(prompt, answer): return 1.0\n")
        assert list(reasons(plan(recipe))) == again


def test_every_dataset_is_in_the_key(tmp_path: Path) -> None:
    first = plan(toy(tmp_path))
    more = '[[dataset]]\npath = "./more.jsonl"\nweight = 0.5\n'
    text = RECIPE.replace("[dataset]", "[[dataset]]").replace("[sft]", more + "[sft]")
    (tmp_path / "more.jsonl").write_text('{"prompt": "a"}\n')
    finish(plan(toy(tmp_path, text=text)))
    assert reasons(plan(toy(tmp_path, text=text.replace("0.5", "0.25")))).keys() == set(STAGES)
    (tmp_path / "more.jsonl").write_text('{"prompt": "b"}\n')
    assert reasons(plan(toy(tmp_path, text=text))).keys() == set(STAGES)
    one = plan(toy(tmp_path, text=text.replace(more, "")))  # [[dataset]] once is [dataset]
    assert [stage.key for stage in one.stages] == [stage.key for stage in first.stages]


def test_the_run_s_own_last_stages_come_before_nearer_kin(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    mine = plan(recipe, "reward.weight_decay=0.1")
    finish(mine)
    finish(plan(recipe, "reward.weight_decay=0.2", "seed=1"))
    entries = [
        {"name": s.name, "folder": s.folder.relative_to(mine.runs).as_posix()} for s in mine.stages
    ]
    write_json(mine.run_folder / "manifest.json", HEAD | {"stages": entries})
    changed = plan(recipe, "reward.weight_decay=0.2", "seed=2", name=mine.run_folder.name)
    assert reasons(changed)["reward"] == ("weight_decay 0.1 → 0.2, seed 42 → 2, input sft changed")
    elsewhere = plan(recipe, "reward.weight_decay=0.2", "seed=2", name="other")
    assert reasons(elsewhere)["reward"] == "seed 1 → 2, input sft changed"


def test_an_unrelated_recipe_is_just_new(tmp_path: Path) -> None:
    finish(plan(toy(tmp_path)))
    other = RECIPE.replace("1e-3", "5e-4\nweight_decay = 0.1\nmax_steps = 7\nwarmup_steps = 5")
    assert reasons(plan(toy(tmp_path, "other", other), "seed=3"))["sft"] == "new"


def test_an_unfinished_stage_and_a_fresh_run_say_so(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    planned = plan(recipe)
    (planned.stages[0].folder / "work").mkdir(parents=True)
    assert reasons(plan(recipe))["sft"] == "was not finished"
    for name in ("checkpoint-000004", "checkpoint-000012", "damaged-000016", "partial"):
        (planned.stages[0].folder / "work" / name).mkdir()
    goes_on = "was not finished, has a checkpoint of step 12"
    assert reasons(plan(recipe))["sft"] == goes_on
    finish(planned)
    assert reasons(plan(recipe)) == {}
    assert set(reasons(plan(recipe, fresh=True)).values()) == {"computed afresh"}


def test_a_foreign_reward_model_is_known_by_content(tmp_path: Path) -> None:
    text = RECIPE.replace('"sft", "reward", "ppo"', '"sft", "ppo"')
    text = text.replace("[ppo]", '[ppo]\nreward_model = "./judge"').replace(
        "[reward]\nlearning_rate = 1e-5\n", ""
    )
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    (tmp_path / "judge" / "model.safetensors").write_bytes(b"one")
    recipe = toy(tmp_path, text=text)
    (tmp_path / "runs").mkdir()
    first = plan(recipe)
    finish(first)
    assert first.stages[1].inputs == {"policy": "sft"}
    assert first.stages[2].inputs == {"policy:sft": "sft", "policy:ppo": "ppo"}
    (tmp_path / "judge" / "model.safetensors").write_bytes(b"two")
    assert reasons(plan(recipe)) == {
        "ppo": "reward_model model.safetensors changed",
        "evaluation": "reward_model model.safetensors changed, input ppo changed",
    }


def test_a_run_is_named_after_the_recipe_and_what_was_set(tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    names = [
        plan(recipe, *changes).run_folder.name
        for changes in ([], ["seed=1"], ["seed=2"], ["seed=1", "lora.r=8"], ["lora.r=8", "seed=1"])
    ]
    assert names[0] == "toy"
    assert all(name.startswith("toy-") and len(name) == 10 for name in names[1:])
    assert names[3] == names[4]
    assert len(set(names)) == 4
    assert plan(recipe, name="mine").run_folder.name == "mine"


@pytest.mark.parametrize("name", ["../up", ".stages", "a/b", "", "a\x1b[31m"])
def test_a_run_s_name_stays_inside_the_runs_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no name for a run"):
        plan(toy(tmp_path), name=name)
