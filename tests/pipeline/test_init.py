"""`init`: a recipe for a person's own file, which `check` takes and a run gets through."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.data.first_rows import check_rows
from rlhf_recipes.errors import DataError, RecipeError, UsageError
from rlhf_recipes.pipeline.init import Start, start, weights_by_name
from rlhf_recipes.recipe.load import load_recipe

ABSENT = "org/base-135M"  # on no hub: the network is off
PAIRS = [(f"what is thing {n}", f"thing {n} is a good thing", f"no idea {n}") for n in range(60)]
TURNS = [
    [f"\n\nHuman: {asked}\n\nAssistant: {said}" for said in answers] for asked, *answers in PAIRS
]


def table(file: Path, names: str, mark: str = ",", encoding: str = "utf-8") -> Path:
    with file.open("w", newline="", encoding=encoding) as stream:
        csv.writer(stream, delimiter=mark).writerows([names.split("/"), *PAIRS])
    return file


def rows(file: Path, found: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


def labels(good: str, name: str, words: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [
        {"asked": asked, good: answer, name: word}
        for asked, *answers in PAIRS
        for answer, word in zip(answers, words, strict=True)
    ]


def begun(file: Path, **words: Any) -> Start:
    return start(file, file.with_suffix(".toml"), **{"model": ABSENT} | words)


SHAPES = {
    "known names": (lambda f: table(f, "prompt/chosen/rejected"), {}, "pairs"),
    "names by their meaning": (
        lambda f: table(f, "question/good_answer/bad_answer"),
        {"prompt": "question", "chosen": "good_answer", "rejected": "bad_answer"},
        "pairs",
    ),
    "names in another language, UTF-16, semicolons": (
        lambda f: table(f, "Frage/Antwort A/Antwort B", ";", "utf-16"),
        {"prompt": "Frage", "chosen": "Antwort A", "rejected": "Antwort B"},
        "pairs",
    ),
    "a byte-order mark": (
        lambda f: table(f, "question/better/worse", encoding="utf-8-sig"),
        {"prompt": "question", "chosen": "better", "rejected": "worse"},
        "pairs",
    ),
    "transcripts": (
        lambda f: rows(f, [{"chosen": good, "rejected": bad} for good, bad in TURNS]),
        {},
        "pairs",
    ),
    "labels": (
        lambda f: rows(f, labels("completion", "label", (True, False))),
        {"prompt": "asked", "completion": "completion", "label": "label"},
        "labels",
    ),
    "labels by their meaning": (
        lambda f: rows(f, labels("reply", "was_it_good", ("yes", "no"))),
        {"prompt": "asked", "completion": "reply", "label": "was_it_good"},
        "labels",
    ),
    "demonstrations": (
        lambda f: rows(f, [{"question": asked, "answer": good} for asked, good, _ in PAIRS]),
        {},
        "answers",
    ),
    "prompts alone": (lambda f: rows(f, [{"prompt": p} for p, *_ in PAIRS]), {}, "prompts"),
}
STAGES = {
    "pairs": ("sft", "reward", "ppo"),
    "labels": ("sft", "kto"),
    "answers": ("sft",),
    "prompts": ("grpo",),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_files_shape_is_recognised_and_its_recipe_is_valid(shape: str, tmp_path: Path) -> None:
    make, columns, holds = SHAPES[shape]
    file = make(tmp_path / "own.csv")
    if file.read_bytes()[:1] == b"{":
        file = file.rename(tmp_path / "own.jsonl")
    made = begun(file)
    assert (made.looked.columns, made.looked.holds) == (columns, holds)
    assert made.looked.dropped.total() == 0
    made.write()
    recipe = load_recipe(tmp_path / "own.toml")
    assert recipe.stages == STAGES[holds]
    assert recipe.notes == ()
    check_rows(recipe)


@pytest.mark.parametrize("method", ["ppo", "rloo", "grpo", "dpo", "kto", "sft"])
def test_every_method_that_pairs_teach(method: str, tmp_path: Path) -> None:
    made = begun(table(tmp_path / "own.csv", "prompt/chosen/rejected"))
    assert method in made.methods
    recipe = made.write(method)
    assert recipe.stages[-1] == method
    assert ("reward" in recipe.stages) == (method in ("ppo", "rloo", "grpo"))
    # At 135 million weights `chat` measured SFT, the reward model and PPO, and no other method.
    rates = [line for line in recipe.text.splitlines() if line.startswith("learning_rate")]
    said = ["about as in `chat`" in rate for rate in rates]
    assert said == [stage in ("sft", "reward", "ppo") for stage in recipe.stages]
    assert "not measured at this size" in rates[-1] or said[-1]


def test_a_method_that_the_rows_cannot_teach(tmp_path: Path) -> None:
    made = begun(rows(tmp_path / "own.jsonl", labels("completion", "label", (1, 0))))
    with pytest.raises(UsageError, match="holds labels, from which dpo cannot learn") as error:
        made.write("dpo")
    assert error.value.hint.startswith("--method is kto or ")
    assert not (tmp_path / "own.toml").exists()


def test_without_the_model_the_recipe_says_that_it_estimates(tmp_path: Path) -> None:
    made = begun(table(tmp_path / "own.csv", "prompt/chosen/rejected"))
    recipe = made.write()
    text = " ".join(line.strip("# ") for line in recipe.text.splitlines())
    assert "lengths are estimated at three characters a token" in text
    assert "Batch sizes are small ones that fit most machines." in text
    assert recipe.tables["sft"].options["per_device_train_batch_size"] == 1
    assert recipe.tables["sft"].options["gradient_checkpointing"] is True
    assert recipe.tables["sft"].options["learning_rate"] == 1e-4  # its name says 135M
    assert "the longest prompt has about 30" in text
    assert made.notes[0].startswith("the model org/base-135M is neither on this machine nor")


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135e6),
        ("Qwen/Qwen2.5-0.5B", 0.5e9),
        ("allenai/Llama-3.1-Tulu-3-8B-SFT", 8e9),
        ("org/model", None),
    ],
)
def test_how_large_a_model_is_by_its_name(name: str, weights: float | None) -> None:
    assert weights_by_name(name) == weights


def test_few_long_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    found = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in PAIRS]
    found[7]["prompt"] = "long " * 400
    text = begun(rows(tmp_path / "own.jsonl", found)).write().text
    said = " ".join(text.replace("#", "").split())
    assert (
        "max_prompt_tokens = 32 the longest prompt has about 691; 1 of 60 rows are longer" in said
    )


def test_splits_by_what_can_be_proven(tmp_path: Path) -> None:
    """200 test prompts where there are enough; a quarter of the prompts at most."""
    for count, share in ((60, 0.25), (1000, 0.2), (20_000, 0.02)):
        file = rows(tmp_path / f"{count}.jsonl", [{"prompt": f"w {n}"} for n in range(count)])
        assert begun(file).write().dataset.test_fraction == share


def test_what_is_set_wins_over_what_is_guessed(tmp_path: Path) -> None:
    file = table(tmp_path / "own.csv", "question/good_answer/bad_answer")
    words = ['dataset.columns={prompt="question", chosen="bad_answer", rejected="good_answer"}']
    recipe = begun(file, set=[*words, "seed=7"]).write()
    assert recipe.dataset.columns["chosen"] == "bad_answer"
    assert load_recipe(recipe.path).seed == 7


def test_what_is_not_recognised_is_answered_with_words_to_type(tmp_path: Path) -> None:
    file = rows(tmp_path / "own.jsonl", [{"n": 1, "m": 2}])
    with pytest.raises(DataError, match="not recognised; its columns are n, m") as error:
        begun(file)
    assert "--set 'dataset.columns={prompt = " in error.value.hint


def test_calls_that_are_wrong(tmp_path: Path) -> None:
    file = table(tmp_path / "own.csv", "prompt/chosen/rejected")
    with pytest.raises(UsageError, match="no file "):
        begun(tmp_path / "none.csv")
    with pytest.raises(UsageError, match="not a file of rows by its name"):
        begun(rows(tmp_path / "own.doc", []))
    with pytest.raises(RecipeError, match="no such folder"):
        begun(file, model="./nowhere")
    begun(file).write()
    with pytest.raises(UsageError, match="own.toml is there already"):
        begun(file)


# ---- with a model


@pytest.mark.train
def test_a_small_card_gets_smaller_batches_and_a_steps_rows_stay(
    tiny_model: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    made = start(tiny_pairs, tmp_path / "own.toml", model=str(tiny_model))
    options = made.write("sft", "0.7005GB").tables["sft"].options
    rows = options["per_device_train_batch_size"]
    assert rows < 8 and rows * options["gradient_accumulation_steps"] == 8
    assert options["gradient_checkpointing"] is True
    assert "recomputes activations" in (tmp_path / "own.toml").read_text()


@pytest.mark.train
def test_from_a_table_to_a_verdict(tiny_model: Path, tiny_pairs: Path, tmp_path: Path) -> None:
    from rlhf_recipes.pipeline.runner import run

    file = tmp_path / "own.csv"
    with file.open("w", newline="") as stream:
        lines = csv.writer(stream, delimiter=";")
        lines.writerow(["question", "good_answer", "bad_answer"])
        lines.writerows(json.loads(line).values() for line in tiny_pairs.read_text().splitlines())
    made = start(file, tmp_path / "own.toml", model=str(tiny_model))
    recipe = made.write("dpo", "24GB")
    assert {*made.looked.prompts} == {7}  # by the model's own tokenizer and template
    assert (recipe.dataset.max_prompt_tokens, recipe.dataset.max_answer_tokens) == (8, 8)
    assert recipe.tables["dpo"].options["gradient_checkpointing"] is False
    assert recipe.model.dtype == "float32"
    assert "Batch sizes: by the memory rule, for a card with 24 GB." in recipe.text
    assert "# the whole test side: a win rate of 50 % is right to ±" in recipe.text
    outcome = run(load_recipe(recipe.path), runs=tmp_path / "runs", rehearse=False)
    assert outcome.results["evaluation.prompts"] == recipe.evaluation.prompts
    assert outcome.verdict
