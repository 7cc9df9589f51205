"""What keys, flags and columns are called elsewhere, for suggestions alone.

None of these names is taken: an error that names one of them says ours.
"""

import difflib
from collections.abc import Collection, Iterable

# By our key, or keys where it depends on what is meant: what others call it.
_KEYS: dict[tuple[str, ...], str] = {
  ("train.learning_rate",): "lr base_lr peak_lr max_lr init_lr",
  ("train.batch_size",): (
    "bs batch train_batch_size global_batch_size per_device_train_batch_size"
    " per_device_batch_size mini_batch_size"
  ),
  ("train.rows_per_device",): "micro_batch_size micro_bs microbatch_size",
  ("train.weight_decay",): "wd decay adam_weight_decay",
  ("train.epochs",): "epoch num_epochs n_epochs num_train_epochs max_epochs",
  ("train.max_steps",): (
    "steps num_steps n_steps max_iters train_steps num_updates updates"
  ),
  ("train.warmup_ratio",): "warmup warmup_steps lr_warmup num_warmup_steps",
  ("train.final_lr_ratio",): "min_lr min_lr_ratio final_lr lr_end",
  ("train.grad_clip",): (
    "max_grad_norm clip_grad clip_grad_norm gradient_clip gradient_clipping"
    " gradient_clip_val clip_norm"
  ),
  ("train.beta1",): "adam_beta1 betas b1",
  ("train.beta2",): "adam_beta2 b2",
  ("train.eps",): "epsilon adam_eps adam_epsilon",
  ("train.max_student_tokens",): (
    "max_seq_len max_seq_length seq_len seq_length context_length block_size"
    " cutoff_len"
  ),
  ("train.remat",): "gradient_checkpointing activation_checkpointing",
  ("train.attention",): (
    "attn attn_implementation flash_attention flash_attn attn_impl"
  ),
  ("train.checkpoint_every",): (
    "save_steps save_every save_interval save_freq checkpoint_steps"
  ),
  ("train.keep_checkpoints",): "save_total_limit max_to_keep keep_last",
  ("train.log_every",): "logging_steps log_steps log_interval log_freq",
  ("train.deterministic",): "full_determinism",
  ("train.truncated",): "mask_truncated mask_truncated_completions",
  ("seed",): "seeds random_seed rng_seed rng",
  ("method",): "algorithm algo loss_type objective",
  ("divergence",): "kl kl_type kl_direction",
  ("loss.beta",): "jsd_beta",
  ("rollout.max_response_tokens",): (
    "max_len max_length max_tokens max_new_tokens max_gen_len max_gen_toks"
    " max_completion_length max_completion_tokens max_response_length"
    " response_length output_len max_output_tokens"
  ),
  (
    "rollout.max_prompt_tokens",
  ): "max_prompt_length max_prompt_len prompt_length",
  ("rollout.temperature", "evaluate.temperature"): "temp t",
  ("rollout.top_p", "evaluate.top_p"): "topp nucleus",
  ("rollout.top_k", "evaluate.top_k"): "topk",
  ("rollout.samples",): (
    "n num_samples n_samples num_generations rollouts num_rollouts"
    " samples_per_prompt group_size num_return_sequences"
  ),
  ("evaluate.k",): "eval_k pass_k pass_at_k avg_k num_eval_samples",
  ("evaluate.benchmarks",): (
    "benchmark tasks task eval_tasks eval_datasets eval_dataset evals"
  ),
  ("evaluate.num_problems",): "eval_limit max_eval_samples num_eval_problems",
  ("lora.rank",): "r lora_rank lora_r lora_dim",
  ("lora.alpha",): "lora_alpha",
  ("lora.dropout",): "lora_dropout",
  ("student.path",): (
    "model student student_model model_name model_path model_id"
    " model_name_or_path base_model pretrained checkpoint_path"
  ),
  ("teacher.path",): (
    "teacher teacher_model teacher_model_name teacher_path"
    " teacher_model_name_or_path"
  ),
  ("student.adapter",): "adapter_path peft_path lora_path lora_weights",
  (
    "student.tokenizer",
  ): "tokenizer_name tokenizer_path tokenizer_name_or_path",
  ("student.dtype", "teacher.dtype"): "torch_dtype precision bf16 fp16",
  (
    "student.thinking",
    "teacher.thinking",
  ): "enable_thinking think thinking_mode",
  ("data.source", "data.root"): (
    "dataset datasets data dataset_name dataset_path data_path data_dir"
    " data_file data_files train_file train_files train_data train_dataset"
  ),
  ("data.limit",): (
    "max_samples num_examples max_examples max_train_samples num_train_samples"
    " num_rows"
  ),
  ("prompts.set",): "prompt prompts prompt_template template system_prompt",
  ("engine.name",): "engine backend inference_engine rollout_backend",
  ("engine.vllm.tensor_parallel", "mesh.tensor"): (
    "tp tp_size tensor_parallel_size tensor_model_parallel_size"
  ),
  ("engine.vllm.data_parallel", "mesh.data"): "dp dp_size data_parallel_size",
  ("mesh.fsdp",): "fsdp zero zero_stage sharding",
  ("engine.vllm.data_parallel", "mesh.fsdp"): (
    "gpus gpu num_gpus n_gpus ngpus ngpu devices num_devices n_gpus_per_node"
    " nproc_per_node world_size"
  ),
  ("distributed.processes",): "nodes num_nodes nnodes num_processes",
  ("distributed.coordinator",): "master_addr coordinator_address rdzv_endpoint",
  ("engine.vllm.memory_share",): "gpu_memory_utilization mem_fraction_static",
  ("engine.vllm.max_model_tokens",): "max_model_len",
  ("engine.vllm.max_batched_tokens",): "max_num_batched_tokens",
  ("engine.vllm.eager",): "enforce_eager",
  ("engine.vllm.prefix_caching",): "enable_prefix_caching",
  ("engine.vllm.chunked_prefill",): "enable_chunked_prefill",
  ("engine.vllm.speculative",): "speculative_config speculation spec_decode",
  ("engine.vllm.speculative_tokens",): "num_speculative_tokens",
  ("engine.server.urls",): "url base_url api_base host endpoint server_url",
  ("engine.server.api_key_variable",): "api_key token openai_api_key",
  ("metrics.wandb",): "use_wandb report_to log_with logger",
  ("metrics.wandb_project",): "project project_name wandb_name run_name",
  ("metrics.tensorboard",): "use_tensorboard tb",
  ("metrics.trackio",): "use_trackio trackio_enabled",
  ("metrics.mlflow",): "use_mlflow mlflow_enabled",
  ("metrics.mlflow_experiment",): "experiment_name mlflow_experiment_name",
  ("pipeline.rounds",): "iterations num_iterations num_rounds n_rounds",
  ("sandbox.workers",): "num_workers n_workers workers_per_gpu",
}

