"""What other tools call a key: TRL's other and older trainers, LLaMA-Factory, Axolotl, torchtune.

Only asked about a key that no table of ours has.
"""

import fnmatch
import re
from functools import cache

# Ours: theirs. A key of ours without a dot is one of each stage's table.
RENAMED = {
    "stages": "stage rl rlhf_stage",
    "model.name": "model_name model_name_or_path base_model policy_model checkpointer",
    "model.revision": "model_revision revision_of_model",
    "model.dtype": "torch_dtype infer_dtype compute_dtype pure_bf16 bfloat16 float16",
    "model.quantization": "quantization_bit quantization_method quantize_base double_quantization "
    "use_bnb_nested_quant",
    "model.chat_template": "template",
    "lora": "adapter use_peft finetuning_type peft_config",
    "lora.r": "lora_r lora_rank rank",
    "lora.target_modules": "lora_target lora_target_modules lora_target_linear lora_attn_modules "
    "apply_lora_to_mlp",
    "lora.use_rslora": "peft_use_rslora",
    "lora.use_dora": "peft_use_dora",
    "lora.layers_to_transform": "peft_layers_to_transform",
    "dataset": "datasets",
    "dataset.path": "dataset_name dataset_dir dataset_path query_dataset train_dataset source",
    "dataset.name": "dataset_config subset",
    "dataset.split": "dataset_train_split train_split",
    "dataset.test_split": "dataset_test_split test_datasets eval_dataset",
    "dataset.validation_fraction": "val_size val_set_size test_split_size",
    "dataset.max_rows": "max_samples max_train_samples",
    "dataset.max_prompt_tokens": "max_prompt_length max_source_length",
    "dataset.max_answer_tokens": "max_target_length",
    "dataset.max_prompt_tokens and dataset.max_answer_tokens": "max_seq_length max_seq_len "
    "cutoff_len sequence_len",
    "dataset.system": "system_prompt default_system",
    "dataset.columns": "column column_map field_chosen field_rejected field_messages field_prompt",
    "dataset.weight": "interleave_probs fraction",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler",
    "warmup_steps": "warmup_ratio num_warmup_steps",
    "optim": "optimizer adafactor",
    "adam_epsilon": "adam_eps",
    "max_grad_norm": "clip_grad_norm",
    "num_train_epochs": "epochs num_epochs",
    "max_steps": "max_steps_per_epoch",
    "max_steps or ppo.total_episodes": "steps num_steps",
    "per_device_train_batch_size": "batch_size micro_batch_size per_gpu_train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "gradient_checkpointing": "enable_activation_checkpointing disable_gradient_checkpointing",
    "gradient_checkpointing_kwargs": "gradient_checkpointing_use_reentrant",
    "activation_offloading": "enable_activation_offloading",
    "torch_compile": "compile torchdynamo",
    "eval_strategy": "evaluation_strategy",
    "eval_steps": "evals_per_epoch",
    "save_steps": "saves_per_epoch",
    "sft.train_sampling_strategy": "group_by_length",
    "sft.shuffle_dataset": "shuffle",
    "sft.neftune_noise_alpha": "noisy_embedding_alpha",
    "report_to": "log_with metric_logger use_wandb use_mlflow use_comet",
    "project": "tracker_project_name wandb_project",
    "run_name": "exp_name wandb_name wandb_run_id",
    "logging_steps": "log_every_n_steps",
    "dpo.beta": "pref_beta rl_beta dpo_beta",
    "dpo.loss_type": "pref_loss dpo_loss_type",
    "dpo.loss_type and dpo.loss_weights": "pref_ftx rpo_alpha",
    "dpo.label_smoothing": "dpo_label_smoothing",
    "dpo.use_weighting": "dpo_use_weighting",
    "ppo.kl_coef": "init_kl_coef kl_coeff",
    "ppo.kl_coef or dpo.beta": "beta",
    "ppo.kl_estimator": "kl_penalty",
    "ppo.guard.max_kl": "target_kl early_stopping target horizon adap_kl_ctrl ppo_target",
    "ppo.total_episodes": "total_ppo_epochs",
    "ppo.num_ppo_epochs": "ppo_epochs num_iterations",
    "ppo.num_mini_batches": "mini_batch_size ppo_batch_size backward_batch_size",
    "ppo.local_rollout_forward_batch_size": "forward_batch_size rollout_batch_size",
    "ppo.response_length": "max_new_tokens max_completion_length max_generated_tokens",
    "ppo.cliprange": "epsilon",
    "ppo.cliprange_value": "value_clip_range",
    "ppo.vf_coef": "value_coeff",
    "ppo.lam": "lmbda",
    "ppo.whiten_rewards": "ppo_whiten_rewards",
    "ppo.missing_eos_penalty": "non_eos_penalty penalise_no_eos reward_penalty "
    "penalty_reward_value",
    "ppo.guard.min_length": "min_response_length",
    "ppo.reward_model": "reward_funcs reward_model_name_or_path reward_checkpointer "
    "reward_and_value_model",
    "ppo.reference": "ref_model ref_policy_checkpointer",
    "reward": "rm reward_modeling",
}

