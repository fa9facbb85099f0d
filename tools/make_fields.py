"""Write rlhf_recipes/fields.json and recipe.schema.json from the pinned TRL, transformers and PEFT.

    python tools/make_fields.py

TABLE says of every field of every config what becomes of it; the first row that names a field
holds. A field that no row names, and a row that names no field, stop the generator: after an
upgrade a person decides about each new field.
"""

import dataclasses
import fnmatch
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import DPOConfig, RewardConfig, SFTConfig
from trl.experimental.ppo import PPOConfig

from rlhf_recipes.fields import Field, Keys, fields_of
from rlhf_recipes.tables import KINDS, stage_keys, top_keys

PACKAGE = Path(__file__).parent.parent / "rlhf_recipes"
CONFIGS = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
    "dpo": DPOConfig,
    "lora": LoraConfig,
}

IDENTITY = {"effect": "identity"}
LAYOUT = {"effect": "layout"}
NEUTRAL = {"effect": "neutral"}


def owned(owner: str, reason: str) -> dict[str, str]:
    return {"standing": "owned", "owner": owner, "reason": reason}


def refused(reason: str) -> dict[str, str]:
    return {"standing": "refused", "reason": reason}


STAGES = "sft reward ppo dpo"
STOCK = "sft reward dpo"

