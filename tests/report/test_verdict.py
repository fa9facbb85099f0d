"""Each rule of the verdict: what it says, with which numbers, and of which stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.findings import Finding
from rlhf_recipes.report import charts
from rlhf_recipes.report.facts import Facts
from rlhf_recipes.report.verdict import verdict
from tests.helpers.told import GOOD, shares, told


def found(folder: Path, changes: dict[str, Any] | None = None, **words: Any) -> list[Finding]:
    return verdict(Facts(told(folder, changes, **words)))


def said(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(one.level, one.about) for one in findings]


def test_a_run_in_which_all_went_well(tmp_path: Path) -> None:
    findings = found(tmp_path)
    assert [one.text for one in findings] == [
        "PPO beat SFT on 71 % of 128 prompts (63–79) by a second reward model on the same base, at "
        "6.2 nats: it may err where the reward model errs, so this is not yet a success.",
        "SFT's validation loss went from 4.724 to 3.673.",
        "The reward model ranks 90 % of 200 test pairs right (86–94), length alone 56 %.",
        "PPO beat SFT on 90 % of 128 prompts (85–95) by the reward model that it was trained "
        "against, at 6.2 nats.",
        "The independent judge ranks 80 % of 200 test pairs right (75–85), length alone 56 %.",
    ]
    assert said(findings) == [
        ("good", "ppo"), ("good", "sft"), ("good", "reward"), ("good", "ppo"), ("good", "judge")
    ]  # fmt: skip
    assert [one.change for one in findings if one.change] == [
        "Name another base in `evaluation.judge_model`, or a rule in `judge`; or ask people."
    ]


OTHERS = {"python:/home/me/oracle.py:score": "the rule `oracle.py:score`"}
OTHERS |= dict.fromkeys(("a/judge", "./judge"), "a judge it was not trained against")


@pytest.mark.parametrize("judge", OTHERS)
def test_success_takes_a_judge_of_another_make(tmp_path: Path, judge: str) -> None:
    (first, *_) = findings = found(tmp_path / "alone", recipe={"evaluation": {"judge": judge}})
    assert (first.level, first.about) == ("success", "ppo")
    assert (
        first.text
        == f"PPO beat SFT on 71 % of 128 prompts (63–79) by {OTHERS[judge]}, at 6.2 nats."
    )
    assert not any(one.change for one in findings)
    both = found(
        tmp_path / "both",
        shares("ppo.judge2_win_rate", 0.5, 0.02),
        recipe={"evaluation": {"judge": ["independent", judge]}},
    )
    assert "success" not in [one.level for one in both]
    assert not any("not yet a success" in one.text for one in both)


def test_a_rule_that_most_answers_satisfy_already_is_no_evidence(tmp_path: Path) -> None:
    changes = shares("ppo.judge_win_rate", 0.5, 0.02)
    recipe = {"evaluation": {"judge": "python:rule.py:score"}}
    levels = {}
    for same, both in ((30, 1), (8, 1), (32, 0)):
        scores = [(both, both)] * same + [(1, 0), (0, 1)] * ((40 - same) // 2)
        rows = [{"judged": {"sft": a, "ppo": b}, "prompt": "?"} for a, b in scores]
        outputs = {"evaluation": {"answers.jsonl": "\n".join(map(json.dumps, rows))}}
        findings = found(tmp_path / str(same), changes, recipe=recipe, outputs=outputs)
        levels[same] = [(one.level, one.text) for one in findings]
    text = "The rule `rule.py:score` gave both answers its best score on 30 of 40 prompts: "
    assert ("doubt", f"{text}it cannot say that PPO's are better than SFT's.") in levels[30]
    assert not any("learned to please" in text for _, text in levels[30])
    for same in (8, 32):
        assert any(one == "fault" and "learned to please" in text for one, text in levels[same])


def test_a_policy_that_vllm_sampled_is_said_to_come_out_otherwise_again(tmp_path: Path) -> None:
    [one] = [one for one in found(tmp_path, {"ppo.sampler_apart": 0.00412}) if "vLLM" in one.text]
    assert (one.level, one.about) == ("note", "ppo")
    assert one.text == (
        "PPO learned from answers by vLLM, whose log-probabilities were 0.004 a token from the "
        "trainer's. If it is resumed or repeated, its weights differ."
    )


def test_how_far_a_judge_follows_the_reward_model_is_said(tmp_path: Path) -> None:
    """Within a prompt: what one prompt's answers score above another's counts for nothing."""
    rows = [
        {
            "scores": {"base": n, "sft": n + 1, "ppo": n + 2},
            "judged": {"base": 0, "sft": 2, "ppo": 1},
        }
        for n in (0, 50, 10)
    ]
    rows.append({"scores": {"base": 1.0, "sft": None}, "judged": {"base": 1.0, "sft": 2.0}})
    answers = "".join(json.dumps(row) + "\n" for row in rows)
    findings = found(tmp_path, outputs={"evaluation": {"answers.jsonl": answers}})
    (one,) = [one for one in findings if "correlate" in one.text]
    assert (one.level, one.about) == ("note", "evaluation")
    assert one.text == (
        "Among a prompt's answers, the scores of the reward model and of a second reward model on "
        "the same base correlate by 0.50 (3 prompts)."
    )


def test_a_reward_model_of_labels_says_what_it_was_measured_on(tmp_path: Path) -> None:
    labels = {"reward.test_good": 120, "reward.test_bad": 90, "reward.test_pairs": 90}
    labels |= {"reward.good": 400, "reward.bad": 1200, "reward.pairs": 0}
    facts = Facts(told(tmp_path, labels))
    texts = [one.text for one in verdict(facts)]
    said = "The reward model ranks 90 % of 120 good against 90 bad test answers right"
    assert any(text.startswith(said) for text in texts)
    assert facts.learned_from("reward") == "1,600 labels"


# What is wrong; the level, the stage and a part of the sentence; a part of what to change.
CASES: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    "SFT learned nothing": (
        {"sft.validation_loss": 4.719}, "fault", "sft",
        "SFT's validation loss went from 4.724 to 4.719: it learned next to nothing.",
        "`sft.learning_rate` (0.0003 now)",
    ),
    "SFT made it worse": (
        {"sft.validation_loss": 5.1}, "fault", "sft",
        "went from 4.724 to 5.100: it made the model worse.", "`sft.num_train_epochs` (2 now)",
    ),
    "untrained reward model": (
        shares("reward.accuracy", 0.51, 0.07), "fault", "reward",
        "The reward model ranks 51 % of 200 test pairs right (44–58): that is chance.",
        "Raise `reward.learning_rate` (0.0001 now)",
    ),
    "worse than chance": (
        shares("reward.accuracy", 0.31, 0.06) | {"reward.shorter_accuracy": 0.3}, "fault", "reward",
        "ranks 31 % of 200 test pairs right (25–37): worse than chance.",
        "`chosen` and `rejected` changed places",
    ),
    "a test set too small to tell": (
        shares("reward.accuracy", 0.6, 0.2) | {"reward.test_pairs": 18, "reward.shorter_pairs": 5},
        "doubt", "reward",
        "ranks 60 % of 18 test pairs right (38–80): too few pairs to tell it from chance.",
        "`dataset.test_fraction` (0.1 now)",
    ),
    "reward that follows length": (
        shares("reward.accuracy", 0.75, 0.05)
        | {"reward.length_accuracy": 0.74, "reward.shorter_accuracy": 0.12,
           "reward.shorter_pairs": 50},
        "fault", "reward",
        "ranks 75 % of 200 test pairs right (70–80), and length alone 74 %; where the shorter "
        "answer was preferred, 12 % of 50 pairs (6–24): it learned length. Look there first.",
        "pairs of like length",
    ),
    "reward that follows shortness": (
        shares("reward.accuracy", 0.75, 0.05)
        | {"reward.length_accuracy": 0.75, "reward.shorter_accuracy": 0.95,
           "reward.shorter_pairs": 150},
        "fault", "reward", "where the longer answer was preferred, 15 % of 50 pairs", "",
    ),
    "the judge is none": (
        shares("judge.accuracy", 0.51, 0.07), "doubt", "judge",
        "The independent judge ranks 51 % of 200 test pairs right (44–58): that is chance. It is "
        "no judge.", "`reward.learning_rate`",
    ),
    "the gate was lowered": (
        shares("reward.accuracy", 0.53, 0.02)
        | {"ppo.minimum_accuracy": 0.5}, "doubt", "ppo",
        "The gate before PPO was lowered to 0.5, from 0.55: its reward model ranks 53 % of test",
        "",
    ),
    "KL blow-up": (
        {"ppo.kl": 61.3}, "fault", "ppo", "PPO went 61.3 nats an answer away from SFT, over 15:",
        "Raise `ppo.kl_coef` (0.15 now) or lower `ppo.learning_rate` (0.0001 now).",
    ),
    "stopped by its KL": (
        {"ppo.stopped": "KL 11.20 is over max_kl = 10", "ppo.updates": 31}, "doubt", "ppo",
        "PPO's guard stopped it after update 31: KL 11.20 is over max_kl = 10. The policy of "
        "update 24 was kept.", "`ppo.kl_coef`",
    ),
    "stopped by another guard": (
        {"ppo.stopped": "loss/value_avg is nan"}, "fault", "ppo", "loss/value_avg is nan", "",
    ),
    "collapse to one answer": (
        {"ppo.distinct_2": 0.03}, "fault", "ppo",
        "PPO's answers became alike: of their word pairs 3 % are said for the first time, of "
        "SFT's 62 %", "`ppo.kl_coef`",
    ),
    "collapse into repetition": (
        {"ppo.repetition": 0.6}, "fault", "ppo",
        "60 % of an answer's 3-grams were said in it before, 1 % of SFT's", "",
    ),
    "collapse into nothing": (
        {"sft.length": 3.0, "ppo.length": 1.2}, "fault", "ppo",
        "PPO's answers shrank to 1.2 tokens, from SFT's 3.0",
        "",
    ),
    "answers that never end": (
        {"ppo.ended": 0.03}, "fault", "ppo",
        "Only 3 % of PPO's answers end within their tokens, 96 % of SFT's: most are cut off.",
        "`ppo.missing_eos_penalty` (1 now), or `ppo.response_length` (48 now)",
    ),
    "a unit that is mostly noise": (
        {"reward.margin": 0.62}, "doubt", "reward",
        "The chosen answer of a test pair leads by 0.62 of `reward`'s units, under 1: its scores "
        "spread more than", "Raise `ppo.kl_coef` (0.15 now)",
    ),
    "SFT's answers never end": (
        {"sft.ended": 0.1, "ppo.ended": 0.1}, "fault", "sft",
        "Only 10 % of SFT's answers end within their tokens: most are cut off.",
        "`ppo.response_length` (48 now)",
    ),
    "fewer answers end": (
        {"ppo.ended": 0.78}, "doubt", "ppo", "78 % of PPO's answers end within their tokens, 96 %",
        "",
    ),
    "PPO has not moved": (
        shares("ppo.win_rate", 0.5, 0.08) | {"ppo.kl": 0.12}, "doubt", "ppo",
        "PPO has hardly moved: its KL is 0.12 nats, under 0.5.", "Raise `ppo.learning_rate`",
    ),
    "PPO made it worse": (
        shares("ppo.win_rate", 0.3, 0.08), "fault", "ppo", "training made it worse", "",
    ),
    "a policy that fooled its reward model": (
        shares("ppo.judge_win_rate", 0.38, 0.08), "fault", "reward",
        "PPO beat SFT on 90 % of 128 prompts by its reward model, and on 38 % (30–46) by a "
        "second reward model on the same base: it learned to please its reward model",
        "`ppo.kl_coef`",
    ),
    "too few prompts": (
        shares("ppo.judge_win_rate", 0.6, 0.15) | {"evaluation.prompts": 40}, "doubt", "evaluation",
        "PPO wins against SFT on 60 % of 40 prompts (45–75) by a second reward model on "
        "the same base: too few prompts to tell.", "`dataset.test_fraction` (0.1 now)",
    ),
    "too few prompts were asked for": (
        shares("ppo.judge_win_rate", 0.56, 0.08), "doubt", "evaluation",
        "too few prompts to tell.", "`evaluation.prompts` (128 now)",
    ),
    "a judge sees that it became worse, and the reward model nothing": (
        shares("ppo.win_rate", 0.56, 0.08) | shares("ppo.judge_win_rate", 0.3, 0.08), "fault",
        "ppo", "PPO wins against SFT on 30 % of 128 prompts (22–38) by a second reward model "
        "on the same base: it became worse.", "`ppo.kl_coef`",
    ),
    "a reward model that tells no more than length": (
        {"reward.length_accuracy": 0.92}, "doubt", "reward",
        "ranks 90 % of 200 test pairs right (86–94), length alone 92 %: it tells no more than",
        "pairs of like length",
    ),
    "no update beat its start": (
        shares("ppo.win_rate", 0.5, 0.02) | {"ppo.kept_update": 0, "ppo.kl": 0.0}, "fault", "ppo",
        "50 % of 128 prompts (48–52) by the reward model: no update beat its start on the "
        "validation prompts", "lower `ppo.learning_rate`",
    ),
    "nobody but the reward model judged": (
        {f"ppo.judge_win_rate{end}": None for end in ("", "_low", "_high")}, "doubt", "ppo",
        "PPO beat SFT on 90 % of 128 prompts (85–95) by the reward model that it was trained "
        "against, at 6.2 nats.", "with `dataset.judge_fraction` over 0",
    ),
    "only a blind judge judged": (
        shares("judge.accuracy", 0.51, 0.07), "doubt", "ppo",
        "PPO beat SFT on 90 % of 128 prompts (85–95) by the reward model", "No other judge",
    ),
    "only a judge of length judged": (
        {"judge.length_accuracy": 0.85}, "doubt", "ppo",
        "PPO beat SFT on 90 % of 128 prompts (85–95) by the reward model", "No other judge",
    ),
    "a gain by length alone": (
        {"ppo.judge_win_rate_like_length": 0.4}, "doubt", "ppo",
        "Among answers of like length, PPO wins against SFT on 40 % of 40 prompts (26–55) by the "
        "judge: its gain is in their length.", "side by side",
    ),
    "a gain over answers that were cut off": (
        {"ppo.judge_win_rate_ended": 0.45}, "doubt", "ppo",
        "Among answers that both ended, PPO wins against SFT on 45 % of 118 prompts", "",
    ),
    "worse than the base": (
        shares("ppo.judge_win_rate_over_base", 0.3, 0.08), "doubt", "ppo",
        "PPO wins against the base model on 30 % of 128 prompts (22–38) by a second reward model "
        "on the same base: it became worse.", "demonstrations",
    ),
    "a lowered gate that had no test pairs": (
        {key: None for key in GOOD if key.startswith("reward.")} | {"ppo.minimum_accuracy": 0},
        "doubt", "ppo", "from 0.55: its reward model was held against no test pairs.", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_said_of_its_stage_and_with_its_numbers(tmp_path: Path, name: str) -> None:
    changes, level, stage, text, change = CASES[name]
    fitting = [one for one in found(tmp_path, changes) if text in one.text]
    assert said(fitting) == [(level, stage)], fitting
    assert change in fitting[0].change


def test_one_answer_to_all_is_a_collapse_whatever_the_numbers_say(tmp_path: Path) -> None:
    for same, level in ((0, "good"), (6, "fault")):
        rows = [
            {"answers": {"sft": f"{n}", "ppo": "No." if n < same else f"{n}"}} for n in range(8)
        ]
        answers = "".join(json.dumps(row) + "\n" for row in rows)
        outputs = {"evaluation": {"answers.jsonl": answers}}
        first = found(tmp_path / level, outputs=outputs)[0]
        assert first.level == level
    assert first.text == "PPO gives 75 % of the prompts one answer: “No.”."


def test_a_bootstrap_of_few_prompts_is_not_believed(tmp_path: Path) -> None:
    changes = shares("ppo.judge_win_rate", 0.81, 0.2) | {"evaluation.prompts": 8}
    texts = [one.text for one in found(tmp_path, changes) if one.level == "doubt"]
    assert (
        "PPO wins against SFT on 81 % of 8 prompts (46–101) by a second reward model on" in texts[0]
    )


def test_the_first_stage_at_fault_comes_first(tmp_path: Path) -> None:
    changes = shares("reward.accuracy", 0.5, 0.05) | {"sft.validation_loss": 4.72, "ppo.kl": 70.0}
    assert said(found(tmp_path, changes))[:3] == [
        ("fault", "sft"), ("fault", "reward"), ("fault", "ppo")
    ]  # fmt: skip


def test_what_is_no_fault_is_not_called_one(tmp_path: Path) -> None:
    """A KL near what its guard allows; a judge that sees less than the reward model, perhaps."""
    little = shares("ppo.judge_win_rate", 0.54, 0.07) | shares("ppo.win_rate", 0.65, 0.08)
    for name, changes in {"near": {"ppo.kl": 10.2}, "less": little}.items():
        assert not [one for one in found(tmp_path / name, changes) if one.level == "fault"]


def test_the_last_policy_is_held_against_the_base(tmp_path: Path) -> None:
    for name, share, level, end in [
        ("won", 0.9, "good", "by a second reward model on the same base."),
        ("open", 0.5, "note", "by a second reward model on the same base: no difference to tell."),
    ]:
        changes = shares("ppo.judge_win_rate_over_base", share, 0.08)
        (one,) = [f for f in found(tmp_path / name, changes) if "the base model" in f.text]
        assert (one.level, one.text[-len(end) :]) == (level, end)
    changes = shares("sft.judge_win_rate", 0.3, 0.08)
    kinds = ["sft", "judge", "evaluation"]
    findings = found(tmp_path / "alone", changes, kinds=kinds)
    assert any("SFT wins against the base model on 30 %" in f.text for f in findings)


def test_a_written_rule_is_named_and_a_second_judge_counts(tmp_path: Path) -> None:
    judges = ["python:/home/me/oracle.py:score", "independent"]
    second = shares("ppo.judge2_win_rate", 0.66, 0.08)
    findings = found(tmp_path, second, recipe={"evaluation": {"judge": judges}})
    assert [(one.level, one.text) for one in findings if "nats" in one.text][::2] == [
        ("success", "PPO beat SFT on 71 % of 128 prompts (63–79) by the rule `oracle.py:score`, at "
         "6.2 nats."),
        ("good", "PPO beat SFT on 66 % of 128 prompts (58–74) by a second reward model on the same "
         "base, at 6.2 nats."),
    ]  # fmt: skip


# ---- a list of rewards

LISTED = ["reward", {"rule": "words", "at_most": 9, "weight": 0.5}, {"rule": "ended", "weight": -1}]


def paid(name: str, then: float, now: float, half: float = 0.1) -> dict[str, float]:
    scores = {f"sft.reward.{name}_score": then, f"ppo.reward.{name}_score": now}
    return scores | shares(f"ppo.reward.{name}_gain", now - then, half)


def test_the_verdict_says_which_reward_paid(tmp_path: Path) -> None:
    changes = paid("reward", 0.1, 0.9) | paid("words", 0.8, 0.4, 0.5) | paid("ended", 1.0, 0.75)
    findings = found(tmp_path, changes, recipe={"ppo": {"reward_model": "", "rewards": LISTED}})
    [note] = [one for one in findings if "by each reward" in one.text]
    assert (note.level, note.about) == ("note", "ppo")
    assert note.text == (
        "SFT → PPO, by each reward on the test prompts: `reward` 0.10 → 0.90 (pays +0.80, 0.70 to "
        "0.90), `words` 0.80 → 0.40 (pays −0.20, −0.45 to 0.05), `ended` 1.00 → 0.75 (pays +0.25, "
        "0.15 to 0.35)."
    )
    [won] = [one for one in findings if "beat SFT on 90 %" in one.text]
    assert "by the rewards that it was trained against" in won.text


def test_a_reward_that_falls_as_the_sum_rises_is_a_doubt(tmp_path: Path) -> None:
    changes = paid("reward", 0.1, 0.9) | paid("words", 0.8, 0.4)
    findings = found(tmp_path, changes, recipe={"ppo": {"rewards": LISTED}})
    [doubt] = [one for one in findings if "by each reward" in one.text]
    assert doubt.level == "doubt" and doubt.text.endswith(" The sum rose, and `words` fell.")
    assert doubt.change.startswith("Read some answers. Raise the weight of `words`")


def test_rules_alone_need_no_other_judge_to_be_good(tmp_path: Path) -> None:
    rules = {"reward_model": "", "rewards": [{"rule": "ended"}]}
    none = dict.fromkeys(("ppo.judge_win_rate", "ppo.minimum_accuracy"))
    words = {"recipe": {"ppo": rules, "evaluation": {"judge": "none"}}}
    [won] = [one for one in found(tmp_path, none, **words) if "beat SFT on 90 %" in one.text]
    assert won.level == "good" and "by the rewards that it was trained against" in won.text
    judge = {"evaluation": {"judge": {"rule": "number", "column": "answer"}}, "ppo": rules}
    findings = found(tmp_path / "judged", None, recipe=judge)
    assert "by the rule `number`, at 6.2 nats." in findings[0].text
    assert findings[0].level == "success"
    judge["evaluation"] = {"judge": {"rule": "ended"}}
    [same] = [one for one in found(tmp_path / "same", None, recipe=judge) if "71 %" in one.text]
    assert same.level == "good" and "the rule `ended` that it was trained on" in same.text


def test_a_reward_model_that_knows_its_training_pairs_by_heart(tmp_path: Path) -> None:
    for accuracy, words, change in [
        (0.99, "Of its training pairs it ranked 99 % right: by heart.", "fewer `reward.num_train"),
        (0.52, "Nor did it learn its training pairs (52 % right).", "Raise `reward.learning_rate`"),
    ]:
        folder = tmp_path / words[:3]
        curves = {"reward": [{"step": n, "loss": 0.6, "accuracy": accuracy} for n in (1, 2)]}
        (one,) = [
            one
            for one in found(folder, shares("reward.accuracy", 0.5, 0.05), curves=curves)
            if one.level == "fault"
        ]
        assert words in one.text and change in one.change


def test_a_value_model_that_never_foresaw_anything(tmp_path: Path) -> None:
    for best, said_so in ((-0.1, 1), (0.1, 0)):
        rows = [{"step": n, "val/explained_variance": -0.3} for n in (1, 2)]
        curves = {"ppo": [*rows, {"step": 3, "val/explained_variance": best}]}
        recipe = {"ppo": {"value_warmup_epochs": 0, "value_learning_rate": 1e-4}}
        findings = found(tmp_path / str(said_so), curves=curves, recipe=recipe)
        assert len([f for f in findings if "value model" in f.text]) == said_so
        if said_so:
            (one,) = [f for f in findings if "value model" in f.text]
            assert (one.level, one.about) == ("doubt", "ppo")
            assert one.text.startswith(
                "PPO's value model never foresaw the returns better than their mean: its explained "
                "variance is −0.10 at most, in 3 updates."
            )
            assert "Raise `ppo.value_warmup_epochs` (0 now)" in one.change


def test_a_kl_says_at_which_temperature_it_is(tmp_path: Path) -> None:
    cool, plain = ({"ppo": {"temperature": heat}} for heat in (0.5, 1.0))
    said = "KL is that of the policies at temperature 0.5, as they are sampled."
    facts = Facts(told(tmp_path / "cool", recipe=cool))
    assert facts.tempered("ppo") == facts.tempered("evaluation") == said
    assert Facts(told(tmp_path / "plain", recipe=plain)).tempered("evaluation") == ""


def test_the_price_of_a_gain_is_held_against_the_best_of_n(tmp_path: Path) -> None:
    outputs = {"best_of": {"best_of.json": '{"format": 1, "policy": "sft", "against": "ppo"}'}}
    last = found(tmp_path, outputs=outputs)[-1]
    assert (last.level, last.text) == (
        "note",
        "By the judge, PPO gained 85 % (56–114) of what taking the best of 16 of SFT's answers "
        "does, at 3.4 times its KL.",
    )


def test_little_of_what_the_best_of_many_gains_is_a_doubt(tmp_path: Path) -> None:
    outputs = {"best_of": {"best_of.json": '{"format": 1, "policy": "sft", "against": "ppo"}'}}
    for gain, share, level in [
        (-0.2, "nothing", "doubt"),
        (0.1, "25 % (0–51)", "doubt"),
        (0.3, "75 % (44–106)", "note"),
    ]:
        findings = found(tmp_path / share, shares("ppo.judge_gain", gain, 0.1), outputs=outputs)
        (one,) = [f for f in findings if "the best of 16" in f.text]
        assert one.level == level
        assert one.text.startswith(
            f"By the judge, PPO gained {share} of what taking the best of 16"
        )


def test_dpo_is_judged_too_and_told_of_its_own_keys(tmp_path: Path) -> None:
    dpo = {"dpo": {"kind": "dpo", "beta": 0.1, "learning_rate": 1e-5, "policy": "sft"}}
    none = {key: None for key in GOOD if key.startswith(("ppo.", "reward."))}
    for rate, value, text, change in [
        ("judge_win_rate", 0.3, "by a judge it was not trained against: it be", "Raise `dpo.beta`"),
        ("win_rate", 0.5, "by the reward model: it gained nothing", "lower `dpo.beta`"),
    ]:
        changes = none | shares(f"dpo.{rate}", value, 0.08)
        kinds = ["sft", "dpo", "evaluation"]
        first = found(tmp_path / rate, changes, kinds=kinds, recipe=dpo)[0]
        assert (first.level, first.about) == ("fault", "dpo")
        assert text in first.text and change in first.change


HARDLY: dict[str, tuple[str, dict[str, float], str]] = {
    kind: (spec, {"unchanged": 0.82, "kl": kl}, word)
    for (kind, spec), kl, word in zip(
        [("dpo", "independent"), ("kto", "a/judge"), ("rloo", "python:/a/oracle.py:score")],
        [0.01, 1.2, 0.49],
        ["learning_rate` (1e-05 now)"] * 3,
        strict=True,
    )
} | {"grpo": ("none", {"unchanged": 0.1, "kl": 0.4}, "learning_rate` (1e-05 now)")}


@pytest.mark.parametrize("kind", HARDLY)
def test_a_policy_that_hardly_moved_did_not_work_whoever_judges(tmp_path: Path, kind: str) -> None:
    judge, moved, change = HARDLY[kind]
    changes = {key: None for key in GOOD if key.startswith(("ppo.", "reward.", "best_of."))}
    changes |= shares(f"{kind}.judge_win_rate", 0.7, 0.05)
    changes |= shares(f"{kind}.win_rate", 0.9, 0.05) if judge == "none" else {}
    changes |= {f"{kind}.{key}": value for key, value in moved.items()}
    recipe = {kind: {"kind": kind, "learning_rate": 1e-5, "policy": "sft"}}
    recipe |= {"evaluation": {"judge": judge}}
    findings = found(tmp_path, changes, kinds=["sft", kind, "evaluation"], recipe=recipe)
    assert (findings[0].level, findings[0].about) == ("doubt", kind)
    assert findings[0].text.startswith(f"{kind.upper()} has hardly moved: ")
    assert f"Raise `{kind}.{change}" in findings[0].change
    assert not any(one.level == "success" or "beat SFT" in one.text for one in findings)


def test_a_start_that_was_kept_is_said_as_such(tmp_path: Path) -> None:
    changes = shares("ppo.win_rate", 0.5, 0.02) | {"ppo.kept_update": 0, "ppo.kl": 0.0}
    findings = found(tmp_path, changes | {"ppo.unchanged": 1.0})
    assert [one.text for one in findings if "hardly moved" in one.text] == []
    assert "no update beat its start" in findings[0].text


def test_a_judge_alone_that_sees_no_gain_is_said(tmp_path: Path) -> None:
    changes = {key: None for key in GOOD if key.startswith(("ppo.", "reward."))}
    changes |= shares("dpo.judge_win_rate", 0.51, 0.05) | {"dpo.kl": 3.0}
    recipe = {"dpo": {"kind": "dpo", "beta": 0.1, "learning_rate": 1e-5, "policy": "sft"}}
    recipe |= {"evaluation": {"judge": "independent"}}
    first = found(tmp_path, changes, kinds=["sft", "dpo", "evaluation"], recipe=recipe)[0]
    assert (first.level, first.about) == ("fault", "dpo")
    assert "by a second reward model on the same base: it gained nothing that can" in first.text


@pytest.mark.parametrize(
    ("outcome", "level", "text"),
    [
        ("failed", "fault", "The run ended early, 2 of 6 stages are done: the gate said no."),
        ("interrupted", "doubt", "The run has not come to its end: 2 of 6 stages are done."),
        ("unfinished", "doubt", "The run has not come to its end: 2 of 6 stages are done."),
        ("finished", "note", "ppo, judge, evaluation, best_of did not run"),
    ],
)
def test_a_run_that_did_not_come_to_its_end(
    tmp_path: Path, outcome: str, level: str, text: str
) -> None:
    error = {"stage": "ppo", "message": "the gate said no", "hint": "lower it"}
    manifest = {"outcome": outcome, "error": error if outcome == "failed" else None}
    measured = {key: None for key in GOOD if key[:3] in ("ppo", "bas", "jud")}
    findings = found(
        tmp_path,
        measured,
        manifest=manifest,
        not_run=("ppo", "judge", "evaluation", "best_of"),
    )
    (one,) = [one for one in findings if one.level == level]
    assert (one.about, one.text.startswith(text)) == ("ppo", True)
    assert one.change == ("lower it" if outcome == "failed" else one.change)


def test_nothing_that_is_missing_or_damaged_stops_it(tmp_path: Path) -> None:
    run = told(tmp_path)
    for file in ("results.json", "resolved.toml"):
        (run / file).write_text("{")
    assert verdict(Facts(run)) == []
    (run / "manifest.json").write_text('{"format": 1, "stages": [3, {"name": "x"}]}')
    assert [one.level for one in verdict(Facts(run))] == ["doubt"]


def test_each_reward_has_a_plot_of_its_own(tmp_path: Path) -> None:
    rows = [{"step": i, "objective/rewards/words-2": -0.1 * i, "score": 1.0} for i in range(5)]
    facts = Facts(told(tmp_path, curves={"ppo": rows}))
    plots = {plot.name: plot.title for plot in charts.ppo(facts, facts.stage("ppo"))}
    assert plots["ppo-objective-rewards-words-2"] == "The reward words-2 fell from +0.00 to −0.40"
    assert [*plots] == ["ppo-score", "ppo-objective-rewards-words-2"]
