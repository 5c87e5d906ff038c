"""Compiling the model with `torch.compile`."""

from __future__ import annotations

from typing import get_args

from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.distributed.accelerator import AcceleratorBuilder
from ptacc.types.aliases import CompileBackend, CompileMode
from ptacc.validation import check_choice


class CompileMixin(Mixin):
    """Compiles the model with `torch.compile`: the first batch of each shape is slow, later ones are faster.

    The model is compiled for the run, and restored after it. Checkpoints and exports have the parameter names of the
    original model. Compiled code rounds differently, so results equal those of the original model up to rounding.

    Options:
        compile_backend: The backend of dynamo; None for the setting of the launch, `"inductor"` if it has none.
            `"eager"` and `"aot_eager"` trace the model without generating code. `"inductor"` needs a C++ compiler on a
            CPU, and Triton on a GPU.
        compile_mode: `"default"`, `"reduce-overhead"` or `"max-autotune"`; None for the setting of the launch.
        compile_dynamic: Whether to trace sizes as symbols, so that batches of another size are not compiled again; None
            to do so from the second size on.
        compile_fullgraph: Whether a graph break is an error.
        compile_regions: Whether to compile repeated blocks of the model (an `nn.ModuleList` of one class) once, and
            share the code. Compile time is then independent of their number. None for the setting of the launch.

    Hooks: `configure_accelerator`, `resume_invariants`.

    Combines with: everything. With several processes, the DDP wrapper is compiled with the model.

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
