"""Checks that a launch, its settings and its number of processes, agrees with the options of the trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import LaunchError

LAUNCH_OPTIONS = {
    "FSDP_RESHARD_AFTER_FORWARD": "fsdp_reshard_after_forward",
    "FSDP_OFFLOAD_PARAMS": "fsdp_cpu_offload",
    "FSDP_ACTIVATION_CHECKPOINTING": "gradient_checkpointing",
}
"""Variables of a launch with their options, which have to agree."""
CHECKED_OPTIONS = ("fsdp_wrap", *LAUNCH_OPTIONS.values())
"""The options that are compared with the launch."""


def check_launch(owner: str, options: Mapping[str, object]) -> None:
    """Raise `LaunchError` if the launch sets something for FSDP that the trainer does not do.

    `options` are the trainer's `CHECKED_OPTIONS` by name; empty tuples for those that it lacks.
    """
    if os.environ.get("FSDP_VERSION") == "1":
        raise LaunchError(
            f"The launch asks for FSDP of version 1, and {owner} shards by version 2. Set `fsdp_version: 2` in the "
            "launch's configuration."
        )
    for variable, option in LAUNCH_OPTIONS.items():
        value, launched = options[option], os.environ.get(variable, "").lower()
        if launched in ({"false", "0", "no_reshard"} if value else {"true", "1", "full_shard", "shard_grad_op"}):
            raise LaunchError(
                f"The launch sets {variable}={launched}, and {owner} has {option}={value!r}. Make both agree."
            )
    is_sized = os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP"
    if options["fsdp_wrap"] is None and (is_sized or os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")):
        raise LaunchError(
            f"The launch sets the units of FSDP, which {owner} takes from its options. Pass them: fsdp_wrap=[...], or "
            "leave them out of the launch's configuration."
        )
    if os.environ.get("FSDP_IGNORED_MODULES"):
        raise LaunchError(f"The launch sets FSDP_IGNORED_MODULES, and {owner} shards every module. Leave it out.")


def check_replicas(owner: str, ranks: DistributedRuntime, replicas: int, *, can_shard: bool) -> None:
    """Raise `LaunchError` if replicas of the model cannot be sharded into so many replicas of the shards."""
    if ranks.replicas > 1 and not can_shard:
        raise LaunchError(
            f"{owner}: {ranks.replica_size} processes share a replica of the model, and {ranks.world_size} were "
            f"launched: {ranks.replicas} replicas, and no mixin shards those. Compose FSDPMixin as well, or launch "
            "fewer processes."
        )
    if replicas > 1 and ranks.replica_size > 1:
        raise LaunchError(
            f"{owner}(fsdp_replicas={replicas}): {ranks.replica_size} processes share a replica of the model by tensor "
            "parallelism, with which replicas of the shards are not supported. Leave fsdp_replicas out."
        )
    if ranks.replicas % replicas:
        raise LaunchError(
            f"{owner}(fsdp_replicas={replicas}): {ranks.replicas} processes take batches of their own, which is not a "
            "multiple of it. Launch another number of processes, or choose a divisor."
        )
