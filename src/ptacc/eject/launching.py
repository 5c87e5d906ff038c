"""Fragments of the mixins that set up the process, the accelerator and the model."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import indent

from ptacc.eject.fragment import Fragment, Target
from ptacc.eject.literals import Code, literal
from ptacc.mixins.ema import EMAMixin
from ptacc.mixins.engines.ddp import DDPMixin
from ptacc.model.selection import select_submodules
from ptacc.types.progress import Steps

SEED_PROCESS = '''\
def seed_process(seed: int, rank: int) -> None:
    """Seed the generators of a process by a hash of the seed and its rank."""
    digest = hashlib.blake2b(struct.pack("<2q", seed, rank), digest_size=8).digest()
    own_seed = int.from_bytes(digest, "little") >> 1
    random.seed(own_seed)
    np.random.seed(own_seed % 2**32)
    torch.manual_seed(own_seed)
'''


def seed(target: Target) -> Fragment:
    """Return the fragment of `SeedMixin`."""
    value, is_deterministic = target.option("seed"), target.option("deterministic")
    lines = [] if value is None else ["seed_process(SEED, accelerator.process_index)"]
    if is_deterministic:
        lines += ["torch.use_deterministic_algorithms(True)", "torch.backends.cudnn.benchmark = False"]
    if lines:
        lines.insert(0, "# SeedMixin: a run can be repeated.")
    return Fragment(
        constants={} if value is None else {"SEED": value},
        definitions="" if value is None else SEED_PROCESS,
        start="\n".join(lines),
    )


def amp(target: Target) -> Fragment:
    """Return the fragment of `AMPMixin`."""
    precision = target.option("mixed_precision")
    if precision is None:  # as the launch sets it
        return Fragment()
    return Fragment(
        constants={"MIXED_PRECISION": precision},
        accelerator=("mixed_precision=MIXED_PRECISION",),
    )


def ddp(target: Target) -> Fragment:
    """Return the fragment of `DDPMixin`."""
    names = ("ddp_find_unused_parameters", "ddp_static_graph", "ddp_gradient_as_bucket_view", "ddp_bucket_cap_mb")
    values = {name: target.option(name) for name in names}
    changed = {name: value for name, value in values.items() if value != getattr(DDPMixin, name)}
    given = {name.removeprefix("ddp_"): value for name, value in changed.items()}
    if (compression := target.option("ddp_comm_hook")) is not None:
        given["comm_hook"] = Code(f"DDPCommunicationHookType({literal(compression)})")
    handler = f"DistributedDataParallelKwargs(\n{keywords(given)})"
    text = f"# DDPMixin: settings of torch's DistributedDataParallel.\nkwargs_handlers=[\n{indent(handler, '    ')},\n]"
    return Fragment(accelerator=(text,) if given else ())


def compiled(target: Target) -> Fragment:
    """Return the fragment of `CompileMixin`."""
    options = {
        "backend": target.option("compile_backend") or "inductor",
        "mode": target.option("compile_mode"),
        "dynamic": target.option("compile_dynamic"),
        "fullgraph": target.option("compile_fullgraph"),
        "use_regional_compilation": target.option("compile_regions"),
    }
    given = {name: value for name, value in options.items() if value is not None}
    return Fragment(
        accelerator=(f"# CompileMixin: the model is compiled.\ndynamo_plugin=TorchDynamoPlugin(\n{keywords(given)})",),
    )


def keywords(values: Mapping[str, object]) -> str:
    """Return the source of keyword arguments, one a line."""
    return "".join(f"    {name}={literal(value)},\n" for name, value in values.items())


def sync_batch_norm(target: Target) -> Fragment:
    """Return the fragment of `SyncBatchNormMixin`."""
    if not target.option("sync_batch_norm"):
        return Fragment()
    return Fragment(
        notes=("`SyncBatchNormMixin`: torch's SyncBatchNorm is used, which needs GPUs, and rounds differently.",),
        start=(
            "# SyncBatchNormMixin: statistics over the batches of all processes.\n"
            "if accelerator.num_processes > 1:\n"
            "    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)"
        ),
    )


def grad_checkpoint(target: Target) -> Fragment:
    """Return the fragment of `GradCheckpointMixin`."""
    selectors = target.option("gradient_checkpointing")
    if not selectors:
        return Fragment()
    names: object = Code("...")  # which modules it selects depends on the model
    if target.trainer is not None:
        model = target.trainer.unwrapped_model
        chosen = select_submodules(model, selectors, "gradient_checkpointing")
        names = [name for name, module in model.named_modules() if module in chosen]
    return Fragment(
        constants={"CHECKPOINTED": names},
        notes=("`GradCheckpointMixin`: batch norms in these modules update their running statistics twice.",),
        start="# GradCheckpointMixin: less memory, for a second forward pass.\n"
        "for name in CHECKPOINTED:\n"
        "    module = model.get_submodule(name)\n"
        "    module.forward = partial(checkpoint, module.forward, use_reentrant=False)",
    )


FREEZE = '''\
def freeze(model: nn.Module) -> None:
    """Freeze the parameters that `FROZEN` names. Their norm layers are in eval mode."""
    for name, parameter in model.named_parameters():
        if any(fits(name, pattern) for pattern in FROZEN):
            parameter.requires_grad_(False)
    freeze_norms(model)
'''
FREEZE_UNTIL = '''\
def freeze(model: nn.Module, epochs: int, steps: int) -> None:
    """Freeze parameters, each until one of its times: completed epochs, or steps."""
    done = {"epochs": epochs, "steps": steps}
    for name, parameter in model.named_parameters():
        times = [time for pattern, time in UNFREEZE_AT.items() if fits(name, pattern)]
        if times or any(fits(name, pattern) for pattern in FROZEN):
            parameter.requires_grad_(any(done[unit] >= n for n, unit in times))
    freeze_norms(model)
'''
FREEZE_NORMS = '''\
def freeze_norms(model: nn.Module) -> None:
    """Put the norm layers of which all parameters are frozen in eval mode."""
    for module in model.modules():
        if isinstance(module, _NormBase) and list(module.parameters()):
            module.train(any(p.requires_grad for p in module.parameters()))


def fits(name: str, pattern: str) -> bool:
    """Return whether a pattern names a parameter, or a module that contains it."""
    return fnmatch(name, pattern) or fnmatch(name, f"{pattern}.*")
'''


def freezing(target: Target) -> Fragment:
    """Return the fragment of `FreezeMixin`."""
    frozen, unfreeze_at = target.option("frozen"), target.option("unfreeze_at")
    if not frozen and not unfreeze_at:
        return Fragment()
    times = {name: (time.n, "steps" if isinstance(time, Steps) else "epochs") for name, time in unfreeze_at.items()}
    counts_steps = any(isinstance(time, Steps) for time in unfreeze_at.values())
    step = "step" if counts_steps else "0"
    again = f"freeze(original, epoch - 1, {step})" if times else "freeze_norms(original)"
    return Fragment(
        constants={"FROZEN": list(frozen), **({"UNFREEZE_AT": times} if times else {})},
        definitions=f"{FREEZE_UNTIL if times else FREEZE}\n\n{FREEZE_NORMS}",
        notes=("`FreezeMixin`: on several processes, DistributedDataParallel cannot unfreeze.",) if times else (),
        start=f"# FreezeMixin: frozen parameters are not trained.\nfreeze(model{', 0, 0' if times else ''})"
        + ("\nstep = 0" if counts_steps else ""),
        epoch_start=again,
        step_end=f"step += 1\n{again}" if counts_steps else "",
    )


UPDATE_AVERAGE = '''\
@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, weight: float) -> None:
    """Move averages towards the weights and buffers of a model. Integers are copied."""
    present = model.state_dict()
    for name, mean in average.state_dict().items():
        value = present[name]
        if value.is_floating_point() or value.is_complex():
            mean.lerp_(value, weight)
        else:
            mean.copy_(value)
'''


def ema(target: Target) -> Fragment:
    """Return the fragment of `EMAMixin`."""
    is_evaluated = target.option("ema_evaluates")
    what = ", which evaluations use" if is_evaluated else ""
    evaluated = "evaluated = accelerator.prepare_model(average, evaluation_mode=True)"
    return Fragment(
        constants={"EMA_DECAY": target.option("ema_decay")},
        definitions=UPDATE_AVERAGE,
        notes=("`EMAMixin`: averages have the dtype of the weights, and infinite entries of buffers become NaN.",),
        start=f"# EMAMixin: an average of the weights{what}.\naverage = copy.deepcopy(model)",
        prepared=evaluated if is_evaluated else "average.to(accelerator.device)",
        step_end="update_average(average, original, 1 - EMA_DECAY)",
    )


def swa(target: Target) -> Fragment:
    """Return the fragment of `SWAMixin`."""
    start = target.option("swa_start")
    if start is None:
        return Fragment()
    end = ["original.load_state_dict(swa_average.state_dict())"]
    if target.option("swa_updates_batch_norm"):
        end.append("update_bn(train_loader, original)")
    if target.has(EMAMixin):
        end.append("average.load_state_dict(original.state_dict())")
    return Fragment(
        constants={"SWA_START": start},
        definitions=UPDATE_AVERAGE,
        notes=(
            "`SWAMixin`: averages have the dtype of the weights, and infinite entries of buffers become NaN.",
            "`update_bn` calls the model with the first part of a batch, and updates frozen norm layers, too.",
        ),
        start="# SWAMixin: the run ends with the mean of the weights of the last epochs.\n"
        "swa_average, num_averaged = copy.deepcopy(model), 0",
        prepared="swa_average.to(accelerator.device)",
        epoch_end="if epoch >= SWA_START:\n    num_averaged += 1\n"
        "    update_average(swa_average, original, 1 / num_averaged)",
        end="if num_averaged:\n" + indent("\n".join(end), "    "),
    )
