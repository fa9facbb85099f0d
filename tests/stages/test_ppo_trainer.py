"""The PPO loop: each test fails on the wrong behaviour that its name denies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_recipes.errors import StageError
from rlhf_recipes.models import sampler
from rlhf_recipes.models.base import Base
from rlhf_recipes.models.load import load_causal_lm
from rlhf_recipes.recipe.kinds import Limits
from rlhf_recipes.stages.ppo import checks
from rlhf_recipes.stages.ppo.guards import Guard
from rlhf_recipes.stages.ppo.loop import LOSS_SCALE
from rlhf_recipes.stages.ppo.losses import Rollout, Rows, advantages, explained_variance
from rlhf_recipes.stages.ppo.trainer import PPOTrainer
from tests.helpers.roles import make_base
from tests.helpers.trainers import PROMPTS, make_trainer

pytestmark = pytest.mark.train


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path):
    def build(base: Base | None = None, **words: Any) -> PPOTrainer:
        return make_trainer(base or make_base(tiny_model), tmp_path, model=tiny_model, **words)

    return build


def weights(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """Every tensor of the base and its adapters and heads, copied."""
    named = {name: p.detach().clone() for name, p in trainer.policy_model.lm.named_parameters()}
    named["value.score"] = trainer.value_model.score.weight.detach().clone()
    named["reward.score"] = trainer.reward_model.score.weight.detach().clone()
    return named


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_s_dropout_is_off_where_a_policy_learns(
    tiny_model: Path, tmp_path: Path, make, checkpointing: bool
) -> None:
    """Modules keep it as a number, not as an nn.Dropout: 22 % of tokens were clipped at once."""
    folder = shutil.copytree(tiny_model, tmp_path / "dropout")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
    words = {"gradient_checkpointing": checkpointing, "num_ppo_epochs": 1, "num_mini_batches": 1}
    trainer = make(make_base(folder), **words)
    metrics = trainer.optimize(trainer.rollout(1), 1)
    assert metrics["policy/approxkl_avg"] < 1e-10 and metrics["policy/clipfrac_avg"] == 0


def test_a_policy_that_reads_otherwise_as_it_learns_stops_and_names_the_module(
    tiny_model: Path, make
) -> None:
    trainer = make()
    trainer.args.gradient_checkpointing = True
    name, layer = next(x for x in trainer.policy_model.lm.named_modules() if x[0].endswith("1.mlp"))
    layer.register_forward_hook(lambda module, _, out: out * (1.1 if module.training else 1))
    with pytest.raises(StageError) as error:
        trainer.train()
    assert "other probabilities in learning than in sampling" in str(error.value)
    assert f"the first module that differs is {name}" in str(error.value)


def test_the_bounds_allow_for_tf32_on_a_card() -> None:
    role = SimpleNamespace(lm=SimpleNamespace(device=torch.device("cuda")), dtype=torch.float32)
    assert checks.rounding(role) == checks.ROUNDING[torch.float32]
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert checks.rounding(role) == checks.ROUNDING[torch.bfloat16]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(
    ("accumulation", "mini_batches", "prompts"),
    [(1, 1, 8), (1, 2, 2), (1, 4, 8), (2, 1, 2), (2, 4, 2), (4, 1, 8), (4, 2, 8), (4, 4, 2)],
)
def test_steps_are_epochs_times_mini_batches(
    make, accumulation: int, mini_batches: int, prompts: int
) -> None:
    """Stock: accumulation counts the whole batch, and a pass's last batch steps every time."""
    trainer = make(
        prompts=PROMPTS * prompts,  # one batch, or many
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        num_mini_batches=mini_batches,
        num_ppo_epochs=3,
        total_episodes=24,
        response_length=2,
    )
    steps = []
    inner = trainer.optimizer
    inner.register_step_post_hook(lambda *_: steps.append(1))
    trainer.train()
    assert len(steps) == 3 * 3 * mini_batches
    assert trainer.metrics["episode"] == 24


