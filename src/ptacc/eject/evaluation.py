"""Fragments of the mixins and callbacks that use the values of epochs and evaluations."""

from __future__ import annotations

from torch import nn

from ptacc.callbacks.restore_best_weights import RestoreBestWeights
from ptacc.eject.fragment import Fragment, Target
from ptacc.eject.literals import Code, literal
from ptacc.mixins.ema import EMAMixin
from ptacc.types.monitor import Monitor, as_monitor
from ptacc.types.progress import Epochs

MAKE_METRICS = '''\
def make_{name}() -> dict[str, Metric]:
    """Return metrics of torchmetrics by name, each of one number{hint}."""
    raise NotImplementedError("write make_{name}")
'''
COMMENT = ["# MetricsMixin: the metrics of each epoch, and of each evaluation."]
PREPARE = "{name} = make_{name}()\nfor metric in {name}.values():\n    metric.to(accelerator.device)"
UPDATE = "for metric in {name}.values():\n    metric.update({outputs}, batch[1])"
COMPUTE = "for name, metric in {name}.items():\n    values[{key}] = metric.compute().item()\n    metric.reset()"


def metrics(target: Target) -> Fragment:
    """Return the fragment of `MetricsMixin`."""
    given = {"metrics": target.option("metrics"), "train_metrics": target.option("train_metrics")}
    evaluates, trains = bool(given["metrics"] or target.trainer is None), bool(given["train_metrics"])
    names = [name for name, is_used in zip(given, (evaluates, trains), strict=True) if is_used]
    hints = {name: f": {', '.join(given[name])}" if given[name] else "" for name in names}
    is_own = any(not isinstance(metric, nn.Module) for name in names for metric in given[name].values())
    return Fragment(
        definitions="\n\n".join(MAKE_METRICS.format(name=name, hint=hints[name]) for name in names),
        notes=("`MetricsMixin`: metrics that are not of torchmetrics are left out.",) if is_own else (),
        prepared="\n".join([*COMMENT[: len(names)], *(PREPARE.format(name=name) for name in names)]),
        parameters="metrics: dict[str, Metric]" if evaluates else "",
        eval_batch=UPDATE.format(name="metrics", outputs="outputs") if evaluates else "",
        eval_end=COMPUTE.format(name="metrics", key="name") if evaluates else "",
        batch_end=UPDATE.format(name="train_metrics", outputs="outputs.detach()") if trains else "",
        values=COMPUTE.format(name="train_metrics", key='f"train/{name}"') if trains else "",
    )


def comparison(name: str, monitor: Monitor, margin: str = "") -> str:
    """Return the source of a comparison of a value with the best one."""
    sign, direction = ("-", "<") if monitor.mode == "min" else ("+", ">")
    return f"values[{literal(monitor.name)}] {direction} {name}" + (f" {sign} {margin}" if margin else "")


def worst(monitor: Monitor) -> str:
    """Return the source of a value that any other one improves on."""
    return "math.inf" if monitor.mode == "min" else "-math.inf"


def early_stopping(target: Target) -> Fragment:
    """Return the fragment of `EarlyStoppingMixin`."""
    monitor = as_monitor(target.option("early_stopping_monitor"), target.option("early_stopping_mode"))
    after, delta = target.option("early_stopping_after"), target.option("early_stopping_min_delta")
    constants: dict[str, object] = {"PATIENCE": target.option("early_stopping_patience")}
    condition = "num_bad >= PATIENCE"
    if delta:
        constants["MIN_DELTA"] = delta
    if after is not None:
        constants["MIN_EPOCHS"] = after.n if isinstance(after, Epochs) else Code("...")
        condition += " and epoch >= MIN_EPOCHS"
    return Fragment(
        constants=constants,
        prepared=f"# EarlyStoppingMixin: stop when {monitor.name} has stopped improving.\n"
        f"best, num_bad = {worst(monitor)}, 0",
        evaluation_end=f"num_bad += 1\nif {comparison('best', monitor, 'MIN_DELTA' if delta else '')}:\n"
        f"    best, num_bad = values[{literal(monitor.name)}], 0",
        stop=f"if {condition}:\n    break",
    )


def restore_best_weights(target: Target, callback: RestoreBestWeights) -> Fragment:
    """Return the fragment of `RestoreBestWeights`."""
    if not callback.restore:
        return Fragment(notes=("`RestoreBestWeights(restore=False)` is left out.",))
    (monitor,) = callback.monitors()
    averages = target.has(EMAMixin)
    evaluated = "average" if averages and target.option("ema_evaluates") else "original"
    return Fragment(
        prepared=f"# RestoreBestWeights: end with the weights of the best {monitor.name}.\n"
        f"best_value, best_weights = {worst(monitor)}, original.state_dict()",
        evaluation_end=f"if {comparison('best_value', monitor)}:\n"
        f"    best_value = values[{literal(monitor.name)}]\n"
        f"    best_weights = copy.deepcopy({evaluated}.state_dict())",
        end="original.load_state_dict(best_weights)" + ("\naverage.load_state_dict(best_weights)" if averages else ""),
    )


def stop_on_non_finite(*_: object) -> Fragment:
    """Return the fragment of `StopOnNonFinite`."""
    return Fragment(
        stop="# StopOnNonFinite: after a NaN, the weights stay NaN.\n"
        'if not math.isfinite(values["train_loss"] + values["eval_loss"]):\n    break',
    )
