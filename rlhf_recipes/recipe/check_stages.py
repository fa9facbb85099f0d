"""The stages of a recipe: the kind of each, what it takes from those before, its settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe import tables
from rlhf_recipes.recipe.aliases import elsewhere
from rlhf_recipes.recipe.check import ENOUGH, Checker, Key, dotted
from rlhf_recipes.recipe.fields import Values, fields_for, resolve, show, suggest
from rlhf_recipes.recipe.kinds import (
    FROM_DATASET,
    JUDGE,
    KINDS,
    NAMED,
    REWARD,
    ROLES,
    extras_of,
    kind_of,
    listed,
    makes,
)
from rlhf_recipes.recipe.rewards import python_judge
from rlhf_recipes.recipe.rounds import expand
from rlhf_recipes.recipe.tables import DatasetTable, EvaluationTable, ModelTable, StageTable

STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
MIN_ROWS_TO_WHITEN = 8  # TRL asserts it
NEEDED_BY_SCHEDULERS = {
    "cosine_with_min_lr": "min_lr or min_lr_rate",
    "cosine_warmup_with_min_lr": "min_lr or min_lr_rate",
    "warmup_stable_decay": "num_decay_steps",
}
# The modules that optimizers and reporters are in, by how their names begin.
PACKAGES = dict.fromkeys("adamw_torch_4bit adamw_torch_8bit".split(), "torchao")
PACKAGES |= {"adamw_anyprecision": "torchdistx", "schedule_free": "schedulefree"}
PACKAGES |= {
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu": "torch_npu",
    "stable_adamw": "optimi",
}
PACKAGES |= {"azure_ml": "azureml", "flyte": "flytekit", "tensorboard": "tensorboard"}
_SAME = "mlflow neptune trackio wandb codecarbon clearml dagshub dvclive swanlab comet_ml kubeflow"
PACKAGES |= {name: name for name in f"{_SAME} grokadamw".split()}
# DPOTrainer raises for the others.
LOSSES_OF_DIVERGENCES = {*"sigmoid sigmoid_norm hinge ipo exo_pair robust discopop sft".split()}


class StageChecker(Checker):
    judge = ""  # the table that only the judge's settings come from

    def stages(self, written: list[str]) -> list[str]:
        """The stages that can be gone through; what is wrong with the others is noted."""
        valid: list[str] = []
        taken = {*tables.top_keys(), *KINDS, tables.BASE} - {*listed()}
        for i, name in enumerate(written):
            key: Key = ("stages", i)
            table = self.data.get(name)
            if name in valid:
                self.problem(key, f'"{name}" stands twice: a second one needs a name and a kind')
            elif name in taken or not STAGE_NAME.fullmatch(name):
                self.problem(key, f'"{name}" cannot be the name of a stage')
            elif name in self.kinds:
                valid.append(name)
            elif isinstance(table, dict):
                key = (name, "kind") if "kind" in table else (name,)
                self.problem(key, f"needs kind = one of {', '.join(listed())}")
            else:
                near = self.near(name, (*listed(), *self.kinds))
                self.problem(key, f'"{name}" is no kind of stage, and has no table{near}')
        return valid

    def stray_tables(self, stages: list[str]) -> None:
        """Every table that `stages`, as written, does not name."""
        for name, table in self.data.items():
            if name in stages or name in tables.top_keys():
                continue
            if name in self.kinds and name == self.judge:
                self.notes.append(f"[{name}] is the judge's alone: stages does not name it")
            elif name in self.kinds:
                self.notes.append(f"[{name}] is not used: stages does not name it")
                self.table(table, tables.stage_keys(self.kinds[name]), (name,))
            elif not isinstance(table, dict):
                continue  # among the top keys, and noted there
            else:
                near = self.near(name, (*listed(), *stages, *tables.top_keys()))
                self.problem((name,), f"unknown table: stages does not name it{near}")

    def near(self, name: str, known: tuple[str, ...]) -> str:
        """What an unknown stage or table is called here, or may be meant to be."""
        if hint := elsewhere(name):
            return f": {hint}"
        return suggest(name, known) if len(self.problems) < ENOUGH else ""

    def stage(self, name: str, stages: list[str], lora: bool, data: list[Values]) -> StageTable:
        """One stage, resolved. Its own dataset takes its limits from the first of `data`."""
        kind, at = self.kinds[name], (name,)
        values = self.table(self.data.get(name, {}), tables.stage_keys(kind), at)
        if name in listed() and values.get("kind", kind) != kind:
            self.problem((*at, "kind"), f'must be "{name}", or left out')
        of = kind_of(kind)
        options, given = resolve(fields_for(of.config), values, lora)
        extras = extras_of(of, values, options.get("learning_rate", 0.0))
        for key, what in _clashes(options, extras) if options else ():
            self.problem((*at, key), what)
        before = (
            stages[: stages.index(name)] if name in stages else stages
        )  # the judge's comes last
        for place, one in enumerate(extras.get("pairs") or ()):
            self.judgements((*at, "pairs", place), one, before)
        if of.makes == "judgements":
            self.judging(extras, at)
        if extras.get("choose") == "unsure" and extras["answers"] < 2:
            self.problem((*at, "choose"), '"unsure" chooses pairs: answers must be at least 2')
        own = self.own_dataset(name, values["dataset"], data) if "dataset" in values else None
        able = ROLES if name in stages else ()  # the judge's table serves no role
        roles = dict.fromkeys(ROLES) | {r: self.role(r, name, values, stages) for r in able}
        return StageTable(
            name, kind, **roles, dataset=own, extras=extras, options=options, given=given
        )

    def own_dataset(self, name: str, own: Values, data: list[Values]) -> DatasetTable:
        self.data_source(self.data[name]["dataset"], own, (name, "dataset"))
        inherited = tables.inherited(data[0])
        if any("test_split" in table for table in data):
            inherited["test_fraction"] = 0.0  # the split's prompts are taken out by name
        return DatasetTable(**{"path": "", **inherited, **own, "base": self.base})

    def role(self, role: str, name: str, values: Values, stages: list[str]) -> str | None:
        """What serves a role: what the table names, or the latest stage before that can."""
        if role not in kind_of(self.kinds[name]).roles:
            return None
        before = stages[: stages.index(name)]
        only = kind_of(self.kinds[name]).wants.get(role)
        if only and values.get(only[0]) != only[1] and role not in values:
            return None
        able = [s for s in before if makes(self.kinds[s], ROLES[role])]
        named: str | None = values.get(role)
        key: Key = (name, role)
        if role == "reward_model" and values.get("rewards") is not None:
            if (found := self.rewards(name, values)) is None:
                return None
            named, key = found
        if named is None:
            if only and not able:
                what = f"needs a {role.replace('_', ' ')}, and no stage before it makes one"
                self.problem((name, only[0]), f"{show(only[1])} {what}")
            return able[-1] if able and role not in NAMED else None
        if role == "reward_model" and (tables.is_path(named) or "/" in named):
            self.model_name(named, key)
        elif named in before and named not in able:
            wanted = " or ".join(name for name in listed() if makes(name, ROLES[role]))
            self.problem(key, f'"{named}" is of kind {self.kinds[named]}, not {wanted}')
        elif named in stages and named not in able:
            self.problem(key, f'"{named}" does not come before "{name}" in stages')
        elif named not in able and tables.is_path(named):
            what = f"is a stage's name; for what is in {named}, merge it into its base"
            self.problem(key, f'{what} and say model.name = "./the-merged-folder"')
        elif named not in able:
            self.problem(key, f'no stage is named "{named}"{suggest(named, able)}')
        return named

    def judgements(self, key: Key, named: str, before: list[str]) -> None:
        """One of `pairs`: what a stage learns from."""
        able = [name for name in before if makes(self.kinds[name], "judgements")]
        if named not in (FROM_DATASET, *able):
            known = (FROM_DATASET, *able)
            what = f"{show(named)} is neither {show(FROM_DATASET)} nor a label stage before it"
            self.problem(key, what + suggest(named, known))

    def judging(self, extras: Values, at: Key) -> None:
        """Who judges in a `label` stage."""
        rule, by = extras["rule"], extras["by"]
        if by == "rule" and rule is None:
            self.problem((*at, "by"), 'needs rule = { rule = "…" }, or "python:FILE.py:FUNCTION"')
        elif by != "rule" and rule is not None:
            self.problem((*at, "rule"), f'is for by = "rule", not {show(by)}')
        elif isinstance(rule, dict):
            self.term(rule, (*at, "rule"), judges=True)
        elif rule is not None and (code := python_judge(rule)):
            self.file(code[0], (*at, "rule"))
        elif rule is not None:
            what = f'must be a table with a rule, or "python:FILE.py:FUNCTION", not {show(rule)}'
            self.problem((*at, "rule"), what)
        for key in ("guideline", "principles"):
            if extras[key]:
                self.file(extras[key], (*at, key))
        name, price = extras["model"], extras["price"]
        if by == "model" and not name:
            what = 'needs model = "…": a hub id or a folder, or with `url` its name there'
            self.problem((*at, "by"), what)
        elif by != "model" and (name or extras["url"]):
            unused = dotted((*at, "model" if name else "url"))
            self.notes.append(f'{unused} is not used: it is for by = "model", not {show(by)}')
        elif name and not extras["url"]:
            self.model_name(name, (*at, "model"))
        if price and (len(price) != 2 or min(price) < 0):
            what = "must be two numbers: dollars for a million tokens, in and out"
            self.problem((*at, "price"), what)

    def rewards(self, name: str, values: Values) -> tuple[str, Key] | None:
        """What is wrong with a list of rewards; the reward model in it, and its place."""
        at: Key = (name, "rewards")
        models: list[tuple[str, Key]] = []
        if "reward_model" in values:
            self.problem(at, "lists the reward model too: leave out reward_model")
        if not values["rewards"]:
            self.problem(at, "is empty: leave it out, or name a reward")
        for place, one in enumerate(values["rewards"]):
            key: Key = (*at, place)
            if isinstance(one, dict):
                self.term(one, key)
                one = one.get("model")
            elif named := python_judge(one):
                self.file(named[0], key)
                continue
            if isinstance(one, str):
                models.append((one, key))
        for _, key in models[1:]:
            self.problem(key, "is a second reward model: a list holds one, and any number of rules")
        return models[0] if models else None

    def implied(
        self, evaluation: EvaluationTable, stages: list[StageTable], lora: bool, data: list[Values]
    ) -> list[StageTable]:
        """The independent judge's table, where there is to be one: a reward model from the base.

        It has the settings of the last reward stage, else those of `[reward]`.
        """
        if evaluation.best_of and not any(stage.of.explores for stage in stages):
            what = "is a yardstick of policies that learn on their own answers: no stage makes one"
            self.problem(("evaluation", "best_of"), what)
        if tables.INDEPENDENT not in [judge.model for judge in evaluation.judges.values()]:
            return []
        if not data[0].get("judge_fraction", DatasetTable.judge_fraction):
            what = "judge_fraction = 0 in [dataset]; 0.25 keeps a quarter of the training pairs"
            self.problem(("evaluation", "judge"), f"has no pairs to learn from: {what}")
        rewards = [stage for stage in stages if stage.of.makes == "reward_model"]
        if not rewards:
            self.judge, self.kinds[REWARD] = REWARD, REWARD
            rewards = [self.stage(REWARD, [stage.name for stage in stages], lora, data)]
        return [replace(rewards[-1], name=JUDGE, kind=JUDGE, policy=None)]


def check(data: dict[str, Any], path: Path) -> tuple[dict[str, Any], StageChecker]:
    """The parts of a Recipe, to be used only if the checker holds no problem.

    `data` is the parsed recipe, `path` its file: relative paths start from the folder around it.
    """
    if "rounds" in data:  # what is wrong in the first round is said once
        _, checker = check({key: value for key, value in data.items() if key != "rounds"}, path)
        if checker.problems:
            checker.table(data["rounds"], tables.keys_of("rounds"), ("rounds",))
            return {}, checker
    base, (data, wrong) = path.parent.resolve(), expand(data)
    checker = StageChecker(data, base)
    checker.table(data.get("rounds", {}), tables.keys_of("rounds"), ("rounds",))
    for key, what in wrong:
        checker.problem(key, what)
    top = checker.top()
    model, datasets, evaluation = checker.model(), checker.datasets(), checker.evaluation()
    lora = checker.lora(model.get("quantization", ModelTable.quantization))
    if model.get("sampler") == tables.VLLM and (what := _not_served(model, lora)):
        checker.problem(("model", "sampler"), f'"{tables.VLLM}" {what}')
    written = top.get("stages", [])
    names = checker.stages(written)
    stages = [checker.stage(name, names, lora is not None, datasets) for name in names]
    if names == written:
        for stage in stages:
            scored = stage.reward_model is not None or stage.extras.get("rewards") is not None
            if "answers" in stage.of.roles and stage.answers is None:
                key = (stage.name,) if stage.name in data else ("stages",)
                checker.problem(key, f'{stage.name} has nothing to judge: put a "sample" before it')
            if stage.of.explores and not scored:
                key = (stage.name,) if stage.name in data else ("stages",)
                what = 'put a "reward" stage before it, or say reward_model = "…" or rewards = […]'
                checker.problem(key, f"{stage.name} has nothing to score with: {what}")
        if evaluation:
            stages += checker.implied(evaluation, stages, lora is not None, datasets)
    checker.stray_tables(written)
    if checker.problems:
        return {}, checker
    mirror = tables.MirrorTable(**model["mirror"]) if "mirror" in model else None
    first, *more = [DatasetTable(**table, base=base) for table in datasets]
    return {
        "title": top.get("title") or path.stem,
        "stages": tuple(names),
        "seed": top.get("seed", 42),
        "model": ModelTable(**model | {"mirror": mirror}, base=base),
        "lora": lora,
        "dataset": replace(first, more=tuple(more)),
        "evaluation": evaluation,
        "tables": {stage.name: stage for stage in stages},
        "notes": tuple(checker.notes),
    }, checker


def _not_served(model: Values, lora: dict[str, Any] | None) -> str:
    """Why vLLM cannot sample the recipe's policies, if it cannot: it would serve other ones."""
    if lora is None:
        return "needs adapters: with lora = false every update would send all weights"
    if (bits := model.get("quantization", "none")) != "none":
        return f"serves the base in 16 or 32 bit, and it is trained in {bits}"
    wrong = [key for key in ("use_dora", "rank_pattern", "alpha_pattern") if lora.get(key)]
    return f"loads plain LoRA alone: leave out lora.{wrong[0]}" if wrong else ""