def test_four_times_four_is_sixteen_times_one(make) -> None:
    """Accumulation changes no weight, on answers of different lengths."""
    after = []
    for micro, accumulation in ((4, 4), (16, 1)):
        trainer = make(
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            num_mini_batches=1,
            total_episodes=16,
            prompts=PROMPTS * 4,
            response_length=20,
        )
        lengths: list[int] = []
        trainer.on_update = lambda _, r, __, seen=lengths: seen.extend(r.sequences.lengths.tolist())
        trainer.train()
        assert len(set(lengths)) > 2
        after.append(weights(trainer))
    assert all(torch.allclose(after[0][k], after[1][k], atol=1e-6) for k in after[0])


def test_only_policy_value_and_its_head_move(make) -> None:
    trainer = make(learning_rate=1e-2)
    before = weights(trainer)
    trainer.train()
    now = weights(trainer)
    moved = {name for name in now if not torch.equal(before[name], now[name])}
    meant = {n for n in now if ".policy." in n or ".value." in n or n == "value.score"}
    assert moved == meant and len(meant) == 2 * 2 * 7 * 2 + 1


def test_one_small_step_moves_every_trainable_tensor(tiny_model: Path, make) -> None:
    """At lr 1e-6 on a bfloat16 base: adapters in bfloat16 would be frozen by rounding."""
    trainer = make(
        make_base(tiny_model, torch.bfloat16),
        learning_rate=1e-6,
        num_ppo_epochs=1,
        num_mini_batches=1,
        lr_scheduler_type="constant",
    )
    before = [p.detach().clone() for p in trainer.policy_model.trainable()]
    before += [p.detach().clone() for p in trainer.value_model.trainable()]
    trainer.train()
    now = [*trainer.policy_model.trainable(), *trainer.value_model.trainable()]
    assert {p.dtype for p in now} == {torch.float32}
    assert all(not torch.equal(a, b) for a, b in zip(before, now, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_is_exactly_zero_at_the_first_update(tiny_model: Path, make, dtype) -> None:
    trainer = make(make_base(tiny_model, dtype), total_episodes=16, learning_rate=1e-2)
    kl: list[float] = []
    trainer.on_update = lambda _, __, metrics: kl.append(metrics["objective/kl"])
    trainer.train()
    assert kl[0] == 0.0 and kl[1] > 0.0


def test_another_reference_stops_the_run(make) -> None:
    with pytest.raises(StageError, match="the reference is not the policy"):
        make(same_reference=False).train()
    make(same_reference=False, words={"other_reference": True}).train()


def test_what_is_scored_together_says_nothing_of_what_is_sampled_together(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits bound the former, the cache the latter; 64 answers by 16 took four times as long."""
    batches, scored = [], []
    real, opinions = sampler.sample, PPOTrainer._opinions
    counted = lambda *a, **w: batches.append(w["batch"]) or real(*a, **w)  # noqa: E731
    monkeypatch.setattr(sampler, "sample", counted)
    monkeypatch.setattr(
        PPOTrainer, "_opinions", lambda self, c: scored.append(len(c)) or opinions(self, c)
    )
    apart = make(local_rollout_forward_batch_size=3).rollout(1)
    assert batches == [8] and scored == [3, 3, 2]
    whole = make().rollout(1)
    assert batches == [8, 8] and scored[3:] == [8]
    assert torch.equal(apart.sequences.ids, whole.sequences.ids)
    for name in ("logprobs", "ref_logprobs", "values", "scores", "entropy"):
        torch.testing.assert_close(getattr(apart, name), getattr(whole, name))


def test_opinions_are_asked_without_padding_and_put_back_in_order(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of like length share a chunk, as in the update, and are read in its own columns."""
    prompts = [{"input_ids": [1, 4, *[7] * n, 5]} for n in (1, 20, 2, 18, 3, 22, 1, 19)]
    trainer = make(
        prompts=prompts, local_rollout_forward_batch_size=2, response_length=20, temperature=2.0
    )
    whole, asked = PPOTrainer._opinions, []
    monkeypatch.setattr(
        PPOTrainer, "_opinions", lambda self, c: asked.append(c.ids.shape) or whole(self, c)
    )
    rollout = trainer.rollout(1)
    sequences = rollout.sequences
    read = sum(rows * columns for rows, columns in asked)
    assert [rows for rows, _ in asked] == [2, 2, 2, 2]
    assert sequences.mask.sum() < read < 0.85 * sequences.ids.numel()
    assert read < sum(sequences[i : i + 2].trimmed().ids.numel() for i in range(0, 8, 2))
    with torch.no_grad():
        expected = whole(trainer, sequences)
    for name, mask in (("logprobs", rollout.mask), ("values", rollout.value_mask)):
        found = getattr(rollout, name)
        torch.testing.assert_close(found * mask, expected[name] * mask)
    torch.testing.assert_close(rollout.scores, expected["scores"])


def test_the_first_mini_batch_is_on_policy(make) -> None:
    """Ratio 1 to rounding, though the update's batches are cut otherwise than the rollout's."""
    trainer = make(num_ppo_epochs=1, num_mini_batches=1, local_rollout_forward_batch_size=3)
    seen: dict[str, float] = {}
    trainer.on_update = lambda _, __, metrics: seen.update(metrics)
    trainer.train()
    assert seen["val/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert seen["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-10)
    assert seen["policy/clipfrac_avg"] == 0.0


def test_the_models_own_sampling_settings_cannot_leak_in(
    tiny_model: Path, tmp_path: Path, make
) -> None:
    """The same rollout, whatever generation_config.json lies beside the weights."""
    bent = tmp_path / "bent"
    lm = load_causal_lm(tiny_model, dtype=torch.float32)
    lm.generation_config = lm.shipped_generation_config
    lm.generation_config.update(repetition_penalty=5.0, min_p=0.3, top_k=2, do_sample=True)
    lm.save_pretrained(bent)
    plain, other = make(), make(make_base(bent))
    assert torch.equal(plain.rollout(1).sequences.ids, other.rollout(1).sequences.ids)
    assert (bent / "generation_config.json").read_text().count("repetition_penalty") == 1


def rollout(trainer: PPOTrainer, answers: list[list[int]], **given: list) -> Rollout:
    """A rollout of given answers to one prompt, with given scores, values and KL."""
    from rlhf_recipes.models.sampling import join

    width = trainer.args.response_length
    rows = join([[1, 5]] * len(answers), answers, 0, torch.device("cpu"), width)
    columns = torch.arange(width)
    zeros = torch.zeros(len(answers), width)
    return Rollout(
        sequences=rows,
        mask=columns < rows.lengths[:, None],
        value_mask=columns < rows.lengths[:, None] + 1,
        logprobs=zeros,
        ref_logprobs=zeros,
        values=torch.tensor(given.get("values", zeros.tolist())),
        scores=torch.tensor(given["scores"]),
        ended=torch.tensor([ids[-1] == 2 for ids in answers]),
        entropy=zeros,
    )


def test_the_score_lands_one_place_after_an_early_eos(make) -> None:
    """As in TRL and the reference implementation: fact 17."""
    trainer = make(response_length=4)
    seen = rollout(trainer, [[7, 2], [7, 8, 9, 2]], scores=[1.0, 3.0])
    returns = advantages(seen, trainer.args).returns
    assert returns.tolist() == [[1.0, 1.0, 1.0, 0.0], [3.0, 3.0, 3.0, 3.0]]


def test_a_truncated_answer_costs_the_penalty(make) -> None:
    free = make(missing_eos_penalty=None, response_length=20).rollout(1)
    fined = make(missing_eos_penalty=2.5, response_length=20).rollout(1)
    assert torch.equal(free.sequences.ids, fined.sequences.ids)
    assert 0 < free.ended.sum() < len(free.ended)
    assert torch.allclose(free.scores - fined.scores, 2.5 * (~free.ended).float())


def test_a_truncated_answer_scores_less_than_its_floor(make) -> None:
    """Whatever the reward model likes about it; an answer that ends keeps its score."""
    free = make(missing_eos_penalty=None, response_length=20).rollout(1)
    floor = free.scores.median().item()
    words = {"floor": floor, "validation_prompts": [row["input_ids"] for row in PROMPTS]}
    trainer = make(missing_eos_penalty=0.5, response_length=20, words=words)
    cut, seen = ~free.ended, trainer.rollout(1)
    assert torch.equal(seen.scores[~cut], free.scores[~cut])
    assert torch.equal(seen.scores[cut], free.scores[cut].clamp(max=floor) - 0.5)
    assert (free.scores[cut] > floor).any() and (seen.scores[cut] <= floor - 0.5).all()
    validated = trainer.explore(words["validation_prompts"], 0)
    assert (~validated.ended).any() and validated.scores[~validated.ended].max() <= floor - 0.5


def test_a_dataset_smaller_than_a_batch_serves(make) -> None:
    """Stock hangs for ever (fact 10)."""
    trainer = make(prompts=PROMPTS[:3], total_episodes=16)
    assert [len(trainer.prompts(u)) for u in (1, 2)] == [8, 8]
    taken = [tuple(ids) for update in (1, 2, 3) for ids in trainer.prompts(update)]
    assert {tuple(p["input_ids"]): taken.count(tuple(p["input_ids"])) for p in PROMPTS[:3]} == {
        tuple(p["input_ids"]): 8 for p in PROMPTS[:3]
    }
    trainer.train()
    assert trainer.state.global_step == 2


def test_an_update_is_a_function_of_seed_and_number(make) -> None:
    """What ran before leaves no trace in what is drawn."""
    first, second = make(), make()
    torch.manual_seed(99)
    torch.rand(7)
    second.rollout(5)
    assert torch.equal(first.rollout(2).sequences.ids, second.rollout(2).sequences.ids)
    assert not torch.equal(first.rollout(1).sequences.ids, first.rollout(2).sequences.ids)


def test_policy_and_value_are_clipped_apart(make) -> None:
    """A value loss × 1000 leaves the policy's update as it was."""
    after = []
    for vf_coef in (0.1, 100.0):
        trainer = make(vf_coef=vf_coef, max_grad_norm=0.5, optim="sgd", learning_rate=1e-2)
        trainer.train()
        after.append([p.detach().clone() for p in trainer.policy_model.trainable()])
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


def test_max_grad_norm_clips(make) -> None:
    moved = []
    for norm in (1e-3, 1e3):
        trainer = make(max_grad_norm=norm, optim="sgd", learning_rate=1.0, num_ppo_epochs=1)
        before = [p.detach().clone() for p in trainer.policy_model.trainable()]
        trainer.train()
        pairs = zip(before, trainer.policy_model.trainable(), strict=True)
        moved.append(sum((a - b).square().sum() for a, b in pairs).sqrt().item())
    assert moved[0] <= 2e-3 * 1.001 and moved[1] > 10 * moved[0]


def test_float16_loses_no_gradient_to_a_small_share(tiny_model: Path, make) -> None:
    """A mini-batch of 32,768 tokens, by its share: unscaled, float16 flushes gradients to 0."""
    found = {}
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 1.0), (torch.float16, LOSS_SCALE)):
        trainer = make(make_base(tiny_model, dtype))
        assert trainer.loss_scale == (LOSS_SCALE if dtype == torch.float16 else 1.0)
        seen = trainer.rollout(1)
        rows = torch.arange(8)
        trainer.loss_scale = scale / 32768 * seen.mask.sum().item()
        trainer._learn(Rows(seen, trainer.learned(seen), rows, rows))
        grads = [p.grad for p in trainer.policy_model.trainable() if p.grad is not None]
        found[dtype, scale] = torch.cat([(grad / trainer.loss_scale).flatten() for grad in grads])
    whole, lossy, scaled = found.values()
    lost = [((one == 0) & (whole != 0)).float().mean().item() for one in (lossy, scaled)]
    near = [torch.cosine_similarity(one, whole, 0).item() for one in (lossy, scaled)]
    assert lost[0] > 1e-3 and lost[1] == 0
    assert 1 - near[1] < 0.2 * (1 - near[0])  # 3.6e-5, 3.8e-4


def test_a_step_that_overflows_in_float16_is_skipped_and_counted(tiny_model: Path, make) -> None:
    trainer = make(make_base(tiny_model, torch.float16))
    before, step, calls = weights(trainer), trainer._step, []

    def overflow() -> None:
        calls.append(1)
        if len(calls) == 1:
            trainer.policy_model.trainable()[0].grad[0] = float("inf")
            step()
            assert all(torch.equal(before[name], now) for name, now in weights(trainer).items())
        else:
            step()

    trainer._step = overflow
    told = trainer.optimize(trainer.rollout(1), 1)
    assert (trainer.skipped, trainer.loss_scale, len(calls)) == (1, LOSS_SCALE / 2, 4)
    assert told["val/skipped_steps"] == 1
    after = weights(trainer)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)
    other = make(make_base(tiny_model, torch.float16))
    trainer.best = None
    other.carry(trainer.carried())
    assert (other.skipped, other.loss_scale) == (1, LOSS_SCALE / 2)


