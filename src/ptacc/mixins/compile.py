"""Compiling the model with `torch.compile`."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import field
from typing import get_args

from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.distributed.accelerator import AcceleratorBuilder
from ptacc.errors import OptionError
from ptacc.run.step_result import StepResult
from ptacc.types.aliases import CompileBackend, CompileMode
from ptacc.validation import check_choice

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


class CompileMixin(Mixin):
    """Compiles the model with `torch.compile`: the first batch of each shape is slow, later ones are faster.

    The model is compiled for the run, and restored after it. Checkpoints and exports have the parameter names of the
    original model. Compiled code rounds differently, so results equal those of the original model up to rounding.

    Options:
        compile_backend: The backend of dynamo; None for the setting of the launch, `"inductor"` if it has none.
            `"eager"` and `"aot_eager"` trace the model without generating code. `"inductor"` needs a C++ compiler on a
            CPU, and Triton on a GPU.
        compile_mode: `"default"`, `"reduce-overhead"`, `"max-autotune"` or `"max-autotune-no-cudagraphs"`; None for the
            setting of the launch. The second and the third use CUDA graphs.
        compile_dynamic: Whether to trace sizes as symbols, so that batches of another size are not compiled again; None
            to do so from the second size on.
        compile_fullgraph: Whether a graph break is an error.
        compile_regions: Whether to compile repeated blocks of the model (an `nn.ModuleList` of one class) once, and
            share the code. Compile time is then independent of their number. None for the setting of the launch.

    Hooks: `configure_accelerator`, `resume_invariants`, `around_run`, `on_gradients_ready`.

    Combines with: everything; gradient accumulation only without CUDA graphs.

    Source: https://docs.pytorch.org/docs/stable/torch.compiler.html

    Example:
        >>> from ptacc import CompileMixin, Trainer
        >>> class MyTrainer(CompileMixin, Trainer):
        ...     compile_regions: bool | None = True
    """

    compile_backend: CompileBackend | None = None
    compile_mode: CompileMode | None = None
    compile_dynamic: bool | None = None
    compile_fullgraph: bool | None = None
    compile_regions: bool | None = None
    _has_cuda_graphs: bool = field(init=False, default=False)

    @override
    def check_options(self) -> None:
        owner, otherwise = type(self).__name__, "the setting of the launch"
        check_choice(owner, "compile_backend", self.compile_backend, get_args(CompileBackend), otherwise)
        check_choice(owner, "compile_mode", self.compile_mode, get_args(CompileMode), otherwise)

    @override
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        super().configure_accelerator(builder)
        builder.provide("dynamo")
        builder.write(CompileMixin, dynamo_plugin=self._plugin())

    @override
    def resume_invariants(self) -> dict[str, str]:
        plugin = self._plugin()  # another backend or mode rounds differently
        return {**super().resume_invariants(), "compiled": f"{plugin.backend.value.lower()}, {plugin.mode}"}

    @override
    @contextlib.contextmanager
    def around_run(self) -> Generator[None]:
        plugin = self._plugin()
        self._has_cuda_graphs = plugin.mode in CUDA_GRAPH_MODES or plugin.backend.value == "CUDAGRAPHS"
        if self._has_cuda_graphs and (batches := self._accumulation().largest) > 1:
            raise OptionError(
                f"{type(self).__name__}: backend {plugin.backend.value.lower()!r} in mode {plugin.mode!r} uses CUDA "
                f"graphs, which would overwrite the gradients of earlier batches of a step, and it has "
                f'{batches} batches per step. Use compile_mode="max-autotune-no-cudagraphs", or no '
                "accumulation."
            )
        with super().around_run():
            yield

    @override
    def on_gradients_ready(self, step: StepResult) -> None:
        super().on_gradients_ready(step)
        if self._has_cuda_graphs:  # a loss that the model returns is overwritten by its next forward pass
            step.loss = step.loss.clone()

    def _plugin(self) -> TorchDynamoPlugin:
        plugin = TorchDynamoPlugin(
            backend=self.compile_backend,
            mode=self.compile_mode,
            dynamic=self.compile_dynamic,
            fullgraph=self.compile_fullgraph,
            use_regional_compilation=self.compile_regions,
        )
        if self.compile_backend is None and plugin.backend is DynamoBackend.NO:  # the launch has no setting
            plugin.backend = DynamoBackend.INDUCTOR
        return plugin
