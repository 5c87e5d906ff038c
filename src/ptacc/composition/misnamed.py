"""Names that were probably meant: near misses of hooks and options, and the hooks of other trainers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def _invert(names: Mapping[str, str]) -> Mapping[str, str]:
    return {other: here for here, others in names.items() for other in others.split()}


# Sources: https://lightning.ai/docs/pytorch/stable/common/lightning_module.html#hooks,
# https://huggingface.co/docs/transformers/main_classes/trainer and
# https://pytorch-accelerated.readthedocs.io/en/latest/trainer.html
METHODS_ELSEWHERE = _invert(
    {
        "train_step": "training_step training_step_end compute_loss calculate_train_batch_loss",
        "eval_step": "validation_step validation_step_end test_step test_step_end prediction_step evaluation_loop "
        "calculate_eval_batch_loss",
        "backward": "backward_step",
        "make_train_dataloader": "train_dataloader get_train_dataloader create_train_dataloader "
        "get_default_train_dl_kwargs _get_train_sampler",
        "make_eval_dataloader": "val_dataloader test_dataloader predict_dataloader get_eval_dataloader "
        "get_test_dataloader create_eval_dataloader get_default_eval_dl_kwargs _get_eval_sampler",
        "all_callbacks": "configure_callbacks",
        "the option `optimizer` or the hook `optimizer_slots`": "configure_optimizers create_optimizer "
        "create_optimizer_and_scheduler get_optimizer_cls_and_kwargs",
        "the option `create_scheduler` of LRSchedulerMixin": "create_scheduler lr_scheduler_step scheduler_step",
        "the option `max_grad_norm` of GradClipMixin or the hook `on_gradients_ready`": "clip_gradients "
        "configure_gradient_clipping",
        "an engine from `make_engine`, or the hooks `on_gradients_ready` and `on_step_end`": "optimizer_step "
        "optimizer_zero_grad",
        "the argument `model`": "configure_model configure_sharded_model",
        "the method `to` of the batch's class": "transfer_batch_to_device _prepare_inputs _prepare_input",
        "a hook of MetricsMixin, which has to be among the bases": "update_metrics",
        "on_run_start": "training_run_start",
        "on_run_end": "training_run_end",
        "on_epoch_start": "train_epoch_start",
        "on_epoch_end": "train_epoch_end training_epoch_end training_run_epoch_end",
        "on_evaluation_start": "eval_epoch_start evaluation_run_start",
        "on_evaluation_end": "eval_epoch_end evaluation_run_end validation_epoch_end test_epoch_end",
    }
)
"""Hooks of other trainers, each with what it is here: the name of a hook, or a description."""
EVENTS_ELSEWHERE = _invert(
    {
        "on_run_start": "on_train_start on_fit_start on_train_begin on_training_run_start",
        "on_run_end": "on_train_end on_fit_end on_training_run_end",
        "on_epoch_start": "on_train_epoch_start on_epoch_begin",
        "on_epoch_end": "on_train_epoch_end on_training_run_epoch_end",
        "on_step_start": "on_train_batch_start on_step_begin on_train_step_start",
        "on_batch_end": "on_train_batch_end on_substep_end on_train_step_end",
        "on_gradients_ready": "on_after_backward on_before_optimizer_step on_pre_optimizer_step",
        "on_step_end": "on_optimizer_step",
        "on_eval_batch_end": "on_validation_batch_end on_test_batch_end on_eval_step_end on_prediction_step",
        "on_evaluation_start": "on_validation_start on_validation_epoch_start on_test_start on_test_epoch_start "
        "on_eval_epoch_start on_evaluation_run_start",
        "on_evaluation_end": "on_validation_end on_validation_epoch_end on_test_end on_test_epoch_end "
        "on_eval_epoch_end on_evaluation_run_end on_evaluate",
        "on_prediction_start": "on_predict_start on_predict_epoch_start",
        "on_prediction_end": "on_predict_end on_predict_epoch_end on_predict",
        "on_save": "on_save_checkpoint",
        "on_load": "on_load_checkpoint",
        "on_exception": "on_stop_training_error",
    }
)
"""Events of other trainers, each with its name here."""


MIN_LETTERS = 8
"""Shorter names have neighbours that are words of their own, such as `seed` and `seen`."""


def find_near_miss(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that differs from `name` by one typing error, in case or in underscores; None without.

    A typing error is a letter too many, too few or another, or two letters in the wrong order.

    Example:
        >>> find_near_miss("train_setp", ["train_step"]), find_near_miss("shouldStop", ["should_stop"])
        ('train_step', 'should_stop')
        >>> find_near_miss("pretrain_step", ["train_step"]) is None
        True
    """
    if name.startswith("_"):
        return None
    long = (other for other in sorted(known) if len(_letters(other)) >= MIN_LETTERS and other != name)
    return next((other for other in long if _is_near(_letters(name), _letters(other))), None)


def _letters(name: str) -> str:
    return name.replace("_", "").lower()


def _is_near(first: str, second: str) -> bool:
    shorter, longer = sorted((first, second), key=len)
    if len(shorter) < len(longer):
        return any(longer[:i] + longer[i + 1 :] == shorter for i in range(len(longer)))
    wrong = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    is_swap = len(wrong) == 2 and wrong[1] == wrong[0] + 1 and sorted(first) == sorted(second)
    return len(wrong) <= 1 or is_swap