def test_the_value_learns_the_return(make) -> None:
    """On one rollout kept fixed. What is left is two answers to one prompt, told apart too late."""
    words = {"value_learning_rate": 1e-2}
    trainer = make(learning_rate=0.0, lr_scheduler_type="constant", cliprange_value=9, words=words)
    seen = trainer.rollout(1)
    losses = [trainer.optimize(seen, 1)["loss/value_avg"] for _ in range(12)]
    assert losses[-1] < 0.25 * losses[0]


def test_the_explained_variance_is_of_the_rollout_s_values(make) -> None:
    """1 where the values are the returns, 0 where they are the mean, below 0 where they mislead."""
    for values, expected in (([1.0, 3.0], 1.0), ([2.0, 2.0], 0.0), ([3.0, 1.0], -3.0)):
        trainer = make(response_length=2, kl_coef=0.0)
        words = {"scores": [1.0, 3.0], "values": [[value] * 2 for value in values]}
        seen = rollout(trainer, [[7, 2], [8, 2]], **words)
        returns = advantages(seen, trainer.args).returns
        assert explained_variance(seen, returns) == pytest.approx(expected, abs=1e-6)
    trainer = make()
    seen = trainer.rollout(1)
    returns = advantages(seen, trainer.args).returns
    said = trainer.optimize(seen, 1)["val/explained_variance"]
    assert said == explained_variance(seen, returns) and said < 1  # before the update


