# ruff: noqa: E501 (tables of messages: a case a line)
from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import tomlkit

from rlhf_recipes.errors import RecipeError, UsageError
from rlhf_recipes.lines import key_lines
from rlhf_recipes.recipe import (
    Recipe,
    find_recipe,
    identity_settings,
    layout_settings,
    load_recipe,
    shipped_recipes,
)
from rlhf_recipes.tables import MirrorTable

SAVING = {"save_steps": 0.1, "save_total_limit": 2}
GUARD = {"max_kl": 25.0, "min_entropy": 0.1, "min_length": 0.2, "max_score_drop": 1.5}
JUDGES = '"none", "independent", "python:FILE.py:FUNCTION", or a model\'s folder or id'
MINIMAL = """\
stages = ["sft", "reward", "ppo"]

[model]
name = "org/base"

[dataset]
path = "./pairs.jsonl"
"""


def write(folder: Path, text: str) -> Path:
    """A recipe, and beside it a model folder, an adapter folder, and a data file."""
    for name, file in {"model": "config.json", "adapter": "adapter_config.json"}.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / file).write_text("{}")
    (folder / "pairs.jsonl").write_text("")
    (folder / "notes.txt").write_text("")
    path = folder / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str) -> Recipe:
    return load_recipe(write(folder, text))