# By our flag.
_FLAGS = {
  "workdir": (
    "output_dir output out outdir out_dir work_dir run_dir rundir run save_dir"
    " save_path log_dir logdir exp_dir experiment_dir default_local_dir dir"
  ),
  "config": "cfg conf config_file config_path config_name c",
  "dry_run": "dryrun plan",
  "status": "progress",
  "from": "init_from resume_from from_run donor",
}

PIPELINE_FLAGS = ("status", "dry_run", "from")
"""Flags of the pipeline's that people look for in every command."""

# By our column.
_COLUMNS = {
  "problem": (
    "prompt query instruction input text content task problem_statement"
    " question_content"
  ),
  "answer": (
    "answers gold target label labels ground_truth final_answer gold_answer"
    " expected_answer expected reference_answer gt"
  ),
  "solution": (
    "solutions rationale reference reference_solution explanation cot"
    " chain_of_thought reasoning worked_solution"
  ),
  "tests": "test test_cases testcases unit_tests input_output",
}
_CUTOFF = 0.75  # of similarity: a file may have any columns besides


def keys(name: str, known: Collection[str]) -> list[str]:
  """Returns our keys for what others call otherwise, or an empty list.

  Args:
    name: dotted, in whichever section; one that has a key of ours counts.
    known: all keys.
  """
  section, _, last = name.rpartition(".")
  # Of a key of that very name only the section is wrong.
  if section and any(key.endswith(f".{last}") for key in known):
    return []
  for ours, others in _KEYS.items():
    if _plain(last) in others.split():
      moved = {f"{section}.{key.rpartition('.')[2]}" for key in ours}
      return [key for key in known if key in moved] or list(ours)
  return []


def flags(name: str, known: Collection[str]) -> list[str]:
  """Returns our flag for what others call otherwise, or an empty list."""
  return [
    ours
    for ours, others in _FLAGS.items()
    if ours in known and _plain(name) in others.split()
  ]


def column(
  ours: str, there: Iterable[str], known: Collection[str]
) -> str | None:
  """Returns the column that likely is meant to be one of ours, or None.

  Args:
    ours: a column that a row lacks.
    there: the row's columns.
    known: those that have a meaning of their own.
  """
  strangers = {_plain(name): name for name in there if name not in known}
  for name in _COLUMNS.get(ours, "").split():
    if name in strangers:
      return strangers[name]
  near = difflib.get_close_matches(ours, strangers, n=1, cutoff=_CUTOFF)
  return strangers[near[0]] if near else None


def _plain(name: str) -> str:
  return name.lower().replace("-", "_")
