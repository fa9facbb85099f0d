"""The four stages on a tiny model: what moved, what was scored, what was read by whom."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_recipes.errors import StageError
from rlhf_recipes.models.reward_model import (
    fined,
    floor_of,
    open_foreign,
    open_reward,
    read_floor,
    read_unit,
)
from rlhf_recipes.models.role import score, values
from rlhf_recipes.models.sampling import join, score_ids
from rlhf_recipes.pipeline.export import write_reward_model
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages import evaluate
from rlhf_recipes.stages.ppo.trainer import PPOTrainer
from tests.helpers.chains import Chain, Silent, adapter, base_weights, differs

pytestmark = pytest.mark.train


@pytest.fixture
def chain(tiny_recipe: Path, tmp_path: Path) -> Chain:
    return Chain(load_recipe(tiny_recipe), tmp_path / "stages")


def test_each_stage_moves_its_own_weights_and_no_other(chain: Chain) -> None:
    base = base_weights(chain.session.base)
    results = chain.all()
    assert not differs(base, base_weights(chain.session.base))
    sft, reward = adapter(chain.outputs["sft"]), adapter(chain.outputs["reward"])
    policy = adapter(chain.outputs["ppo"])
    value = adapter(chain.outputs["ppo"] / "value")
    # Two layers × seven projections × A and B: each stage moved all of its own from its start.
    assert all(len(differs(a, b)) == 28 for a, b in [(sft, reward), (sft, policy), (reward, value)])
    assert (
        results["sft"].metrics["validation_loss"]
        < (results["sft"].metrics["validation_loss_before"])
    )


def test_a_killed_ppo_stage_goes_on_and_ends_with_the_same_bytes(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"policy": "sft", "reward_model": "reward"}
    chain.run("sft", {})
    chain.run("reward", {"policy": "sft"})
    recipe = load_recipe(chain.recipe.path, set=["ppo.save_steps=1"])
    trained = dict(chain.outputs)

    def start(folder: str) -> Chain:
        return Chain(recipe, tmp_path / folder, outputs=dict(trained))

    def weights(chain: Chain) -> dict[str, bytes]:
        output = chain.outputs["ppo"]
        return {str(f.relative_to(output)): f.read_bytes() for f in output.rglob("*.safetensors")}

    def kill(_: Silent, done: int, total: int, **numbers: float) -> None:
        if done == total:
            raise KeyboardInterrupt

    whole, cut, again = start("whole"), start("cut"), start("cut")
    wanted = whole.run("ppo", inputs)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Silent, "update", kill)
        cut.run("ppo", inputs)
    assert again.run("ppo", inputs).metrics == wanted.metrics
    assert [u["episode"] for u in again.progress.updates] == [32]
    assert len(weights(whole)) == 3
    assert weights(again) == weights(whole)


@pytest.mark.parametrize(
    ("rows", "stage", "wrong"),
    [
        (["prompt"], "sft", "sft: no answers on the train side"),
        (
            ["prompt", "completion"],
            "reward",
            "reward: no pairs, and no labels of both kinds, on the train side",
        ),
        (["prompt", "completion"], "dpo", "dpo: no pairs on the train side"),
        ([], "ppo", "ppo: no prompts on the train side"),
    ],
)
def test_a_stage_that_is_left_with_none_says_of_what(
    tiny_recipe: Path, tmp_path: Path, rows: list[str], stage: str, wrong: str
) -> None:
    file, fraction = tmp_path / "rows.jsonl", 0.2 if rows else 0.8
    row = dict.fromkeys(rows or ["prompt"], "red")
    file.write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    sets = [
        f"dataset.path={file}",
        f"dataset.test_fraction={fraction}",
        'stages=["sft","reward","dpo","ppo"]',
    ]
    chain = Chain(load_recipe(tiny_recipe, set=sets), tmp_path / "stages")
    with pytest.raises(StageError) as error:
        chain.run(stage, {})
    assert error.value.message == wrong


def test_the_base_is_in_memory_once_after_every_stage(chain: Chain) -> None:
    """No stage keeps a second copy, and no adapter outlives its stage."""
    chain.all()
    lm = chain.session.base.lm
    embedding = lm.get_input_embeddings().weight
    live = [t for t in _live_tensors() if t.shape == embedding.shape]
    copies = {t.data_ptr() for t in live if torch.equal(t, embedding)}
    assert copies == {embedding.data_ptr()}
    assert [name for name, _ in lm.named_parameters() if "lora_" in name] == []


def _live_tensors() -> list[torch.Tensor]:
    import gc

    gc.collect()
    return [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]


def test_the_ids_of_equal_text_are_equal_in_every_stage(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SFTTrainer, RewardTrainer and PPO were really given, for the same prompt and answer."""
    from rlhf_recipes.stages import reward as reward_stage
    from rlhf_recipes.stages import sft as sft_stage

    seen: dict[str, Any] = {}
    for module in (sft_stage, reward_stage):

        class Spy(module.Trainer):
            def train(self, *args: Any, **kwargs: Any) -> Any:
                seen[self._name] = next(iter(self.get_train_dataloader()))
                seen[f"{self._name} rows"] = list(self.train_dataset)
                return super().train(*args, **kwargs)

        monkeypatch.setattr(module, "Trainer", Spy)
    train = PPOTrainer.train

    def spy(self: PPOTrainer) -> None:
        seen["PPO"] = [row["input_ids"] for row in self.train_dataset]
        train(self)

    monkeypatch.setattr(PPOTrainer, "train", spy)
    chain.all()
    data = chain.session.data(chain.recipe.dataset)
    examples = {tuple(e.prompt_ids + e.chosen_ids): e for e in data.train}
    sft = {tuple(row["input_ids"]) for row in seen["SFT rows"]}
    reward = {tuple(row["chosen_ids"]) for row in seen["Reward rows"]}
    # SFT and the reward model learn the same pairs: the judge's are kept from both.
    assert sft == reward < set(examples)
    assert all(ids[-1] == 2 and ids.count(2) == 2 for ids in sft | reward)  # the user's turn, EOS
    assert {tuple(p) for p in seen["PPO"]} == {tuple(e.prompt_ids) for e in data.train}
    # Only the answer is learned, its EOS included and nothing after it.
    for row in seen["SFT rows"]:
        example = examples[tuple(row["input_ids"])]
        assert row["labels"] == [-100] * len(example.prompt_ids) + example.chosen_ids
    assert set(seen["SFT"]) >= {"input_ids", "labels", "attention_mask"}