def test_checkpointing_is_on_in_the_update_and_off_in_the_rollout(make) -> None:
    """The same weights as without, and no layer left checkpointing."""
    after = []
    for checkpointing in (False, True):
        trainer = make(gradient_checkpointing=checkpointing)
        trainer.train()
        assert not any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules())
        after.append(weights(trainer))
    assert all(torch.allclose(after[0][k], after[1][k], atol=1e-6) for k in after[0])


def test_a_reward_that_is_not_a_number_stops_with_a_line(make) -> None:
    trainer = make()
    trainer.reward_model.score.weight.data.fill_(float("nan"))
    with pytest.raises(StageError, match="^objective/scores is nan at update 1 .lower learning_r"):
        trainer.train()


def test_weights_that_are_lost_end_the_stage_with_the_best_that_was_kept(make) -> None:
    """A NaN in the policy after two updates; its start, or an earlier policy, is what remains."""
    words = {"keep": "best", "validation_prompts": [p["input_ids"] for p in PROMPTS]}
    when = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make(total_episodes=48, words=words, **when)
    explore = trainer.explore

    def lose(prompts: list, seed: int) -> Rollout:
        seen = explore(prompts, seed)
        if trainer.state.global_step == 2:
            seen.scores.fill_(float("nan"))
        return seen

    trainer.explore = lose
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.stopped == "objective/scores is nan"
    assert all(torch.isfinite(p).all() for p in trainer.policy_model.trainable())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"objective/kl": 26.0}, "KL 26.00 is over max_kl = 25"),
        ({"val/entropy_per_token": 0.2}, "entropy fell from 3.00 to 0.20 nats a token"),
        ({"val/length": 1.5}, "length fell from 10.0 to 1.5 tokens"),
        ({"loss/value_avg": float("inf")}, "loss/value_avg is inf"),
        ({}, None),
    ],
)
def test_a_guard_says_why(change: dict[str, float], why: str | None) -> None:
    good = {
        "objective/scores": 1.0,
        "objective/kl": 2.0,
        "val/entropy_per_token": 3.0,
        "val/length": 10.0,
        "loss/policy_avg": 0.1,
        "loss/value_avg": 0.1,
    }
    guard = Guard(Limits())
    assert [guard.why_stop(good) for _ in range(4)] == [None] * 4
    assert guard.why_stop({**good, **change}) == why


