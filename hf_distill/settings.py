"""Which settings make a run what it is, and which may change between its first start and a later one."""

from __future__ import annotations


NOT_OF_THE_RUN = frozenset(
    "output_dir cache_dir report_to run_name logging_steps logging_strategy logging_first_step disable_tqdm log_level "
    "log_level_replica dataloader_num_workers dataloader_prefetch_factor dataloader_pin_memory plan_only push_to_hub "
    "hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision resume_from_checkpoint "
    "push_to private local_rank parallelism_config accelerator_config logging_dir trackio_space_id".split()
)
