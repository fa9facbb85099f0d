# ruff: noqa: E501 (pairs of names)
"""A key of another tool is answered with ours, or with why there is none."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from rlhf_recipes.recipe import aliases, kinds, tables
from tests.helpers.recipes import MINIMAL, problems
from tools.make_docs import field_tables

ELSEWHERE = {
    "TRL's PPO until 0.11": "model_name=model.name init_kl_coef=ppo.kl_coef target=ppo.guard.max_kl "
    "ppo_epochs=ppo.num_ppo_epochs mini_batch_size=ppo.num_mini_batches steps=ppo.total_episodes "
    "forward_batch_size=ppo.local_rollout_forward_batch_size log_with=report_to "
    "batch_size=per_device_train_batch_size query_dataset=dataset.path exp_name=run_name "
    "tracker_project_name=project target_kl=ppo.guard.max_kl kl_penalty=ppo.kl_estimator",
    "TRL's PPO until 0.16": "non_eos_penalty=ppo.missing_eos_penalty base_model=model.name "
    "penalty_reward_value=ppo.missing_eos_penalty",
    "TRL's other trainers": "max_new_tokens=ppo.response_length beta=ppo.kl_coef epsilon=ppo.cliprange "
    "max_completion_length=ppo.response_length max_prompt_length=dataset.max_prompt_tokens "
    "reward_funcs=ppo.rewards max_seq_length=dataset.max_prompt_tokens rpo_alpha=dpo.loss_type",
    "TRL's command line": "model_name_or_path=model.name model_revision=model.revision lora_r=lora.r "
    "torch_dtype=model.dtype use_peft=lora lora_target_modules=lora.target_modules "
    "dataset_name=dataset.path dataset_train_split=dataset.split dataset_test_split=dataset.test_split",
    "transformers until 4": "evaluation_strategy=eval_strategy warmup_ratio=warmup_steps "
    "group_by_length=sft.train_sampling_strategy per_gpu_train_batch_size=per_device_train_batch_size",
    "LLaMA-Factory": "stage=stages finetuning_type=lora lora_rank=lora.r lora_target=lora.target_modules "
    "cutoff_len=dataset.max_answer_tokens max_samples=dataset.max_rows val_size=dataset.validation_fraction "
    "pref_beta=dpo.beta pref_loss=dpo.loss_type pref_ftx=dpo.loss_weights ref_model=ppo.reference "
    "quantization_bit=model.quantization template=model.chat_template ppo_target=ppo.guard.max_kl "
    "ppo_whiten_rewards=ppo.whiten_rewards dpo_label_smoothing=dpo.label_smoothing",
    "Axolotl": "datasets=dataset adapter=lora rl=stages sequence_len=dataset.max_prompt_tokens "
    "val_set_size=dataset.validation_fraction num_epochs=num_train_epochs optimizer=optim "
    "lr_scheduler=lr_scheduler_type lora_target_linear=lora.target_modules wandb_project=project "
    "micro_batch_size=per_device_train_batch_size evals_per_epoch=eval_steps saves_per_epoch=save_steps "
    "noisy_embedding_alpha=sft.neftune_noise_alpha test_datasets=dataset.test_split "
    "revision_of_model=model.revision dpo_use_weighting=dpo.use_weighting",
    "torchtune": "lr=learning_rate epochs=num_train_epochs ppo_batch_size=ppo.num_mini_batches "
    "kl_coeff=ppo.kl_coef lmbda=ppo.lam value_coeff=ppo.vf_coef value_clip_range=ppo.cliprange_value "
    "penalise_no_eos=ppo.missing_eos_penalty max_generated_tokens=ppo.response_length compile=torch_compile "
    "enable_activation_checkpointing=gradient_checkpointing clip_grad_norm=max_grad_norm "
    "quantize_base=model.quantization lora_attn_modules=lora.target_modules num_steps=ppo.total_episodes "
    "log_every_n_steps=logging_steps checkpointer=model.name min_response_length=ppo.guard.min_length",
}  # fmt: skip


def ours(name: str) -> bool:
    """Whether a dotted key, or one of a stage's table, may be set in a recipe."""
    stages = {kind: kind for kind in kinds.listed()}
    paths = [(kind, name) for kind in stages] if "." not in name else [tuple(name.split("."))]
    return (
        name in tables.top_keys()
        or name in stages
        or any(
            (found := tables.field_at(path, stages))
            and found.standing == "passed"
            or path == ("dataset", "columns")
            for path in paths
        )
    )


@pytest.mark.parametrize("tool", ELSEWHERE)
def test_a_key_of_another_tool_is_told_ours(tmp_path: Path, tool: str) -> None:
    for pair in ELSEWHERE[tool].split():
        theirs, name = pair.split("=")
        last = name.split(".")[-1]
        for line in (f"{theirs} = 1", f"sft.{theirs} = 1", f"[{theirs}]"):
            text = f"{MINIMAL}{line}" if line[0] == "[" else f"{line}\n{MINIMAL}"
            (said,) = problems(tmp_path, text)
            assert re.search(rf"(: here that is|belongs to) .*\b{last}\b", said)
            assert ours(name), name


def test_every_key_that_stands_for_another_is_one() -> None:
    for named in aliases.names()["renamed"]:
        for name in re.split(" or | and ", named):
            assert ours(name), name
    theirs = [n for said in aliases.names().values() for names in said.values() for n in names]
    assert len(theirs) == len({*theirs})
    assert not [name for name in theirs if aliases.elsewhere(name.replace("*", "x")) == ""]


def test_every_field_of_trls_other_trainers_is_known() -> None:
    """Of those that this version of TRL has, and of its scripts."""
    root = Path(importlib.util.find_spec("trl").origin).parent
    names, configs = set(), 0
    for file in [*root.rglob("*_config.py"), root / "scripts" / "utils.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                here = [line for line in node.body if isinstance(line, ast.AnnAssign)]
                names |= {line.target.id for line in here}
                configs += bool(here)
    names -= {name for table in field_tables().values() for name in table}
    names -= {*tables.top_keys()["model"], *tables.top_keys()["dataset"]}
    assert configs > 20 and len(names) > 100
    assert sorted(name for name in names if not aliases.elsewhere(name)) == []