def problems(folder: Path, text: str, **words: list[str]) -> list[str]:
    """What is wrong, without the folder's name."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), **words)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


# ---- what a recipe comes to


def test_a_minimal_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    assert (recipe.title, recipe.seed, recipe.stages) == ("my", 42, ("sft", "reward", "ppo"))
    assert recipe.text == MINIMAL
    assert (recipe.model.dtype, recipe.model.quantization) == ("auto", "none")
    assert not recipe.model.is_local
    assert recipe.dataset.is_local
    assert recipe.dataset.file == tmp_path / "pairs.jsonl"
    assert recipe.dataset.judge_fraction == 0.25
    assert recipe.evaluation.prompts == 128
    assert recipe.lora == {
        "r": 16,
        "target_modules": "all-linear",
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
    }
    assert recipe.notes == ()


def test_stages_resolved(tmp_path: Path) -> None:
    text = MINIMAL + "[sft]\nmax_steps = 5\n[ppo]\nnum_ppo_epochs = 2\n[ppo.guard]\nmax_kl = 8\n"
    recipe = load(tmp_path, text)
    sft, reward, ppo = map(recipe.table, recipe.stages)
    assert sft.given == {"learning_rate": 2e-4, "max_steps": 5} | SAVING
    assert sft.options["weight_decay"] == 0.0
    assert "output_dir" not in sft.options and "packing" not in sft.options
    assert sft.extras == {}
    assert reward.given == {"learning_rate": 1e-4, "center_rewards_coefficient": 0.01} | SAVING
    assert reward.extras == {"head_learning_rate": 1e-4, "minimum_accuracy": 0.55}
    assert ppo.extras == {
        "value_learning_rate": 1e-4,
        "value_warmup_epochs": 0,
        "keep": "best",
        "minimum_accuracy": None,  # the reward stage's
        "guard": GUARD | {"max_kl": 8.0},
    }
    assert {k: recipe.resolved()["ppo"].get(k) for k in ppo.extras} == ppo.extras
    assert (ppo.given["eval_strategy"], ppo.given["eval_steps"]) == ("steps", 0.2)
    assert ppo.options["lam"] == 1.0 and ppo.options["num_ppo_epochs"] == 2
    roles = [(t.policy, t.reward_model, t.reference) for t in (sft, reward, ppo)]
    assert roles == [(None, None, None), ("sft", None, None), ("sft", "reward", None)]


def test_without_lora_the_learning_rates_are_upstreams(tmp_path: Path) -> None:
    recipe = load(tmp_path, "lora = false\nevaluation = false\n" + MINIMAL)
    assert recipe.lora is None and recipe.evaluation is None
    rates = [recipe.table(name).options["learning_rate"] for name in recipe.stages]
    assert rates == [2e-5, 1e-4, 3e-6]


def test_wiring_that_says_otherwise(tmp_path: Path) -> None:
    text = MINIMAL.replace('"ppo"]', '"ppo", "again", "last"]') + (
        '[again]\nkind = "ppo"\npolicy = "sft"\nreference = "ppo"\nreward_model = "./model"\n'
        '[last]\nkind = "sft"\ndataset = { path = "org/data", max_answer_tokens = 9 }\n'
    )
    recipe = load(tmp_path, text.replace("[dataset]", '[dataset]\nsystem = "s"'))
    again, last = recipe.table("again"), recipe.table("last")
    assert (again.kind, again.policy) == ("ppo", "sft")
    assert (again.reward_model, again.reference) == ("./model", "ppo")
    assert last.policy == "again"
    own = last.dataset
    assert (own.path, own.max_answer_tokens, own.max_prompt_tokens) == ("org/data", 9, 512)
    assert (own.system, own.test_split, own.test_fraction) == ("s", None, 0.1)
    text = MINIMAL.replace("[dataset]", '[dataset]\ntest_split = "t"')
    own = load(tmp_path, text + '[sft]\ndataset = { path = "org/data" }\n').table("sft").dataset
    assert (own.test_split, own.test_fraction) == (None, 0.0)


def test_resolved_is_a_recipe_whose_stages_are_the_same(tmp_path: Path) -> None:
    text = MINIMAL.replace("org/base", "./model") + (
        '[sft]\ndataset = { path = "./pairs.jsonl" }\n[ppo]\nreward_model = "./model"\n'
    )
    recipe = load(tmp_path, text)
    resolved = tmp_path / "elsewhere" / "resolved.toml"
    resolved.parent.mkdir()
    resolved.write_text(tomlkit.dumps(recipe.resolved()))
    again = load_recipe(resolved)
    assert again.lora == recipe.lora and again.dataset.file == recipe.dataset.file
    assert again.model.folder == recipe.model.folder
    assert again.table("ppo").reward_model == str(tmp_path / "model")
    assert again.table("sft").dataset.file == recipe.table("sft").dataset.file
    for stage in recipe.stages:
        assert identity_settings(again, stage) == identity_settings(recipe, stage)
    assert again.resolved() == recipe.resolved() | {"title": "my"}


def test_columns_and_a_test_file_are_resolved(tmp_path: Path) -> None:
    text = MINIMAL.replace(
        DATA,
        'path = "./model"\ndata_files = { train = "a.jsonl", test = "b/*.jsonl" }\n'
        'test_split = "test"\n[dataset.columns]\nprompt = "question"',
    )
    recipe = load_recipe(write(tmp_path, text), set=["dataset.columns.chosen=good"])
    assert recipe.dataset.columns == {"prompt": "question", "chosen": "good"}
    resolved = tmp_path / "elsewhere" / "resolved.toml"
    resolved.parent.mkdir()
    resolved.write_text(tomlkit.dumps(recipe.resolved()))
    again = load_recipe(resolved).dataset
    assert (again.columns, again.data_files) == (recipe.dataset.columns, recipe.dataset.data_files)
    assert (again.file, again.test_split) == (tmp_path / "model", "test")


def test_a_mirror_and_a_judge_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text("")
    text = MINIMAL.replace(MODEL, MIRROR) + '[evaluation]\njudge = "python:./rule.py:rule"\n'
    recipe = load(tmp_path, text)
    assert recipe.model.mirror == MirrorTable("a-wheel==1.0", "a/model.gguf", SHA)
    resolved = tmp_path / "elsewhere" / "resolved.toml"
    resolved.parent.mkdir()
    resolved.write_text(tomlkit.dumps(recipe.resolved()))
    again = load_recipe(resolved)
    assert again.model == recipe.model
    assert again.evaluation.judge == f"python:{tmp_path / 'rule.py'}:rule"
    assert again.resolved() == recipe.resolved() | {"title": "my"}


def test_identity_and_layout(tmp_path: Path) -> None:
    def settings(words: str) -> tuple[dict, dict]:
        recipe = load(tmp_path, MINIMAL + "[ppo]\n" + words)
        return identity_settings(recipe, "ppo"), layout_settings(recipe, "ppo")

    whole = "per_device_train_batch_size = 16\n"
    halved = "per_device_train_batch_size = 8\ngradient_accumulation_steps = 2\n"
    identity, layout = settings(whole)
    assert identity["batch_size"] == 16
    assert (identity["keep"], identity["eval_steps"]) == ("best", 0.2)
    assert settings(whole + "guard.max_kl = 8\n")[0] == identity | {"guard": GUARD | {"max_kl": 8}}
    assert "logging_steps" not in identity | layout
    assert settings(whole + "logging_steps = 1\n") == (identity, layout)
    assert settings(halved)[0] == identity
    assert settings(halved)[1] == layout | {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
    }
    assert settings(whole + "cliprange = 0.3\n")[0] == identity | {"cliprange": 0.3}
    assert settings(whole + "learning_rate = 1\n")[0] == identity | {
        "learning_rate": 1.0,
        "value_learning_rate": 1.0,
    }


def test_notes(tmp_path: Path) -> None:
    text = MINIMAL.replace('"sft", "reward", "ppo"', '"sft"').replace("org/base", "model")
    assert load(tmp_path, text + "[ppo]\nkl_coef = 0.1\n").notes == (
        'model.name: a hub id; for the folder write "./model"',
        "[ppo] is not used: stages does not name it",
    )


# ---- what is wrong


def test_all_problems_at_once_with_their_lines(tmp_path: Path) -> None:
    text = """\
