"""Fragments of the mixins and callbacks that use the values of epochs and evaluations."""

from __future__ import annotations

from typing import Any

from ptacc.callbacks.restore_best_weights import RestoreBestWeights
from ptacc.eject.fragment import Fragment, Target
from ptacc.eject.literals import Code, literal
from ptacc.mixins.ema import EMAMixin
from ptacc.types.monitor import Monitor, as_monitor
from ptacc.types.progress import Epochs

MAKE_METRICS = '''\
def {function}() -> dict[str, Metric]:
    """Return metrics of torchmetrics by name, each of one number{hint}."""
    raise NotImplementedError("write {function}")
'''


def metrics(target: Target) -> Fragment:
    """Return the fragment of `MetricsMixin`."""
    given, of_training = target.option("metrics"), target.option("train_metrics")
    definitions, prepared = [], []
    if given or target.trainer is None:
        definitions.append(MAKE_METRICS.format(function="make_metrics", hint=describe(given)))
        prepared += ["metrics = make_metrics()", "for metric in metrics.values():\n    metric.to(accelerator.device)"]
    if of_training:
        definitions.append(MAKE_METRICS.format(function="make_train_metrics", hint=describe(of_training)))
        prepared += [
            "train_metrics = make_train_metrics()",
            "for metric in train_metrics.values():\n    metric.to(accelerator.device)",
        ]
    has_eval = "metrics = make_metrics()" in prepared
    update = "for metric in {}.values():\n    metric.update({}, batch[1])"
    if not definitions:
        return Fragment()
    return Fragment(
        definitions="\n\n".join(definitions),
        prepared="\n".join(["# MetricsMixin: metrics of evaluations and epochs.", *prepared]),
        parameters="metrics: dict[str, Metric]" if has_eval else "",
        eval_batch=update.format("metrics", "outputs") if has_eval else "",
        eval_end=(
            "for name, metric in metrics.items():\n    values[name] = metric.compute().item()\n    metric.reset()"
            if has_eval
            else ""
        ),
        batch_end=update.format("train_metrics", "outputs.detach()") if of_training else "",
        values=(
            "for name, metric in train_metrics.items():\n"
            '    values[f"train/{name}"] = metric.compute().item()\n    metric.reset()'
            if of_training
            else ""
        ),
    )


def describe(given: Any) -> str:
    """Return a text about the metrics of a trainer."""
    return "" if not given else f": {', '.join(given)}"


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