TABLE: list[tuple[str, str, dict[str, str]]] = [
    # ---- owned by another key of the recipe
    (STAGES, "seed data_seed", owned("seed", "every stage draws its own from the recipe's")),
    (
        STAGES,
        "bf16 fp16 bf16_full_eval fp16_full_eval",
        owned("model.dtype", "one precision for all stages"),
    ),
    (STAGES, "model_init_kwargs", owned("[model]", "all stages share one base model")),
    (
        STAGES,
        "max_length",
        owned(
            "dataset.max_prompt_tokens and dataset.max_answer_tokens", "one limit for all stages"
        ),
    ),
    (STAGES, "dataset_text_field dataset_kwargs", owned("[dataset]", "it says how rows are read")),
    ("ppo", "sft_model_path", owned("policy", "a stage of the recipe")),
    ("ppo", "reward_model_path", owned("reward_model", "a stage, a folder or a hub id")),
    (
        "ppo",
        "batch_size local_batch_size",
        owned("per_device_train_batch_size × gradient_accumulation_steps", "their product"),
    ),
    (
        "ppo",
        "mini_batch_size local_mini_batch_size",
        owned("num_mini_batches", "the batch divided by it"),
    ),
    ("ppo", "micro_batch_size", owned("per_device_train_batch_size", "the same, on one device")),
    ("ppo", "num_total_batches", owned("total_episodes", "the episodes divided by the batch")),
    ("ppo", "max_steps", owned("total_episodes", "PPO's length is counted in episodes")),
    (
        STAGES,
        "activation_checkpointing",
        owned("gradient_checkpointing", "TRL reads the older name of the two"),
    ),
    (
        STAGES,
        "activation_checkpointing_kwargs",
        owned("gradient_checkpointing_kwargs", "TRL reads the older name of the two"),
    ),
    (
        "ppo",
        "eval_delay eval_on_start",
        owned("eval_steps", "the start, every so many updates and the end are scored"),
    ),
    (
        "ppo",
        "per_device_eval_batch_size",
        owned("local_rollout_forward_batch_size", "validation answers are rollouts"),
    ),
    ("lora", "base_model_name_or_path", owned("model.name", "all adapters share one base model")),
    ("lora", "revision", owned("model.revision", "all adapters share one base model")),
    # ---- owned by the program
    (
        STAGES,
        "output_dir do_train do_eval do_predict",
        owned("the runner", "a stage's folder and work are planned"),
    ),
    (STAGES, "save_strategy save_steps save_total_limit", NEUTRAL),
    (
        STAGES,
        "resume_from_checkpoint restore_callback_states_from_checkpoint ignore_data_skip "
        "enable_jit_checkpoint save_* load_best_model_at_end metric_for_best_model "
        "greater_is_better",
        owned("the runner", "it keeps checkpoints to go on from, as save_steps says"),
    ),
    (
        STAGES,
        "log_level log_level_replica log_on_each_node disable_tqdm",
        owned("the runner", "it draws the progress and keeps the libraries' output in log.txt"),
    ),
    (
        STAGES,
        "eos_token pad_token chat_template_path",
        owned("the tokenizer", "settled once, before the first stage, for all of them"),
    ),
    (STAGES, "remove_unused_columns", owned("the stage", "it makes the columns itself")),
    ("dpo", "disable_dropout", owned("the stage", "policy and reference are compared without it")),
    ("sft", "completion_only_loss", owned("the stage", "it learns the answer alone, always")),
    ("ppo", "stop_token stop_token_id", owned("the stage", "an answer always stops at EOS")),
    (
        "ppo",
        "model_adapter_name ref_adapter_name",
        owned("the stage", "it names the adapters on the shared base"),
    ),
    (STAGES, "use_cache", owned("the stage", "on for generation, off for training")),
    (
        STAGES,
        "use_cpu",
        owned("the machine", "the accelerator where there is one; CUDA_VISIBLE_DEVICES hides it"),
    ),
    (
        STAGES,
        "local_rank world_size ddp_* fsdp fsdp_config deepspeed ds3_gather_for_generation "
        "accelerator_config parallelism_config",
        owned("the launcher", "processes are not part of a recipe"),
    ),
    (
        "lora",
        "task_type peft_type peft_version auto_mapping inference_mode",
        owned("the stage", "it follows from what the adapter is for"),
    ),
    # ---- refused in every stage
    (
        STAGES,
        "push_to_hub hub_*",
        refused("nothing leaves this machine during a run; `export` says how to upload"),
    ),
    (STAGES, "trust_remote_code", refused("no code from the hub is run")),
    (
        STAGES,
        "tf32 full_determinism",
        refused("a switch of the whole process: it would carry over into the later stages"),
    ),
    (STAGES, "debug", refused("its hooks would stay on the base model that all stages share")),
    (
        STAGES,
        "use_liger_kernel liger_kernel_config",
        refused("it rewrites the layers of the base model that all stages share"),
    ),
    (STAGES, "auto_find_batch_size", refused("the batch size would depend on the machine's luck")),
    (
        STAGES,
        "optim_target_modules",
        refused("GaLore and APOLLO, which alone read it, build their optimizer from bare layers"),
    ),
    (STAGES, "dataloader_in_order", refused("a resumed stage could not repeat the order")),
    (
        STAGES,
        "label_names include_for_metrics batch_eval_metrics prediction_loss_only "
        "eval_accumulation_steps eval_do_concat_batches eval_use_gather_object",
        refused("it serves a compute_metrics function, and there is none"),
    ),
    (STAGES, "length_column_name", refused("rows carry no column of lengths")),
    # ---- refused in one stage
    (
        "sft dpo",
        "packing packing_strategy eval_packing padding_free",
        refused("without FlashAttention, rows that share a sequence see each other"),
    ),
    ("sft", "assistant_only_loss", refused("it needs a chat template that TRL knows by heart")),
    ("sft dpo", "truncation_mode", refused("a row over the limit is dropped, not cut")),
    (STOCK, "dataloader_drop_last", refused("which rows it drops hangs on the micro-batch")),
    (
        STOCK,
        "dataset_num_proc",
        refused("rows reach the trainer as ids; there is nothing left to map"),
    ),
    (
        "reward dpo",
        "label_smoothing_factor average_tokens_across_devices",
        refused("TRL's trainer of this kind computes its own loss and never reads it"),
    ),
    ("dpo", "neftune_noise_alpha", refused("the reference would hear the noise too")),
    (
        "dpo",
        "precompute_ref_log_probs precompute_ref_batch_size",
        refused("TRL keeps them by the weights of a whole model, and the reference is an adapter"),
    ),
    (
        "dpo",
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
        refused("the reference is the policy that the stage starts from, to its end"),
    ),
    ("reward", "neftune_noise_alpha", refused("the reward model has no embeddings of its own")),
    (
        "ppo",
        "label_smoothing_factor average_tokens_across_devices neftune_noise_alpha torch_compile* "
        "torch_empty_cache_steps dataset_num_proc dataloader_* train_sampling_strategy "
        "logging_strategy logging_first_step logging_nan_inf_filter include_num_input_tokens_seen "
        "skip_memory_metrics",
        refused("TRL's PPO loop never reads it, and neither does ours"),
    ),
    # ---- refused in [lora]
    (
        "lora",
        "modules_to_save trainable_token_indices bias layer_replication",
        refused("it would train or rebuild the base model that all adapters share"),
    ),
    (
        "lora",
        "kasa_config loftq_config corda_config eva_config lora_ga_config",
        refused("it would change the base model that all adapters share, or needs data to start"),
    ),
    (
        "lora",
        "monteclora_config",
        refused("it draws noise in the forward pass: KL would never be 0"),
    ),
    (
        "lora",
        "alora_invocation_tokens arrow_config",
        refused("such an adapter acts on some tokens only and cannot be merged"),
    ),
    ("lora", "lora_bias", refused("it cannot be merged into layers that have no bias")),
    (
        "lora",
        "target_parameters",
        refused("an adapter on bare parameters cannot be switched alone"),
    ),
    ("lora", "fan_in_fan_out", refused("PEFT reads it off the layer and corrects it")),
    ("lora", "ensure_weight_tying", refused("it concerns modules that no adapter here trains")),
    (
        "lora",
        "megatron_config megatron_core use_qalora qalora_group_size use_bdlora velora_config "
        "runtime_config",
        refused(
            "it is for Megatron, GPTQ, special serving or special kernels, none of which is here"
        ),
    ),
    # ---- passed: where and how it is computed
    (
        STAGES,
        "per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size "
        "gradient_checkpointing gradient_checkpointing_kwargs torch_compile* "
        "torch_empty_cache_steps activation_offloading pad_to_multiple_of "
        "local_rollout_forward_batch_size dataloader_num_workers dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context",
        LAYOUT,
    ),
    # ---- passed: logging and reporting
    (
        STAGES,
        "logging_* report_to run_name project trackio_* include_num_input_tokens_seen "
        "skip_memory_metrics num_sample_generations",
        NEUTRAL,
    ),
    # ---- passed: it determines the result
    (
        STAGES,
        "num_train_epochs learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim "
        "optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm",
        IDENTITY,
    ),
    (
        STOCK,  # evaluating draws from the generator that dropout draws from: hence identity
        "max_steps train_sampling_strategy eval_strategy eval_steps eval_delay eval_on_start",
        IDENTITY,
    ),
    (
        "sft",
        "label_smoothing_factor average_tokens_across_devices neftune_noise_alpha "
        "router_aux_loss_coef shuffle_dataset loss_type",
        IDENTITY,
    ),
    ("reward", "disable_dropout center_rewards_coefficient", IDENTITY),
    (
        "dpo",
        "beta loss_type loss_weights label_smoothing ld_alpha f_divergence_type "
        "f_alpha_divergence_coef use_weighting discopop_tau router_aux_loss_coef",
        IDENTITY,
    ),
    (
        "ppo",
        "num_mini_batches total_episodes response_length temperature missing_eos_penalty "
        "num_ppo_epochs whiten_rewards kl_coef kl_estimator cliprange vf_coef cliprange_value "
        "gamma lam eval_strategy eval_steps",
        IDENTITY,
    ),
    (
        "lora",
        "r target_modules exclude_modules lora_alpha lora_dropout use_rslora init_lora_weights "
        "layers_to_transform layers_pattern rank_pattern alpha_pattern use_dora",
        IDENTITY,
    ),
]