title = 3
stages = ["sft", "rewrad",
  "ppo", "ppo"]
seed = -1
colour = "red"

[model]
name = "./nowhere"
dtype = "bf16"

[lora]
r = "16"
modules_to_save = ["lm_head"]

[dataset]
path = "./pears.jsonl"
test_fraction = 0.5
validation_fraction = 0.5

[sft]
learning_rat = 1e-3
bf16 = true
packing = true
dataset = { path = "./pairs.jsonl", judge_fraction = 0.1 }

[ppo]
num_mini_batches = 3
[ppo.guard]
max_kl = -1
[rloo]
beta = 0
"""
    assert problems(tmp_path, text) == [
        "my.toml:1: title: must be text, not 3",
        'my.toml:2: stages: "rewrad" is no kind of stage, and has no table'
        ' (did you mean "reward"?)',
        'my.toml:3: stages: "ppo" stands twice: a second one needs a name and a kind',
        "my.toml:4: seed: must be at least 0, not -1",
        "my.toml:5: colour: unknown key"
        " (there are title, stages, seed, model, lora, dataset, evaluation)",
        "my.toml:8: model.name: no such folder: nowhere",
        'my.toml:9: model.dtype: must be "auto", "bfloat16", "float16" or "float32", not "bf16"'
        ' (did you mean "bfloat16"?)',
        'my.toml:12: lora.r: must be a whole number, not "16" (leave out the quotes)',
        "my.toml:13: lora.modules_to_save: is refused: it would train or rebuild the base model"
        " that all adapters share",
        "my.toml:16: dataset.path: no such file or folder: pears.jsonl",
        "my.toml:17: dataset.test_fraction: nothing is left to train on: 0.5 + 0.5 ≥ 1",
        'my.toml:21: sft.learning_rat: unknown key (did you mean "learning_rate"?)',
        "my.toml:22: sft.bf16: belongs to model.dtype: one precision for all stages",
        "my.toml:23: sft.packing: is refused: without FlashAttention, rows that share a sequence"
        " see each other",
        "my.toml:24: sft.dataset.judge_fraction: belongs to dataset.judge_fraction:"
        " a prompt is on the same side of the split in every stage",
        "my.toml:27: ppo.num_mini_batches: 3 does not divide"
        " per_device_train_batch_size × gradient_accumulation_steps = 8",
        "my.toml:29: ppo.guard.max_kl: must be above 0, not -1",
        "my.toml:30: rloo: is reserved: this version knows sft, reward, ppo, dpo",
    ]


STAGES = 'stages = ["sft", "reward", "ppo"]'
MODEL = 'name = "org/base"'
DATA = 'path = "./pairs.jsonl"'
SHA = "0a" * 32
MIRROR = f'{MODEL}\nmirror = {{ wheel = "a-wheel==1.0", file = "a/model.gguf", sha256 = "{SHA}" }}'


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        # stages
        (STAGES, "", 'my.toml: stages: is missing: stages = ["sft", "reward", "ppo"], or fewer'),
        (STAGES, "stages = []", 'my.toml:1: stages: is missing: stages = ["sft", "reward", "ppo"], or fewer'),
        (STAGES, 'stages = "sft"', 'my.toml:1: stages: must be a list of texts, not "sft"'),
        (STAGES, 'stages = ["sft", "kto"]', 'my.toml:1: stages: "kto" is reserved: this version knows sft, reward, ppo, dpo'),
        (STAGES, 'stages = ["model"]', 'my.toml:1: stages: "model" cannot be the name of a stage'),
        (STAGES, 'stages = ["../x"]', 'my.toml:1: stages: "../x" cannot be the name of a stage'),
        (STAGES, 'stages = ["b"]\nb = {}', "my.toml:2: b: needs kind = one of sft, reward, ppo, dpo"),
        (STAGES, 'stages = ["b"]\nb = { kind = "dqo" }', "my.toml:2: b.kind: needs kind = one of sft, reward, ppo, dpo"),
        (STAGES, 'stages = ["sft"]\nsft = { kind = "ppo" }', 'my.toml:2: sft.kind: must be "sft", or left out'),
        (STAGES, 'stages = ["sft"]\nsft = 3', "my.toml:2: sft: must be a table, not 3"),
        (STAGES, 'stages = ["sft"]\nreward2 = {}', 'my.toml:2: reward2: unknown table: stages does not name it (did you mean "reward"?)'),
        # wiring
        (STAGES, 'stages = ["sft", "ppo"]', 'my.toml:1: stages: ppo has nothing to score with: put a "reward" stage before it, or say reward_model = "…"'),
        (STAGES, 'stages = ["ppo", "reward"]\nppo = {}', 'my.toml:2: ppo: ppo has nothing to score with: put a "reward" stage before it, or say reward_model = "…"'),
        (STAGES, STAGES + '\nppo.policy = "reward"', 'my.toml:2: ppo.policy: "reward" is of kind reward, not sft or ppo or dpo'),
        (STAGES, STAGES + '\nppo.policy = "stf"', 'my.toml:2: ppo.policy: no stage is named "stf" (did you mean "sft"?)'),
        (STAGES, STAGES + '\nppo.reference = "ppo"', 'my.toml:2: ppo.reference: "ppo" does not come before "ppo" in stages'),
        (STAGES, STAGES + '\nppo.reward_model = "sft"', 'my.toml:2: ppo.reward_model: "sft" is of kind sft, not reward'),
        (STAGES, STAGES + '\nppo.reward_model = "./rm"', "my.toml:2: ppo.reward_model: no such folder: rm"),
        (STAGES, STAGES + '\nsft.reward_model = "reward"', "my.toml:2: sft.reward_model: unknown key here: it is one of [ppo]"),
        (STAGES, STAGES + '\nsft.dataset.test_split = "x"\nsft.dataset.path = "a/b"', "my.toml:2: sft.dataset.test_split: unknown key here: it is one of [dataset]"),
        (STAGES, STAGES + "\nsft.dataset.max_rows = 1", 'my.toml:2: sft.dataset: needs path = "…": a hub id, or a file or folder (./…)'),
        # sizes of PPO
        (STAGES, STAGES + "\nppo.whiten_rewards = true\nppo.num_mini_batches = 2", "my.toml:2: ppo.whiten_rewards: needs at least 8 rows in a mini-batch, not 4"),
        # model
        ("[model]\n" + MODEL, "", 'my.toml: model: is missing: [model] with name = "…" names the base model'),
        (MODEL, "", 'my.toml:3: model: needs name = "…": a hub id, or a folder (./…)'),
        (MODEL, 'name = "a/b/c"', 'my.toml:4: model.name: "a/b/c" is neither a hub id nor a folder (./… or /…)'),
        (MODEL, 'name = "./adapter"', "my.toml:4: model.name: adapter is an adapter, not a whole model"),
        (MODEL, 'name = "../"', "my.toml:4: model.name: .. is no model: it has no config.json"),
        (MODEL, 'name = "./model"\nrevision = "main"', "my.toml:5: model.revision: is for models on the hub; a folder has none"),
        ("[model]\n" + MODEL, "model = 3", "my.toml:3: model: must be a table, not 3"),
        (MODEL, MODEL + "\nmirror = 3", "my.toml:5: model.mirror: must be a table, not 3"),
        (MODEL, MODEL + '\nmirror = "a-wheel==1.0"', 'my.toml:5: model.mirror: must be a table, not "a-wheel==1.0"'),
        (MODEL, MIRROR.replace('wheel = "a-wheel==1.0", ', ""), 'my.toml:5: model.mirror: needs wheel: a wheel on PyPI with its version: "name==1.2"'),
        (MODEL, MIRROR.replace('file = "a/model.gguf", ', ""), 'my.toml:5: model.mirror: needs file: a .gguf file\'s place in the wheel: "package/model.gguf"'),
        (MODEL, MIRROR.replace(f', sha256 = "{SHA}"', ""), "my.toml:5: model.mirror: needs sha256: the SHA-256 of that file, 64 hex digits"),
        (MODEL, MIRROR.replace("==1.0", ""), 'my.toml:5: model.mirror.wheel: must be a wheel on PyPI with its version: "name==1.2"'),
        (MODEL, MIRROR.replace("==1.0", ">=1.0"), 'my.toml:5: model.mirror.wheel: must be a wheel on PyPI with its version: "name==1.2"'),
        (MODEL, MIRROR.replace("a-wheel", "-r x"), 'my.toml:5: model.mirror.wheel: must be a wheel on PyPI with its version: "name==1.2"'),
        (MODEL, MIRROR.replace(".gguf", ".bin"), 'my.toml:5: model.mirror.file: must be a .gguf file\'s place in the wheel: "package/model.gguf"'),
        (MODEL, MIRROR.replace(SHA, SHA[1:]), "my.toml:5: model.mirror.sha256: must be the SHA-256 of that file, 64 hex digits"),
        (MODEL, MIRROR.replace(SHA, SHA.upper()), "my.toml:5: model.mirror.sha256: must be the SHA-256 of that file, 64 hex digits"),
        (MODEL, MIRROR.replace(f'"{SHA}"', "5"), "my.toml:5: model.mirror.sha256: must be text, not 5"),
        (MODEL, MIRROR.replace("file =", "fiel = 1, file ="), 'my.toml:5: model.mirror.fiel: unknown key (did you mean "file"?)'),
        (MODEL, MIRROR.replace("org/base", "./model"), "my.toml:5: model.mirror: is for models on the hub; a folder needs none"),
        (MODEL, MODEL + "\nseed = 1", "my.toml:5: model.seed: unknown key here: it belongs at the top, before the first [table]"),
        # dataset
        ("[dataset]\n" + DATA, "", 'my.toml: dataset: is missing: [dataset] with path = "…" names the preference data'),
        (DATA, "", 'my.toml:6: dataset: needs path = "…": a hub id, or a file or folder (./…)'),
        (DATA, 'path = "json"', 'my.toml:7: dataset.path: name the file itself: path = "./….jsonl"'),
        (DATA, 'path = "./notes.txt"', "my.toml:7: dataset.path: must end in .jsonl, .json, .csv, .parquet, or be a folder"),
        (DATA, DATA + '\ndata_files = "x"', "my.toml:8: dataset.data_files: says nothing about a local file: leave it out"),
        (DATA, DATA + '\nsplit = "train_prefs"', 'my.toml:8: dataset.split: of a file is "train", or a part of it: leave it out'),
        (DATA, DATA + '\ntest_split = "t"\ntest_fraction = 0.1', "my.toml:9: dataset.test_fraction: leave it out: test_split says what the test is"),
        (DATA, DATA + "\njudge_fraction = 1.0", "my.toml:8: dataset.judge_fraction: must be at least 0 and below 1, not 1.0"),
        (DATA, DATA + "\nmax_length = 9", 'my.toml:8: dataset.max_length: unknown key (there are path, name, data_dir, data_files, split, revision, max_prompt_tokens, max_answer_tokens, max_rows, validation_fraction, test_fraction, test_split, judge_fraction, system, weight, columns)'),
        (DATA, DATA + '\ncolumns = "question"', 'my.toml:8: dataset.columns: must be a table, not "question"'),
        (DATA, DATA + '\n[dataset.columns]\nprompt = 3', "my.toml:9: dataset.columns.prompt: must be text, not 3"),
        (DATA, DATA + '\ncolumns = { reject = "bad" }', 'my.toml:8: dataset.columns.reject: unknown key (did you mean "rejected"?)'),
        (DATA, 'path = "./model"\ndata_files = { train = "../pairs.jsonl" }', "my.toml:8: dataset.data_files: must name what is inside ./model"),
        (DATA, 'path = "./model"\ndata_files = ["a.jsonl", "/b.jsonl"]', "my.toml:8: dataset.data_files: must name what is inside ./model"),
        (DATA, 'path = "./model"\ndata_dir = "~/x"', "my.toml:8: dataset.data_dir: must name what is inside ./model"),
        # LoRA
        (STAGES, STAGES + '\nlora = "no"', 'my.toml:2: lora: must be a table or false, not "no"'),
        (STAGES, STAGES + '\nlora.target_modules = ["q_proj", "model.embed_tokens"]', "my.toml:2: lora.target_modules: model.embed_tokens holds the vocabulary, which all adapters share as it is"),
        (STAGES, STAGES + '\nlora.target_modules = ".*"', "my.toml:2: lora.target_modules: lm_head holds the vocabulary, which all adapters share as it is"),
        (STAGES, STAGES + '\nlora.target_modules = "("', "my.toml:2: lora.target_modules: is no regular expression: missing ), unterminated subpattern at position 0"),
        (STAGES, STAGES + "\nlora.layers_to_transform = [0]", "my.toml:2: lora.layers_to_transform: needs target_modules to be a list of names"),
        (STAGES, STAGES + '\nlora.init_lora_weights = "pissa"', 'my.toml:2: lora.init_lora_weights: must be true, "gaussian" or "orthogonal", not "pissa"'),
        (STAGES, STAGES + '\nlora.task_type = "CAUSAL_LM"', "my.toml:2: lora.task_type: belongs to the stage: it follows from what the adapter is for"),
        # TRL's fields
        (STAGES, STAGES + "\nsft.max_length = 9", "my.toml:2: sft.max_length: belongs to dataset.max_prompt_tokens and dataset.max_answer_tokens: one limit for all stages"),
        (STAGES, STAGES + '\nsft.output_dir = "x"', "my.toml:2: sft.output_dir: belongs to the runner: a stage's folder and work are planned"),
        (STAGES, STAGES + "\nsft.kl_coef = 1", "my.toml:2: sft.kl_coef: unknown key here: it is one of [ppo]"),
        (STAGES, STAGES + "\nreward.head_learning_rate = 0", "my.toml:2: reward.head_learning_rate: must be above 0, not 0"),
        (STAGES, STAGES + "\nppo.eval_delay = 5", "my.toml:2: ppo.eval_delay: belongs to eval_steps: the start, every so many updates and the end are scored"),
        (STAGES, STAGES + "\nppo.eval_steps = 2.5", "my.toml:2: ppo.eval_steps: must be a whole number, or a share below 1, not 2.5"),
        (STAGES, STAGES + '\nppo.eval_strategy = "epoch"', 'my.toml:2: ppo.eval_strategy: must be "no" or "steps", not "epoch"'),
        (STAGES, STAGES + '\nppo.eval_strategy = "no"', 'my.toml:2: ppo.eval_strategy: leaves no score to choose by: say keep = "last"'),
        (STAGES, STAGES + '\nppo.keep = "first"', 'my.toml:2: ppo.keep: must be "best" or "last", not "first"'),
        (STAGES, STAGES + "\nppo.guard.min_length = 2", "my.toml:2: ppo.guard.min_length: must be from 0 to 1, not 2"),
        (STAGES, STAGES + "\nppo.dataloader_num_workers = 2", "my.toml:2: ppo.dataloader_num_workers: is refused: TRL's PPO loop never reads it, and neither does ours"),
        (STAGES, STAGES + '\nevaluation.judge = "python:./gone.py:rule"', "my.toml:2: evaluation.judge: no such file: gone.py"),
        (STAGES, STAGES + '\nevaluation.judge = "./gone"', "my.toml:2: evaluation.judge: no such folder: gone"),
        (STAGES, STAGES + '\nevaluation.judge = "./adapter"', "my.toml:2: evaluation.judge: adapter is an adapter, not a whole model"),
        (STAGES, STAGES + '\nevaluation.judge = "me/my judge"', 'my.toml:2: evaluation.judge: "me/my judge" is neither a hub id nor a folder (./… or /…)'),
        (STAGES, STAGES + '\nevaluation.judge = "oracle"', f'my.toml:2: evaluation.judge: must be {JUDGES}, not "oracle"'),
        (STAGES, STAGES + '\nevaluation.judge = ["independent", "none"]', f'my.toml:2: evaluation.judge: must be {JUDGES}, not "none"'),
        (STAGES, STAGES + '\nevaluation.judge = "independant"', f'my.toml:2: evaluation.judge: must be {JUDGES}, not "independant"'),
        (STAGES, STAGES + '\nevaluation.judge = ["a/b", "a/b"]', 'my.toml:2: evaluation.judge: must be one judge, or two that differ, not ["a/b", "a/b"]'),
        (STAGES, STAGES + '\nevaluation.judge = []', "my.toml:2: evaluation.judge: must be one judge, or two that differ, not []"),
        (STAGES, STAGES + '\nevaluation.judge = 3', "my.toml:2: evaluation.judge: must be text or a list of texts, not 3"),
        (STAGES, STAGES + "\nevaluation.best_of = 12", "my.toml:2: evaluation.best_of: must be 2, 4, 8, 16, 32 or 64, not 12"),
        (STAGES, 'stages = ["sft", "dpo"]\nevaluation.best_of = 16', "my.toml:2: evaluation.best_of: is PPO's yardstick, and no stage is of PPO"),
        (DATA, DATA + '\njudge_fraction = 0\n[evaluation]\njudge = "independent"', "my.toml:10: evaluation.judge: has no pairs to learn from: judge_fraction = 0 in [dataset]; 0.25 keeps a quarter of the training pairs"),
        (STAGES, 'stages = ["judge"]\n[judge]\nkind = "reward"', 'my.toml:1: stages: "judge" cannot be the name of a stage'),
        (STAGES, 'stages = ["best_of"]\n[best_of]\nkind = "ppo"', 'my.toml:1: stages: "best_of" cannot be the name of a stage'),
        (STAGES, STAGES + "\nevaluation.prompts = 0", "my.toml:2: evaluation.prompts: must be at least 1, not 0"),
    ],
)  # fmt: skip
def test_one_problem(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert old in MINIMAL
    assert problems(tmp_path, MINIMAL.replace(old, new)) == [problem]


def test_a_home_that_nobody_has(tmp_path: Path) -> None:
    text = MINIMAL.replace("org/base", "~no-such-user/base").replace("./pairs", "~no-such-user/p")
    assert problems(tmp_path, text) == [
        "my.toml:4: model.name: no such folder: ~no-such-user/base",
        "my.toml:7: dataset.path: no such file or folder: ~no-such-user/p.jsonl",
    ]


def test_all_weights_do_not_train_in_4_bit(tmp_path: Path) -> None:
    text = "lora = false\n" + MINIMAL.replace(MODEL, MODEL + '\nquantization = "4bit"')
    found = problems(tmp_path, text)
    assert found == ["my.toml:1: lora: weights in 4bit cannot train; adapters on them can"]


TWO = (
    MINIMAL.replace("[dataset]", "[[dataset]]")
    + """\