def _clashes(options: Values, extras: Values) -> Iterator[tuple[str, str]]:
    """What TRL's trainers and transformers refuse, or would trip over, hours later."""
    if not options.get("dataloader_num_workers"):
        for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
            if options.get(key):
                yield key, "needs dataloader_num_workers of at least 1"
    scheduler, words = options["lr_scheduler_type"], options["lr_scheduler_kwargs"] or {}
    needed = NEEDED_BY_SCHEDULERS.get(scheduler, "")
    if needed and len(words.keys() & needed.split(" or ")) != 1:
        yield "lr_scheduler_kwargs", f'must hold {needed} for lr_scheduler_type = "{scheduler}"'
    words = options["gradient_checkpointing_kwargs"]
    if words and words.get("use_reentrant") is not False:
        what = "must hold use_reentrant = false: else no gradient passes a frozen base"
        yield "gradient_checkpointing_kwargs", what
    reporters = options["report_to"]
    for key, name in [("optim", options["optim"])] + [
        ("report_to", one) for one in ([reporters] if isinstance(reporters, str) else reporters)
    ]:
        package = next((p for start, p in PACKAGES.items() if name.startswith(start)), "")
        if package and find_spec(package) is None:
            yield key, f'"{name}" needs the package {package}, which is not installed'
    if not all("=" in part for part in (options["optim_args"] or "=").split(",")):
        yield "optim_args", 'must be "name=value", with commas between several'
    if "f_divergence_type" in options:  # DPO
        losses, weights = options["loss_type"], options["loss_weights"]
        if not losses:
            yield "loss_type", "names no loss"
        if weights is not None and len(weights) != len(losses):
            what = f"{len(weights)} for {len(losses)} of loss_type"
            yield "loss_weights", f"must be one for each loss, not {what}"
        if "robust" in losses and options["label_smoothing"] >= 0.5:
            yield "label_smoothing", 'must be below 0.5 for loss_type "robust"'
        if "exo_pair" in losses and not options["label_smoothing"]:
            yield "label_smoothing", 'loss_type "exo_pair" needs it above 0: its paper has 0.001'
        if options["f_divergence_type"] != "reverse_kl":
            for loss in sorted({*losses} - LOSSES_OF_DIVERGENCES):
                yield "f_divergence_type", f'loss_type "{loss}" goes with "reverse_kl" alone'
    step = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    if group := options.get("num_generations"):  # RLOO, GRPO
        batch = options["generation_batch_size"] or step
        what = "per_device_train_batch_size × gradient_accumulation_steps"
        named = "generation_batch_size" if options["generation_batch_size"] else what
        if batch % step:
            yield "generation_batch_size", f"{batch} is not a multiple of {what} = {step}"
        elif batch % group:
            yield "num_generations", f"{group} does not divide {named} = {batch}"
    if "num_mini_batches" in options:  # PPO
        batch = step
        parts = options["num_mini_batches"]
        if batch % parts:
            what = f"per_device_train_batch_size × gradient_accumulation_steps = {batch}"
            yield "num_mini_batches", f"{parts} does not divide {what}"
        elif options["whiten_rewards"] and batch // parts < MIN_ROWS_TO_WHITEN:
            what = f"at least {MIN_ROWS_TO_WHITEN} rows in a mini-batch, not {batch // parts}"
            yield "whiten_rewards", f"needs {what}"
    if options["eval_strategy"] == "no" and extras.get("keep") == "best":
        yield "eval_strategy", 'leaves no score to choose by: say keep = "last"'
