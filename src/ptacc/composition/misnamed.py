"""Names that were probably meant: near misses of hooks and options, and the names of other trainers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping


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
ATTRIBUTES_ELSEWHERE = _invert(
    {
        "`train(train_dataset, eval_dataset, num_epochs=...)`": "fit fit_one_cycle run_training partial_fit",
        "`evaluate(dataset)`": "validate test run_evaluation eval score",
        "`predict(dataset)`": "run_prediction predict_proba",
        "`save_checkpoint(path)` of CheckpointMixin, and for the weights alone "
        "`torch.save(trainer.unwrapped_model.state_dict(), path)`": "save save_model save_state save_pretrained",
        "`load_checkpoint(path)` of CheckpointMixin, and for the weights alone "
        "`trainer.unwrapped_model.load_state_dict(...)`": "load load_model load_state load_from_checkpoint",
        "the option `loss_func`, or the hooks `compute_train_loss` and `compute_eval_loss`": "compute_loss criterion "
        "loss_fn",
        "`log(values)`": "log_metrics log_dict save_metrics",
        "the option `callbacks`": "add_callback add_callbacks register_callback",
        "`progress`": "state current_epoch global_step epoch step iteration",
        "`history`": "run_history log_history logged_metrics callback_metrics",
        "`unwrapped_model`": "get_model unwrap_model module",
        "`distributed.is_main`": "is_global_zero is_world_process_zero is_local_process_zero is_main_process",
        "`find_learning_rate(trainer, dataset)` of ptacc.tuning": "lr_find find_lr tune",
        "`find_batch_size(trainer, dataset, ...)` of ptacc.tuning": "scale_batch_size",
    }
)
"""Attributes of other trainers, each with a description of what it is here."""
OPTIONS_ELSEWHERE = _invert(
    {
        "`loss_func=...`": "loss criterion loss_fn loss_function compute_loss_func",
        "`optimizer=...`": "optimizers optim optimizer_class",
        "`train(..., num_epochs=...)`": "epochs num_epochs max_epochs n_epochs num_train_epochs",
        "`train(..., max_steps=...)`": "max_steps steps num_steps",
        "`train(train_dataset, eval_dataset, ...)`": "train_dataset eval_dataset val_dataset train_loader val_loader "
        "train_dataloader val_dataloader train_dataloaders dataset dataloader datamodule train_data val_data",
        "`train(..., per_device_batch_size=...)`": "batch_size per_device_batch_size per_device_train_batch_size",
        "`train(..., collate_fn=...)`": "collate_fn data_collator",
        "an argument of the optimizer, `SGD(model.parameters(), lr=...)`": "lr learning_rate weight_decay momentum",
        "`create_scheduler=...` of LRSchedulerMixin": "scheduler lr_scheduler lr_scheduler_type",
        "`mixed_precision=...` of AMPMixin": "precision fp16 bf16 amp",
        "`max_grad_norm=...` of GradClipMixin": "gradient_clip_val clip_grad_norm grad_clip",
        "`gradient_accumulation_steps=...` of GradAccumMixin": "accumulate_grad_batches grad_accum",
        "`checkpoint_dir=...` of CheckpointMixin": "output_dir default_root_dir save_dir run_dir",
        "`metrics=...` of MetricsMixin": "compute_metrics",
        "keywords of this constructor and of `train`": "args training_args config",
        "an option of `accelerate launch`": "device devices accelerator strategy num_nodes gpus",
    }
)
"""Options of other trainers, each with a description of what it is here."""


def suggest_option(names: Iterable[str]) -> str:
    """Return a text with what an option of another trainer is here; empty for other names.

    Example:
        >>> suggest_option(["epochs"])
        'Here it is `train(..., num_epochs=...)`.'
    """
    return next((f"Here it is {OPTIONS_ELSEWHERE[name]}." for name in names if name in OPTIONS_ELSEWHERE), "")


def suggest_argument(names: Collection[str], trainer: type) -> str:
    """Return a text with what an argument that `train()` does not have is instead; empty for other names.

    Example:
        >>> suggest_argument({"lr"}, object)
        'Here it is an argument of the optimizer, `SGD(model.parameters(), lr=...)`.'
    """
    for name in sorted(names):
        if name in getattr(trainer, "__dataclass_fields__", {}):
            return f"It is an option: {trainer.__name__}(..., {name}=...)."
    return suggest_option(name for name in sorted(names) if not OPTIONS_ELSEWHERE.get(name, "").startswith("`train("))


def suggest_attribute(name: str) -> str:
    """Return a text with what an attribute or a hook of another trainer is here; empty for other names.

    Example:
        >>> suggest_attribute("fit"), suggest_attribute("training_step")
        ('Here it is `train(train_dataset, eval_dataset, num_epochs=...)`.', 'Here it is `train_step`.')
    """
    here = ATTRIBUTES_ELSEWHERE.get(name) or METHODS_ELSEWHERE.get(name, "")
    return f"Here it is {f'`{here}`' if here.isidentifier() else here}." if here else ""


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