max_prompt_tokens = 64
judge_fraction = 0.5

[[dataset]]
path = "org/more"
weight = 0.5
test_split = "test"
"""
)


def test_several_datasets(tmp_path: Path) -> None:
    text = TWO.replace("0.5\ntest", "0.5\nmax_prompt_tokens = 32\njudge_fraction = 0.5\ntest")
    for recipe in (load(tmp_path, TWO), load(tmp_path, text)):
        (more,) = recipe.dataset.more
        assert (recipe.dataset.path, more.path) == ("./pairs.jsonl", "org/more")
        assert (recipe.dataset.weight, more.weight, more.test_split) == (None, 0.5, "test")
        assert (recipe.dataset.judge_fraction, more.judge_fraction) == (0.5, 0.5)
    assert [load(tmp_path, t).dataset.more[0].max_prompt_tokens for t in (TWO, text)] == [64, 32]
    resolved = tmp_path / "elsewhere" / "resolved.toml"
    resolved.parent.mkdir()
    resolved.write_text(tomlkit.dumps(recipe.resolved()))
    again = load_recipe(resolved)
    assert again.resolved() == recipe.resolved() | {"title": "my"}
    assert again.dataset.more == recipe.dataset.more
    assert again.dataset.file == recipe.dataset.file


def test_problems_of_several_datasets(tmp_path: Path) -> None:
    text = TWO.replace("weight = 0.5", 'weight = 1.5\njudge_fraction = 0.25\npaht = "x"')
    text += '[[dataset]]\npath = "./gone.jsonl"\ntest_fraction = 0.2\ntest_split = "t"\n'
    assert problems(tmp_path, text) == [
        "my.toml:13: dataset.weight: must be above 0, at most 1, not 1.5",
        "my.toml:14: dataset.judge_fraction: is 0.5 above, and a prompt is on the same side in every dataset",
        'my.toml:15: dataset.paht: unknown key (did you mean "path"?)',
        "my.toml:18: dataset.path: no such file or folder: gone.jsonl",
        "my.toml:19: dataset.test_fraction: leave it out: test_split says what the test is",
    ]
    both = TWO.replace("judge_fraction = 0.5", "test_fraction = 0.2")
    assert problems(tmp_path, both) == [
        "my.toml:9: dataset.test_fraction: leave it out: test_split says what the test is"
    ]
    for words in ({"set": ["dataset.weight=0.5"]}, {"unset": ["dataset.weight"]}):
        assert len(problems(tmp_path, TWO, **words)) == 1
    assert load(tmp_path, TWO.replace("judge_fraction = 0.5", "validation_fraction = 0.95"))
    assert problems(tmp_path, "dataset = []\n" + MINIMAL[: MINIMAL.index("[dataset]")]) == [
        'my.toml:1: dataset: is missing: [dataset] with path = "…" names the preference data'
    ]


def test_a_table_that_is_not_used_is_checked_all_the_same(tmp_path: Path) -> None:
    text = MINIMAL.replace('"sft", "reward", "ppo"', '"sft"') + "[ppo]\nkl_coff = 1\n"
    assert problems(tmp_path, text) == [
        'my.toml:9: ppo.kl_coff: unknown key (did you mean "kl_coef"?)'
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"a = 1\nb = bfloat16\n", "my.toml:2: not TOML: Invalid value: b = bfloat16; text needs quotes"),
        (b"a = 1\n\n[a]\n", "my.toml:3: not TOML: Cannot overwrite a value: [a]"),
        (b"a = 1\nb = [1,\n", "my.toml:2: not TOML: Invalid value: b = [1,"),
        (b"a = 1\nb = '\xff'\n", "my.toml:2: is not UTF-8 text"),
    ],
)  # fmt: skip
def test_what_is_no_toml(tmp_path: Path, text: bytes, problem: str) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).replace(f"{tmp_path}/", "") == problem
    assert caught.value.exit_code == 2


# ---- files


def test_shipped_recipes_are_found_by_name(tmp_path: Path) -> None:
    assert "smoke" in [path.stem for path in shipped_recipes()]
    assert find_recipe("smoke").name == "smoke.toml"
    file = write(tmp_path, MINIMAL)
    assert find_recipe(str(file)) == file
    with pytest.raises(UsageError, match=r'no recipe smok \(did you mean "smoke"\?\) \(shipped: '):
        find_recipe("smok")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gone.toml is no recipe file"):
        load_recipe(tmp_path / "gone.toml")


# ---- lines


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
