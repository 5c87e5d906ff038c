"""The examples, the quality that each of them reaches, and the table of them in the documentation.

`python -m tests.examples.qualities` runs all examples and writes the table, with the quality and the time of each.
"""

import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.ranks import launch
from tests.vision import environment

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guides" / "examples.md"
MARKS = "<!-- table -->\n", "<!-- end of table -->\n"
DEPRECATIONS = "error,ignore::FutureWarning,ignore::DeprecationWarning"
"""DeepSpeed calls what torch has deprecated."""
UNCLOSED = "error,ignore::ResourceWarning"
"""timm leaves closing the files of images to Python."""
CHECKPOINTING = "error,ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
"""peft calls what transformers has deprecated."""


@dataclass(frozen=True)
class Example:
    """An example: the last line that it prints is the name of a quality and its value.

    Args:
        script: The file.
        shows: What it shows.
        least: The least value of the quality, or the largest one if `is_loss`.
        is_loss: Whether a smaller value is better.
        processes: Number of processes that `torchrun` starts; None for Python alone.
        warnings: Which warnings are errors, as `PYTHONWARNINGS` says it.
    """

    script: str
    shows: str
    least: float
    is_loss: bool = False
    processes: int | None = None
    warnings: str = "error"

    @property
    def needs_vision(self) -> bool:
        """Whether it imports timm or torchvision."""
        return self.script.startswith("vision/")


@dataclass(frozen=True)
class Outcome:
    """What an example printed as its quality, and how many seconds it took."""

    name: str
    value: float
    seconds: float


EXAMPLES = [
    Example("classify_digits.py", "`ClassificationTrainer`, images, mixup, a schedule", 0.98),
    Example("tabular.py", "`RegressionTrainer`, a table, the best weights", 0.3),
    Example("segmentation.py", "`SegmentationTrainer`, a class for each pixel", 0.8),
    Example("distillation.py", "`DistillationTrainer`, a small student", 0.94),
    Example("contrastive.py", "`ContrastiveTrainer`, views without labels", 0.94),
    Example("dcgan.py", "`GANTrainer`, averaged weights", 0.35),
    Example("vae.py", "a loop of your own, parts of a loss", 26.0, is_loss=True),
    Example("cross_validation.py", "a trainer for each fold", 0.95),
    Example("char_lm.py", "a transformer of your own, `decay_groups`, generated text", 2.45, is_loss=True),
    Example("sentiment.py", "`SequenceClassificationTrainer`, a tokenizer, a small BERT", 0.97),
    Example("fine_tuning.py", "`FreezeMixin`, `gradual_unfreezing`, batch norms", 0.75),
    Example(
        "lora.py",
        "`CausalLMTrainer`, adapters of peft, `SavePretrained`",
        2.7,
        is_loss=True,
        warnings=CHECKPOINTING,
    ),
    Example("wgan_gp.py", "`GANTrainer`, several updates of the critic, gradient penalty", 0.16, is_loss=True),
    Example("actor_critic.py", "`MultiUpdateLoop`, a stream that depends on the model", 450.0),
    Example("own_mixin.py", "a mixin of your own, `check_mixin`", 0.87),
    Example("own_callback.py", "callbacks of your own, `trainer.stop`", 0.93),
    Example("notebook.ipynb", "tables and figures in a notebook", 0.94, warnings="ignore"),  # of Jupyter's packages
    Example("gather.py", "a metric of your own with `self.gather`, two processes", 0.96, processes=2),
    Example("fsdp.py", "`FSDPMixin`, a transformer, two processes", 0.93, processes=2),
    Example("zero.py", "`DeepSpeedMixin`, ZeRO stage 3, two processes", 0.94, processes=2, warnings=DEPRECATIONS),
    Example("sentence_pairs.py", "`SequenceClassificationTrainer`, BERT, pairs of sentences", 0.95),
    Example(
        "vision/resnet.py",
        "timm: ResNet, loaders, Mixup, losses, optimizer, schedule; averaged weights",
        0.93,
        warnings=UNCLOSED,
    ),
    Example("vision/unfreezing.py", "timm: fine-tuning, stages unfrozen one after another", 0.93, warnings=UNCLOSED),
    Example("vision/resizing.py", "timm and torchvision: larger and larger images", 0.88, warnings=UNCLOSED),
    Example("vision/detection.py", "torchvision: a detector; a metric of your own", 0.8, warnings=UNCLOSED),
]


def command(example: Example) -> list[str]:
    """Return the command that runs an example."""
    script = str(ROOT / "examples" / example.script)
    if example.script.endswith(".ipynb"):
        return [sys.executable, "-m", "tests.examples.notebook", script]
    if example.processes is not None:
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        return [*torchrun, "--standalone", "--nproc-per-node", str(example.processes), script]
    return [sys.executable, *([environment.__file__] if example.needs_vision else []), script]


def run(example: Example, timeout: float = 110.0) -> Outcome:
    """Run an example, and assert that it succeeds without a warning."""
    start = time.perf_counter()
    scripts = Path(sys.executable).parent  # DeepSpeed calls ninja
    env = {"PYTHONWARNINGS": example.warnings, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    if example.processes is not None:
        env["ACCELERATE_USE_CPU"] = "true"
    process = launch(command(example), env=env, timeout=timeout)
    assert process.returncode == 0, process.stderr
    match = re.fullmatch(r"(.+): (-?[\d.]+)", process.stdout.splitlines()[-1])
    assert match is not None, process.stdout
    return Outcome(match[1], float(match[2]), time.perf_counter() - start)


def write_row(example: Example, outcome: Outcome) -> str:
    limit = f"{'≤' if example.is_loss else '≥'} {example.least:g}"
    cells = f"{outcome.name} {outcome.value:g}", limit, f"{outcome.seconds:.0f} s"
    return f"| `{example.script}` | {example.shows} | {' | '.join(cells)} |\n"


def write_table(outcomes: list[Outcome]) -> str:
    head = "| example | shows | quality | tested | time |\n|---|---|---|---|---|\n"
    return head + "".join(write_row(example, outcome) for example, outcome in zip(EXAMPLES, outcomes, strict=True))


if __name__ == "__main__":
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    table = write_table([run(example, timeout=300.0) for example in EXAMPLES])
    PAGE.write_text(f"{before}{MARKS[0]}{table}{MARKS[1]}{after}", encoding="utf-8")