def test_the_reference_is_the_sft_model(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.run("sft", {})
    chain.run("reward", {"policy": "sft"})
    weights: dict[str, torch.Tensor] = {}
    train = PPOTrainer.train

    def spy(self: PPOTrainer) -> None:
        for name, parameter in self.ref_model.lm.named_parameters():
            if ".reference." in name:
                weights[name.replace(".reference.", ".")] = parameter.detach().clone()
        train(self)

    monkeypatch.setattr(PPOTrainer, "train", spy)
    chain.run("ppo", {"policy": "sft", "reward_model": "reward"})
    sft = {
        name.removeprefix("base_model.model."): t
        for name, t in adapter(chain.outputs["sft"]).items()
    }
    assert weights.keys() == sft.keys() and not differs(weights, sft)
    assert chain.progress.updates[-2]["objective/kl"] == 0.0
    assert chain.progress.updates[-1]["objective/kl"] > 0.0


def test_the_value_starts_as_the_reward_model_in_units(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any step, the value of a finished answer is its reward."""
    chain.run("sft", {})
    chain.run("reward", {"policy": "sft"})
    apart: list[float] = []
    train = PPOTrainer.train

    def spy(self: PPOTrainer) -> None:
        rows = join([[1, 4, 7, 5]] * 2, [[7, 8, 2], [12, 2]], 0, torch.device("cpu"), 4)
        with torch.no_grad():
            with self.value_model.active():
                value = values(self.value_model, rows.ids, rows.mask, rows.answer)
            with self.reward_model.active():
                reward = score(self.reward_model, rows.ids, rows.mask, rows.last)
        apart.extend((value[[0, 1], [3, 2]] - reward).abs().tolist())  # the state after EOS
        train(self)

    monkeypatch.setattr(PPOTrainer, "train", spy)
    chain.run("ppo", {"policy": "sft", "reward_model": "reward"})
    assert max(apart) < 1e-5


@pytest.mark.parametrize("start", ["nothing", "ppo"])
def test_the_reference_is_what_the_stage_starts_from(chain: Chain, start: str) -> None:
    """Without SFT, the bare base; in a second PPO stage, the first one's policy: KL 0 at first."""
    chain.run("sft", {})
    chain.run("reward", {"policy": "sft"})
    inputs = {"reward_model": "reward"}
    if start == "ppo":
        chain.run("ppo", {"policy": "sft", **inputs})
        inputs["policy"] = "ppo"
        (chain.folder / "ppo").rename(chain.folder / "first")
        chain.outputs["ppo"] = chain.folder / "first" / "output"
    chain.progress.updates.clear()
    chain.run("ppo", inputs)
    assert chain.progress.updates[0]["objective/kl"] == 0.0


@pytest.mark.parametrize("word", ["lora.use_dora=true", 'lora.init_lora_weights="orthogonal"'])
def test_kl_is_0_at_first_without_sft_under_any_adapter(tiny_recipe, tmp_path, word) -> None:
    """DoRA rescales what it starts from, and orthogonal factors cancel to rounding alone."""
    chain = Chain(load_recipe(tiny_recipe, set=[word]), tmp_path / "stages")
    chain.run("reward", {})
    chain.progress.updates.clear()
    chain.run("ppo", {"reward_model": "reward"})
    assert chain.progress.updates[0]["objective/kl"] == 0.0


def test_ppo_taken_as_sft_is_unchanged_at_half_the_wins(chain: Chain) -> None:
    chain.run("sft", {})
    chain.run("reward", {"policy": "sft"})
    metrics = chain.evaluate({"sft": "sft", "ppo": "sft"}).metrics
    assert metrics["ppo.win_rate"] == 0.5
    assert metrics["ppo.kl"] == 0.0
    assert metrics["ppo.unchanged"] == 1.0
    assert metrics["ppo.score_gain"] == 0.0
    assert metrics["ppo.score"] == metrics["sft.score"] != metrics["base.score"]


def test_evaluating_or_not_changes_no_weight(chain: Chain, tiny_recipe: Path) -> None:
    chain.run("sft", {})
    chain.run("reward", {"policy": "sft"})
    chain.evaluate({"sft": "sft"})
    chain.run("ppo", {"policy": "sft", "reward_model": "reward"})
    other = Chain(load_recipe(tiny_recipe), chain.folder.with_name("other"))
    other.run("sft", {})
    other.run("reward", {"policy": "sft"})
    other.run("ppo", {"policy": "sft", "reward_model": "reward"})
    for stage in ("sft", "reward", "ppo"):
        a, b = (c.outputs[stage] / "adapter_model.safetensors" for c in (chain, other))
        assert a.read_bytes() == b.read_bytes()


def test_the_unit_is_mean_0_and_deviation_1_over_the_training_chosen(chain: Chain) -> None:
    chain.run("sft", {})
    chain.run("reward", {"policy": "sft"})
    reward = open_reward(chain.session.base, chain.outputs["reward"])
    pairs = chain.session.data(chain.recipe.dataset).reward_train
    scores = score_ids(reward, [(e.prompt_ids, e.chosen_ids) for e in pairs], 0, 7)
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert scores.std().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("kind", ["own", "foreign"])
def test_a_rejected_answer_that_is_cut_in_half_gains_nothing(
    chain: Chain, tmp_path: Path, kind: str
) -> None:
    """A penalty of 1 alone leaves it a gain: the reward model has seen no answer without EOS."""
    chain.run("sft", {})
    metrics = chain.run("reward", {"policy": "sft"}).metrics
    rows = [e for e in chain.session.data(chain.recipe.dataset).reward_train if e.rejected_ids[1:]]
    unit = 1.0
    if kind == "own":
        reward = open_reward(chain.session.base, chain.outputs["reward"])
        floor = read_floor(chain.outputs["reward"])
        assert floor == pytest.approx(metrics["unit_floor"], abs=1e-6)
    else:
        write_reward_model(chain.session, chain.outputs["reward"], tmp_path / "rm", form="merged")
        reward = open_foreign(tmp_path / "rm", chain.session.base, chain.session.tokens)
        floor, unit = floor_of(reward, rows, 0, 8), metrics["unit_std"]
    whole = score_ids(reward, [(e.prompt_ids, e.rejected_ids) for e in rows], 0, 8)
    halves = [(e.prompt_ids, e.rejected_ids[: len(e.rejected_ids) // 2]) for e in rows]
    half = score_ids(reward, halves, 0, 8)
    cut = torch.zeros(len(rows), dtype=torch.bool)
    before = fined(half, cut, unit, math.inf) - whole
    now = fined(half, cut, unit, floor) - whole
    assert floor == pytest.approx((whole.mean() - whole.std(correction=0)).item(), abs=1e-4)
    assert (before > 0).float().mean() > 0.3
    assert now.mean() < -1.5 * unit and (now > 0).float().mean() < 0.1


def test_an_exported_reward_model_scores_as_trained_and_serves_another_run(
    chain: Chain, tiny_recipe: Path, tmp_path: Path
) -> None:
    """PPO against a reward model from a folder: held apart, the value from the policy, at 0."""
    chain.run("sft", {})
    chain.run("reward", {"policy": "sft"})
    folder = tmp_path / "exported"
    write_reward_model(chain.session, chain.outputs["reward"], folder, form="merged")
    mean, std = read_unit(chain.outputs["reward"])
    rows = [(e.prompt_ids, e.chosen_ids) for e in chain.session.data(chain.recipe.dataset).test]
    ours = score_ids(open_reward(chain.session.base, chain.outputs["reward"]), rows, 0, 8)
    foreign = open_foreign(folder, chain.session.base, chain.session.tokens)
    assert torch.allclose(score_ids(foreign, rows, 0, 8), ours * std + mean, atol=1e-4)

    changes = [f"ppo.reward_model={folder}", 'stages=["sft", "ppo"]']
    other = Chain(load_recipe(tiny_recipe, set=changes), tmp_path / "other")
    other.run("sft", {})
    result = other.run("ppo", {"policy": "sft"})
    assert result.metrics["updates"] == 2 and result.metrics["reward.test_pairs"] == 15
    metrics = other.run(
        "evaluation", {"policy:sft": "sft", "policy:ppo": "ppo"}, kind="evaluation"
    ).metrics
    assert 0 < metrics["ppo.kl"] < 50


def test_the_evaluations_numbers_are_what_they_say(chain: Chain) -> None:
    """Recomputed from the answers it left on disk."""
    metrics = chain.all()["evaluation"].metrics
    lines = (chain.outputs["evaluation"] / "answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == metrics["evaluation.prompts"] == 12
    gains = [row["scores"]["ppo"] - row["scores"]["sft"] for row in rows]
    wins = sum((g > 0) + 0.5 * (g == 0) for g in gains) / 12
    assert metrics["ppo.win_rate"] == pytest.approx(wins)
    assert metrics["ppo.score_gain"] == pytest.approx(sum(gains) / 12, abs=1e-3)
    tested = {e.prompt for e in chain.session.data(chain.recipe.dataset).test}
    assert {row["prompt"] for row in rows} <= tested
    said = [row["answers"]["ppo"].split() for row in rows]
    pairs = [pair for words in said for pair in zip(words, words[1:], strict=False)]
    assert metrics["ppo.distinct_2"] == pytest.approx(len(set(pairs)) / len(pairs), abs=0.1)


def test_a_written_rule_judges_beside_the_reward_model(tiny_recipe: Path, tmp_path: Path) -> None:
    """It gets the prompt and the answer as texts, and its numbers are those in answers.jsonl."""
    rule = tmp_path / "rule.py"
    rule.write_text("def rule(prompt, answer):\n    return len(answer) + len(prompt) / 1000\n")
    chain = Chain(load_recipe(tiny_recipe, set=[f"evaluation.judge=python:{rule}:rule"]), tmp_path)
    metrics = chain.all()["evaluation"].metrics
    lines = (chain.outputs["evaluation"] / "answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        by_hand = {n: len(a) + len(row["prompt"]) / 1000 for n, a in row["answers"].items()}
        assert row["judged"] == pytest.approx(by_hand)
    gains = [row["judged"]["ppo"] - row["judged"]["sft"] for row in rows]
    wins = sum((g > 0) + 0.5 * (g == 0) for g in gains) / len(rows)
    assert metrics["ppo.judge_win_rate"] == pytest.approx(wins)
    assert metrics["ppo.judge_score"] == pytest.approx(
        sum(row["judged"]["ppo"] for row in rows) / len(rows), rel=1e-4
    )

    rule.write_text("def rule(prompt, answer):\n    return float('nan')\n")
    with pytest.raises(StageError, match="does not judge: ValueError: nan for the answer"):
        chain.evaluate({"sft": "sft"})


def test_nats_under_the_base_are_the_mean_over_tokens(chain: Chain) -> None:
    base = chain.session.base.open("bare", None, seed=0)
    examples = chain.session.data(chain.recipe.dataset).test[:3]
    answers = [e.chosen_ids for e in examples]
    total = 0.0
    for example, answer in zip(examples, answers, strict=True):
        ids = torch.tensor([example.prompt_ids + answer])
        with torch.no_grad():
            out = torch.log_softmax(base.lm(input_ids=ids).logits[0], -1)
        before = len(example.prompt_ids) - 1
        total -= sum(out[before + i, token].item() for i, token in enumerate(answer))
    by_hand = total / sum(map(len, answers))
    assert evaluate.nats_a_token(base, examples, answers) == pytest.approx(by_hand, rel=1e-4)


def test_exact_kl_is_the_vocabularys(chain: Chain) -> None:
    """Against a sum over the vocabulary by hand, one unpadded answer at a time."""
    chain.run("sft", {})
    base = chain.session.base
    policy = base.open("policy", chain.outputs["sft"], seed=0)
    start = base.open("start", None, seed=0)
    examples = chain.session.data(chain.recipe.dataset).test[:3]
    answers = [e.chosen_ids for e in examples]
    setting = evaluate.Setting(length=8, temperature=0.9, seed=0)
    by_hand = 0.0
    for example, answer in zip(examples, answers, strict=True):
        ids = torch.tensor([example.prompt_ids + answer])
        both = []
        for role in (policy, start):
            with role.active(), torch.no_grad():
                out = base.lm(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1] / 0.9
            both.append(torch.log_softmax(out, -1))
        by_hand += (both[0].exp() * (both[0] - both[1])).sum().item()
    assert evaluate.exact_kl(policy, start, examples, answers, setting) == pytest.approx(
        by_hand / 3, rel=1e-4
    )


@pytest.mark.parametrize("lora", ["lora.r=4", "lora=false"])
def test_sft_in_bfloat16_learns_what_it_learns_in_float32(
    tiny_recipe: Path, tmp_path: Path, lora: str
) -> None:
    """Under one autocast every step saw the first one's weights: 4.73 → 4.73 nats a token."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        recipe = load_recipe(tiny_recipe, set=[f"model.dtype={dtype}", "sft.max_steps=20", lora])
        losses.append(Chain(recipe, tmp_path / dtype).run("sft", {}).metrics["validation_loss"])
    assert losses[0] < 3.2 and losses[1] == pytest.approx(losses[0], abs=0.05)


@pytest.mark.parametrize(
    "change",
    [
        "lora=false",
        "lora.use_dora=true",
        "lora.use_rslora=true",
        "model.dtype=bfloat16",
        "ppo.gradient_checkpointing=true",
    ],
)
def test_the_chain_runs_otherwise_too(tiny_recipe: Path, tmp_path: Path, change: str) -> None:
    results = Chain(load_recipe(tiny_recipe, set=[change]), tmp_path / "stages").all()
    assert results["ppo"].metrics["updates"] == 2
    assert 0.0 < results["evaluation"].metrics["ppo.kl"] < 50


def test_checkpointing_in_stock_trainers_changes_no_weight(
    chain: Chain, tiny_recipe: Path, tmp_path: Path
) -> None:
    """And neither leaves its hooks or its switch on the session base."""
    changes = ["sft.gradient_checkpointing=true", "reward.gradient_checkpointing=true"]
    other = Chain(load_recipe(tiny_recipe, set=changes), tmp_path / "checkpointed")
    for one in (chain, other):
        one.run("sft", {})
        one.run("reward", {"policy": "sft"})
    for stage in ("sft", "reward"):
        plain, checkpointed = adapter(chain.outputs[stage]), adapter(other.outputs[stage])
        assert all(torch.allclose(plain[k], checkpointed[k], atol=1e-5) for k in plain)
    lm = other.session.base.lm
    assert not any(getattr(module, "gradient_checkpointing", False) for module in lm.modules())
    assert not lm.get_input_embeddings()._forward_hooks


# Left out, as most recipes leave them, they are true.
CHECKPOINTING = [f"{stage}.gradient_checkpointing" for stage in ("sft", "reward", "ppo")]


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_the_chain_runs_quantized_and_every_adapter_trains(
    tiny_recipe: Path, tmp_path: Path, bits: str
) -> None:
    """bitsandbytes' repacking on AVX512-BF16 drops gradients after an evaluation (fact 36).

    In 8 bit, rounding can put one of an update's few tokens beyond a clip of 0.2.
    """
    words = [f"model.quantization={bits}", "ppo.cliprange=0.5"]
    recipe = load_recipe(tiny_recipe, set=words, unset=CHECKPOINTING)
    chain = Chain(recipe, tmp_path / "stages")
    chain.all()
    sft, policy = adapter(chain.outputs["sft"]), adapter(chain.outputs["ppo"])
    value, reward = adapter(chain.outputs["ppo"] / "value"), adapter(chain.outputs["reward"])
    assert len(differs(sft, policy)) == 28 and len(differs(reward, value)) == 28
    assert {t.dtype for t in sft.values()} == {torch.float32}