VALIDATED = 'what keep = "best" chooses by: the score on validation prompts'
LORA_RATE = "upstream's is for training all weights; an adapter needs some ten times as much"
# (table, field): our default, why, and whether it holds with LoRA alone.
OURS: dict[tuple[str, str], tuple[Any, str, bool]] = {
    ("sft", "learning_rate"): (2e-4, LORA_RATE, True),
    ("reward", "learning_rate"): (1e-4, LORA_RATE, True),
    ("ppo", "learning_rate"): (1e-4, LORA_RATE, True),
    ("dpo", "learning_rate"): (1e-5, LORA_RATE, True),
    ("reward", "center_rewards_coefficient"): (
        0.01,
        "keeps scores near 0; TRL's documentation recommends it",
        False,
    ),
    ("ppo", "lam"): (
        1.0,
        "the score comes at the end: at 0.95 the first of 50 tokens would hear 8 % of it",
        False,
    ),
    ("ppo", "missing_eos_penalty"): (1.0, "else the policy learns to talk until cut off", False),
    ("ppo", "eval_strategy"): ("steps", VALIDATED, False),
    ("ppo", "eval_steps"): (0.2, VALIDATED, False),
    **{
        (kind, name): ours
        for kind in STAGES.split()
        for name, ours in {
            "save_steps": (0.1, "a stage that is killed goes on from the last one", False),
            "save_total_limit": (2, "one more than is needed, should the last be damaged", False),
        }.items()
    },
    ("lora", "r"): (16, "8 is small for three stages on one shape", False),
    ("lora", "lora_alpha"): (32, "twice the rank, so that r alone leaves the step size", False),
    ("lora", "target_modules"): ("all-linear", "PEFT's choice depends on the architecture", False),
}

