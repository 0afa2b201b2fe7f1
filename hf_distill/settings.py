"""How settings are declared and read, and which of them make a run what it is. Imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Any

from .errors import InputError


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


def parse_yaml(text: str, where: str) -> Any:
    """What YAML (or JSON) says; doubled keys are refused, and 2e-5 is a number, as in YAML 1.2.

    Raises:
        InputError: If it cannot be read, naming `where`.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """With the two differences."""

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        doubled = next((key for key in keys if keys.count(key) > 1), None)
        if doubled is not None:
            raise InputError(
                f"{doubled!r} stands there twice",
                where=f"{where}, line {node.start_mark.line + 1}",
                cure="Rename or remove one of the two",
            )
        loader.flatten_mapping(node)
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise InputError(f"not readable as YAML: {' '.join(str(error).split())}", where=where) from error