# Why nothing here is like it: theirs, with * for whatever is left of a name.
ABSENT = {
    "answers are sampled by transformers, from the whole of the policy's distribution": "use_vllm "
    "vllm_* use_transformers_* transformers_continuous_* cache_implementation generation_kwargs "
    "top_k top_p min_p repetition_penalty do_sample use_teacher_server",
    "rewards are in units of their deviation, and unclipped": "use_score_scaling use_score_norm "
    "score_clip ppo_score_norm normalize_reward reward_clip_range scale_rewards reward_weights",
    "its trainer (GRPO, RLOO, KTO or another) is not of this version": "num_generations* rloo_k "
    "steps_per_generation generation_batch_size normalize_advantages token_level_kl epsilon_high "
    "delta alpha entropy_coef* entropy_target use_adaptive_entropy importance_sampling_level "
    "mask_truncated_completions *desirable_weight *_density_ratio prompt_sample_size simpo_gamma "
    "cpo_alpha orpo_alpha kto_* tpo_* beta1 beta2 filter_* num_value_samples mixture_coef vespo_* "
    "sapo_* multi_objective_aggregation top_entropy_quantile off_policy_mask_threshold "
    "use_bias_correction_kl replay_buffer_size step_separator train_on_last_step_only trl "
    "max_tool_calling_iterations chat_template_kwargs log_multimodal cast_lm_head_to_fp32 "
    "ref_adapter_name force_use_ref_model process_reward_model fork_threshold_tokens "
    "request_timeout token_budget max_inflight_tasks max_staleness queue_maxsize weight_sync_steps "
    "heartbeat_*",
    "it belongs to distillation, and no stage here distils": "teacher_* distillation_* uld_* "
    "use_*uld* iw_opd_* *kd_* seq_kd rkl_advantage loss_top_k loss_add_tail generate_from_teacher "
    "length_normalization single_step_decomposition reverse_kl_* *reprompt* solution_template "
    "feedback_template *environment_feedback* remove_thinking_* success_reward_threshold "
    "use_successful_as_teacher diagnostics_* num_loss_tokens_to_skip callbacks "
    "add_tail_bucket",
    "one prompt and one answer share a row: packed rows would see each other": "sample_packing "
    "eval_sample_packing neat_packing pad_to_sequence_len",
    "SFT learns the answer alone, always": "train_on_inputs train_on_prompt mask_history",
    "every adapter shares a base that does not train": "lora_modules_to_save additional_target "
    "apply_lora_to_output lora_target_parameters freeze_* unfrozen_parameters",
    "it is for prefix tuning, and LoRA is the one kind of adapter here": "num_virtual_tokens "
    "token_dim num_transformer_submodules num_attention_heads num_layers",
    "the attention is the one that transformers picks": "attn_implementation flash_attn "
    "flash_attention *_attention",
    "the stage sets it itself": "model_type tokenizer_type tokenizer tokenizer_config tokenizer_* "
    "lora_task_type is_encoder_decoder label_pad_token_id padding_value special_tokens "
    "reference_free ignore_bias_buffers truncate_token* stop_token_ids is_peft_model "
    "overwrite_output_dir dataset_batch_size num_of_sequences chars_per_token "
    "dataset_prepared_path preprocessing_num_workers overwrite_cache",
    "answers before and after stand in the report": "generate_during_eval log_completions* "
    "num_completions_to_print log_unique_prompts wandb_log_unique_prompts predict_with_generate "
    "plot_loss",
    "rows are read as a whole, not streamed": "streaming dataset_streaming",
    "the machine is what it is: CUDA_VISIBLE_DEVICES hides a card": "no_cuda device use_mps_device "
    "use_ipex",
}


@cache
def _absent() -> list[tuple[str, re.Pattern[str]]]:
    return [
        (why, re.compile("|".join(map(fnmatch.translate, theirs.split()))))
        for why, theirs in ABSENT.items()
    ]


_OURS = {name: ours for ours, theirs in RENAMED.items() for name in theirs.split()}


def elsewhere(name: str) -> str:
    """What stands here for another tool's key, or why nothing does; empty where none is known."""
    if name in _OURS:
        return f"here that is {_OURS[name]}"
    return next((f"nothing here does that: {why}" for why, p in _absent() if p.match(name)), "")