RANGES = {
    "above 0": "num_train_epochs adam_epsilon learning_rate temperature beta discopop_tau",
    "a whole number, or a share below 1": "logging_steps eval_steps save_steps",
    "at least 0": "weight_decay max_grad_norm warmup_steps kl_coef vf_coef missing_eos_penalty "
    "cliprange cliprange_value num_sample_generations eval_delay neftune_noise_alpha "
    "router_aux_loss_coef center_rewards_coefficient dataloader_num_workers",
    "at least 1": "per_device_train_batch_size per_device_eval_batch_size r lora_alpha "
    "gradient_accumulation_steps num_mini_batches total_episodes response_length num_ppo_epochs "
    "local_rollout_forward_batch_size pad_to_multiple_of torch_empty_cache_steps "
    "save_total_limit",
    "at least 1, or -1": "max_steps",
    "from 0 to 1": "gamma lam ld_alpha",
    "at least 0 and below 1": "adam_beta1 adam_beta2 lora_dropout label_smoothing_factor "
    "label_smoothing",
}

SCHEDULERS_THAT_EVALUATE = "reduce_lr_on_plateau greedy"  # they read an evaluation's numbers
OPTIMIZERS_OF_WHOLE_LAYERS = "galore_* apollo_* lomo adalomo"  # see optim_target_modules
CHOICES = {
    ("sft", "loss_type"): ("nll", "dft", "chunked_nll"),
    ("reward", "train_sampling_strategy"): ("random", "sequential"),
    ("dpo", "train_sampling_strategy"): ("random", "sequential"),
    # AOT's two sort the pairs of a micro-batch, whose size is layout.
    ("dpo", "loss_type"): (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    ("dpo", "f_divergence_type"): (
        *("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    ),
    ("ppo", "eval_strategy"): ("no", "steps"),
    ("ppo", "save_strategy"): ("no", "steps"),
    **{(kind, "report_to"): ("none", *INTEGRATION_TO_CALLBACK) for kind in STAGES.split()},
    **{(kind, "save_strategy"): ("no", "steps", "epoch") for kind in STOCK.split()},
    ("sft", "train_sampling_strategy"): (
        *("random", "sequential", "group_by_length", "batch_rebalance"),
    ),
    # The others change the base model, freeze a part of the adapter, or do not start at zero.
    ("lora", "init_lora_weights"): (True, "gaussian", "orthogonal"),
}


def matches(names: str, field: str) -> bool:
    return any(fnmatch.fnmatchcase(field, pattern) for pattern in names.split())


def verdict(table: str, name: str) -> dict[str, str]:
    for kinds, names, verdict in TABLE:
        if table in kinds.split() and matches(names, name):
            return verdict
    raise SystemExit(f"{table}.{name}: no row of TABLE names it")


def choices(table: str, name: str, field: Field) -> tuple[Any, ...]:
    dropped = {
        "lr_scheduler_type": SCHEDULERS_THAT_EVALUATE,
        # A schedule-free optimizer wants to be told of every evaluation; PPO's loop has no place.
        "optim": OPTIMIZERS_OF_WHOLE_LAYERS + (" schedule_free_*" if table == "ppo" else ""),
    }.get(name, "")
    kept = CHOICES.get((table, name), field.choices)
    return tuple(c for c in kept if not matches(dropped, str(c)))


def describe(table: str) -> dict[str, Field]:
    """Every field of a config, as TABLE has it."""
    described = {}
    for name, field in fields_of(CONFIGS[table]).items():
        said = verdict(table, name)
        if said.get("standing", "passed") != "passed":
            described[name] = Field(**said)
            continue
        default = field.default
        if field.types == ("float",) and default is not None:
            default = float(default)
        ours, why, lora = OURS.get((table, name), (None, "", False))
        described[name] = dataclasses.replace(
            field,
            **said,
            default=default,
            choices=choices(table, name, field),
            range=next((r for r, names in RANGES.items() if matches(names, name)), ""),
            ours=ours,
            reason=why,
            ours_needs_lora=lora,
        )
    return described


def check_rows() -> None:
    names = {table: [f.name for f in dataclasses.fields(c)] for table, c in CONFIGS.items()}
    for kinds, patterns, _ in TABLE:
        for pattern in patterns.split():
            if not any(matches(pattern, n) for table in kinds.split() for n in names[table]):
                raise SystemExit(f"{pattern}: a row of TABLE names it, and no config has it")


def fields_json() -> str:
    """One line a field; what equals Field's own default is left out, but a passed field's type."""
    check_rows()
    defaults = dataclasses.asdict(Field())
    tables = []
    for table in CONFIGS:
        lines = []
        for name, field in describe(table).items():
            entry = {k: v for k, v in dataclasses.asdict(field).items() if v != defaults[k]}
            lines.append(f"    {json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}")
        tables.append(f'  "{table}": {{\n' + ",\n".join(lines) + "\n  }")
    pins = {name: version(name) for name in ("trl", "transformers", "peft")}
    head = f'"format": 1,\n"versions": {json.dumps(pins)},\n'
    return "{\n" + head + '"tables": {\n' + ",\n".join(tables) + "\n}\n}\n"


# ---- JSON Schema -----------------------------------------------------------------------------

SCHEMA_TYPES = {
    "bool": {"type": "boolean"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "str": {"type": "string"},
    "dict": {"type": "object"},
    "list[str]": {"type": "array", "items": {"type": "string"}},
    "list[int]": {"type": "array", "items": {"type": "integer"}},
    "list[float]": {"type": "array", "items": {"type": "number"}},
}
SCHEMA_RANGES = {
    "above 0": {"exclusiveMinimum": 0},
    "a whole number, or a share below 1": {
        "exclusiveMinimum": 0,
        "anyOf": [{"exclusiveMaximum": 1}, {"multipleOf": 1}],
    },
    "at least 0": {"minimum": 0},
    "at least 1": {"minimum": 1},
    "at least 1, or -1": {"minimum": -1, "not": {"const": 0}},
    "above 0, at most 1": {"exclusiveMinimum": 0, "maximum": 1},
    "from 0 to 1": {"minimum": 0, "maximum": 1},
    "at least 0 and below 1": {"minimum": 0, "exclusiveMaximum": 1},
}


def help_texts(table: str) -> dict[str, str]:
    return {f.name: f.metadata.get("help", "") for f in dataclasses.fields(CONFIGS[table])}


def schema_of(keys: Keys, helps: dict[str, str]) -> dict[str, Any]:
    properties = {}
    for name, field in keys.items():
        if isinstance(field, Field) and field.standing == "passed":
            kinds = [SCHEMA_TYPES[kind] for kind in field.types]
            entry: dict[str, Any] = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
            entry = entry | SCHEMA_RANGES.get(field.range, {})
            if field.choices:
                allowed = {"enum": list(field.choices)}
                entry = entry | {"items": allowed} if "items" in entry else allowed
            default = field.default if field.ours is None else field.ours
            if default not in (None, {}, []):
                entry["default"] = default
            if helps.get(name):
                entry["description"] = " ".join(helps[name].split())
            properties[name] = entry
        elif not isinstance(field, Field):
            properties[name] = schema_of(field, {})
    return {"type": "object", "additionalProperties": False, "properties": properties}


def schema_json() -> str:
    """For editors (Taplo, Even Better TOML). It knows keys and types; `check` knows the rest."""
    top = schema_of(top_keys(), {})
    places = top["properties"]
    places["lora"] = {
        "anyOf": [{"const": False}, schema_of(top_keys()["lora"], help_texts("lora"))]
    }
    places["evaluation"] = {"anyOf": [{"const": False}, places["evaluation"]]}
    places["dataset"] = {
        "anyOf": [places["dataset"], {"type": "array", "items": places["dataset"]}]
    }
    stages = {kind: schema_of(stage_keys(kind), help_texts(kind)) for kind in KINDS}
    for kind in KINDS:
        places[kind] = {"$ref": f"#/$defs/{kind}"}
    of_kind = [
        {
            "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
            "then": {"$ref": f"#/$defs/{kind}"},
        }
        for kind in KINDS
    ]
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of rlhf-recipes",
        "$defs": stages,
        **top,
        "required": ["stages", "model", "dataset"],
        "additionalProperties": {"type": "object", "required": ["kind"], "allOf": of_kind},
    }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (PACKAGE / "fields.json").write_text(fields_json(), encoding="utf-8")
    (PACKAGE / "recipe.schema.json").write_text(schema_json(), encoding="utf-8")
