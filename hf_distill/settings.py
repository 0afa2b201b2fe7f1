"""How a setting is declared, and which settings make a run what it is. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help_text: str, **metadata: Any) -> Any:
    """A field of a dataclass that is also a flag, with what `--help` says about it."""
    return field(default=default, metadata={"help": help_text, **metadata})


# What may change between the first start of a run and a later one.
NOT_OF_THE_RUN = frozenset(
    "output_dir cache_dir report_to run_name logging_steps logging_strategy logging_first_step disable_tqdm log_level "
    "log_level_replica dataloader_num_workers dataloader_prefetch_factor dataloader_pin_memory plan_only push_to_hub "
    "hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision resume_from_checkpoint "
    "push_to private track_forgetting local_rank parallelism_config accelerator_config logging_dir "
    "trackio_space_id".split()
)