def test_a_falling_score_is_seen_over_three_updates() -> None:
    rest = dict.fromkeys(("objective/kl", "loss/policy_avg", "loss/value_avg"), 0.0)
    rest |= {"val/entropy_per_token": 3.0, "val/length": 9.0}
    guard = Guard(Limits(max_score_drop=1.0))
    said = [guard.why_stop({**rest, "objective/scores": s}) for s in (2, 2, 2, -0.5, 2, 2, 0, -1)]
    assert said == [None] * 7 + ["score fell from 2.00 to 0.33"]


def test_a_guard_ends_the_stage_in_order(make) -> None:
    words = {"limits": Limits(max_kl=0.05)}
    trainer = make(total_episodes=80, learning_rate=3e-2, words=words)
    trainer.train()
    assert 1 < trainer.state.global_step < 10
    assert trainer.stopped.endswith("is over max_kl = 0.05")


@pytest.mark.parametrize(("keep", "update"), [("best", 2), ("last", 6)])
def test_the_policy_kept_is_the_best_on_validation_or_the_last(
    make, keep: str, update: int
) -> None:
    """Validation scores given for updates 0 to 6: it ends as it was after `update`."""
    given = [0.0, 1.0, 3.0, 2.0, 3.0, 9.0, -1.0]  # the 9 is beyond max_kl
    words = {"keep": keep, "validation_prompts": [[1, 4, 7, 5]], "limits": Limits(max_kl=2.0)}
    when = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make(total_episodes=48, kl_coef=0.0, words=words, **when)
    explore = trainer.explore
    after: list[list[torch.Tensor]] = []

    def scored(prompts: list, seed: int) -> Rollout:
        seen = explore(prompts, seed)
        if prompts is trainer.validation_prompts:
            after.append([p.detach().clone() for p in trainer.policy_model.trainable()])
            seen.scores.fill_(given[len(after) - 1])
            seen.ref_logprobs.copy_(seen.logprobs - (5.0 if len(after) == 6 else 0.1))
        return seen

    trainer.explore = scored
    trainer.train()
    assert len(after) == 7
    kept = zip(trainer.policy_model.trainable(), after[update], strict=True)
    assert all(torch.equal(a, b) for a, b in kept)
    assert trainer.best.update == 2


