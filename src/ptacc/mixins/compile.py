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
    """Runs the model as `torch.compile` makes it: slow at the first batch of each shape, and faster from then on.

    A run compiles what it calls, and gives the model back as it was; checkpoints and exports have the names of the bare
    model. What a compiler makes of a model rounds differently: numbers agree with those of the bare one but for that.

    Options:
        compile_backend: Of dynamo; None for what the launch says, which is `"inductor"` if it says nothing. `"eager"`
            and `"aot_eager"` compile nothing, and show whether a model can be traced. `"inductor"` needs a C++
            compiler on a CPU, and Triton on a GPU.
        compile_mode: `"default"`, `"reduce-overhead"` or `"max-autotune"`; None for what the launch says.
        compile_dynamic: Whether to trace sizes as symbols, so that batches of another size need no new compilation;
            None to do so from the second size on.
        compile_fullgraph: Whether a model that falls into several graphs is an error.
        compile_regions: Whether to compile the repeated blocks of a model (`nn.ModuleList` of one class) one by one,
            with the same code for each: there is no more to compile for more of them. None for what the launch says.

    Hooks: `configure_accelerator`, `resume_invariants`.

    Combines with: everything. The wrapper of several processes is compiled with the model.

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
        """Refuse a backend and a mode that are none."""
        owner, otherwise = type(self).__name__, "what the launch says"
        check_choice(owner, "compile_backend", self.compile_backend, get_args(CompileBackend), otherwise)
        check_choice(owner, "compile_mode", self.compile_mode, get_args(CompileMode), otherwise)

    @override
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        """Set how the accelerator compiles."""
        super().configure_accelerator(builder)
        builder.provide("dynamo")
        builder.write(CompileMixin, dynamo_plugin=self._plugin())

    @override
    def resume_invariants(self) -> dict[str, str]:
        """Compile in one way: another rounds differently."""
        plugin = self._plugin()
        return {**super().resume_invariants(), "compiled": f"{plugin.backend.value.lower()}, {plugin.mode}"}

    def _plugin(self) -> TorchDynamoPlugin:
        plugin = TorchDynamoPlugin(
            backend=self.compile_backend,
            mode=self.compile_mode,
            dynamic=self.compile_dynamic,
            fullgraph=self.compile_fullgraph,
            use_regional_compilation=self.compile_regions,
        )
        if self.compile_backend is None and plugin.backend is DynamoBackend.NO:  # what a launch says that says nothing
            plugin.backend = DynamoBackend.INDUCTOR
        return plugin