def test_what_is_kept_is_the_best_by_ppo_s_own_objective(make) -> None:
    """A score of 3 at 8 nats is worth less than one of 2 at 1 nat where a nat costs 0.5."""
    words = {"keep": "best", "validation_prompts": [[1, 4, 7, 5]]}
    trainer = make(kl_coef=0.5, eval_strategy="steps", eval_steps=1, words=words)
    explore, given = trainer.explore, [(0.0, 0.0), (2.0, 1.0), (3.0, 8.0)]

    def scored(prompts: list, seed: int) -> Rollout:
        seen = explore(prompts, seed)
        seen.scores.fill_(given[update][0])
        each = given[update][1] / seen.mask.sum(1, keepdim=True)
        seen.ref_logprobs.copy_(seen.logprobs - each)
        return seen

    trainer.explore = scored
    for update in (0, 1, 2):
        told = trainer.validate(update)
    assert told == pytest.approx({"eval/score": 3.0, "eval/kl": 8.0, "eval/objective": -1.0})
    assert (trainer.best.update, trainer.best.score) == (1, 2.0)
    assert trainer.best.objective == pytest.approx(1.5)


def test_validating_changes_no_weight(make) -> None:
    after = []
    for prompts in ([], [[1, 4, 7, 5]] * 3):
        trainer = make(
            total_episodes=32,
            eval_strategy="steps",
            eval_steps=1,
            words={"validation_prompts": prompts},
        )
        trainer.train()
        after.append(weights(trainer))
    assert all(torch.equal(after[0][k], after[1][k]) for k in after[0])


def test_value_warmup_trains_the_value_alone_once(make) -> None:
    """Two extra epochs on the first update's rollout, and the policy as without them."""
    steps, policies = [], []
    for epochs in (0, 2):
        words = {"value_warmup_epochs": epochs}
        trainer = make(total_episodes=16, optim="sgd", words=words)
        count: list[int] = []
        trainer.optimizer.register_step_post_hook(lambda *_, seen=count: seen.append(1))
        trainer.optimize(trainer.rollout(1), 1)
        policies.append([p.detach().clone() for p in trainer.policy_model.trainable()])
        trainer.optimize(trainer.rollout(2), 2)
        steps.append(len(count))
    assert steps == [2 * 4, 2 * 4 + 2 * 2]
    assert all(torch.equal(a, b) for a, b in zip(*policies, strict=True))


def test_a_warmup_is_not_held_near_the_first_values(make) -> None:
    """Clipped to ±0.2 of the rollout's, values cannot learn returns that are 5 away."""
    words = {"value_warmup_epochs": 30, "value_learning_rate": 1e-1}
    trainer = make(learning_rate=0.0, lr_scheduler_type="constant", words=words)
    seen = trainer.rollout(1)
    seen.scores.add_(5.0)
    trainer.optimize(seen, 1)
    moved = (trainer.rollout(1).values - seen.values)[seen.value_mask]
    assert moved.mean() > 2


@pytest.mark.parametrize("every", [1, 3])
def test_logging_steps_says_how_often(make, every: int) -> None:
    trainer = make(total_episodes=8 * 7, logging_steps=every)
    trainer.train()
    assert len(trainer.state.log_history) == {1: 7, 3: 3}[every]


def test_answers_of_one_token_and_answers_that_never_end(make) -> None:
    """Both are learned from: no empty mask, no division by nothing."""
    seen: list[dict] = []
    for length in (1, 5):
        trainer = make(response_length=length, total_episodes=16)
        trainer.on_update = lambda _, r, metrics: seen.append(metrics)
        trainer.train()
    assert all(m == m for metrics in seen for m in metrics.values())
    assert seen[0]["val/length"] == 1.0
    assert min(metrics["val/num_eos_tokens"] for metrics in seen) == 0


def test_a_merged_copy_samples_and_is_let_go_of_where_it_is_far(make) -> None:
    """The same answers, learned from the same readings; a checkpoint keeps which it was."""
    plain, merged = (make(save_strategy="no", words={"merged": one}) for one in (None, True))
    assert merged.sampler.told == "from a merged copy" and plain.sampler.copy is None
    ends = []
    for trainer in (plain, merged):
        trainer.train()
        assert 0 <= trainer.metrics["val/sampler_apart"] < 1e-4
        ends.append([weight.detach().clone() for weight in trainer.policy_model.trainable()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)
    plain.carry(merged.carried())
    assert plain.sampler.copy is not None
    whole = plain.rollout(1)
    with torch.no_grad():
        plain.sampler.copy.refresh = lambda: None
        for _, linear in plain.sampler.copy.layers:
            linear.weight += torch.randn_like(linear.weight)
    again = plain.rollout(1)
    assert plain.sampler.copy is None and again.apart < 1e-4
    assert torch.equal(again.sequences.ids, whole.sequences.ids)
