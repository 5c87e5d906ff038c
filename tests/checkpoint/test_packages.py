"""Every metric of torchmetrics resumes from a checkpoint with the same state and value, or is refused by name."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torchmetrics import MeanMetric, MeanSquaredError, Metric, MetricCollection, MetricTracker, SumMetric
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio
from typing_extensions import override

from ptacc.errors import CheckpointError
from ptacc.metrics.state import MetricStates
from tests.checkpoint.test_parts import through_files

# torchmetrics warns of memory, of names that will go, and of inputs that say little.
pytestmark = pytest.mark.filterwarnings("ignore")


def shipped() -> dict[str, Any]:
    """Return every metric in torchmetrics, exported or not."""
    modules = [each.name for each in pkgutil.walk_packages(torchmetrics.__path__, "torchmetrics.")]
    names = [name for name in modules if not {"functional", "utilities"} & set(name.split("."))]
    members = [member for name in names for member in vars(importlib.import_module(name)).values()]
    kinds = [member for member in members if is_tried(member)]
    return {f"{kind.__module__}.{kind.__name__}".removeprefix("torchmetrics."): kind for kind in kinds}


def is_tried(value: object) -> bool:
    if not isinstance(value, type) or inspect.isabstract(value) or value.__name__ == "_ClassificationTaskWrapper":
        return False  # abstract, without abstract methods
    return issubclass(value, Metric | MetricCollection | MetricTracker)


# ---- inputs of metrics: by name, by prefix of the name, by domain

rand, randn = torch.rand, torch.randn
WORDS = ["the", "small", "cat", "and", "a", "big", "dog", "sat", "on", "one", "mat"]


def ints(stop: int, *shape: int) -> Tensor:
    return torch.randint(stop, shape)


def texts() -> tuple[list[str], list[str]]:
    wanted = WORDS[: 5 + int(ints(6))]
    return [" ".join("mouse" if rand(()) < 0.1 else word for word in wanted)], [" ".join(wanted)]


def references() -> tuple[list[str], list[list[str]]]:
    found, wanted = texts()
    return found, [[text, text.upper()] for text in wanted]


def answers() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    found, wanted = texts()
    return [{"prediction_text": found[0], "id": "1"}], [{"answers": {"answer_start": [1], "text": wanted}, "id": "1"}]


def boxes() -> list[list[dict[str, Tensor]]]:
    corners = 20 * rand(3, 2)
    found = [torch.cat([corners, corners + 5 + 5 * rand(3, 2)], dim=1) for _ in range(2)]
    return [[{"boxes": box, "labels": torch.arange(3) % 2, "scores": rand(3)}] for box in found]


def panorama() -> tuple[Tensor, Tensor]:
    kinds = ints(3, 1, 8, 1, 1).expand(1, 8, 8, 1)
    seen = torch.where(rand(1, 8, 8, 1) < 0.2, 2, kinds)
    return torch.cat([seen, 0 * seen], dim=-1), torch.cat([kinds, 0 * kinds], dim=-1)


def sharpened() -> tuple[Tensor, dict[str, Tensor]]:
    return rand(2, 4, 32, 32), {"ms": rand(2, 4, 16, 16), "pan": rand(2, 4, 32, 32), "pan_lr": rand(2, 4, 16, 16)}


def pictures() -> tuple[Tensor, bool]:
    return ints(255, 6, 3, 2, 2).byte(), torch.initial_seed() % 2 == 0  # real and generated ones, in turn


GIVEN: list[tuple[str, Callable[[], Any]]] = [
    ("aggregation CompositionalMetric", lambda: (rand(4),)),
    ("audio", lambda: randn(2, 2, 2, 400)),
    ("classification MetricCollection ClasswiseWrapper", lambda: (rand(12, 3).softmax(-1), ints(3, 12))),
    ("clustering nominal", lambda: ints(3, 2, 13)),
    ("detection", boxes),
    ("image VideoMultiMethodAssessmentFusion", lambda: rand(2, 2, 3, 24, 24)),
    ("regression wrappers MetricTracker", lambda: rand(2, 12)),
    ("retrieval", lambda: (rand(24), (rand(24) < 0.3).long(), ints(8, 24))),
    ("segmentation", lambda: ints(2, 2, 2, 3, 8, 8)),
    ("shape LipVertexError", lambda: rand(2, 2, 10, 3)),
    ("text multimodal", texts),
    ("Binary", lambda: (rand(12), ints(2, 12))),
    ("Multilabel", lambda: (rand(12, 3), ints(2, 12, 3))),
    ("BLEUScore CHRFScore ExtendedEditDistance SacreBLEUScore TranslationEditRate", references),
    ("BinaryFairness BinaryGroupStatRates", lambda: (rand(12), ints(2, 12), ints(2, 12))),
    ("CalinskiHarabaszScore DaviesBouldinScore DunnIndex", lambda: (rand(12, 2), ints(3, 12))),
    ("ComplexScaleInvariantSignalNoiseRatio", lambda: rand(2, 1, 9, 10, 2)),
    ("ContinuousRankedProbabilityScore", lambda: (rand(12, 5), rand(12))),
    ("CosineSimilarity MultioutputWrapper", lambda: rand(2, 12, 2)),
    ("ExactMatch MulticlassExactMatch", lambda: ints(3, 2, 12, 2)),
    ("FleissKappa", lambda: (ints(5, 12, 4),)),
    ("FrechetInceptionDistance MemorizationInformedFrechetInceptionDistance", pictures),
    ("KernelInceptionDistance FeatureShare", pictures),
    ("InceptionScore", lambda: pictures()[:1]),
    ("JensenShannonDivergence KLDivergence", lambda: rand(2, 12, 3).softmax(-1)),
    ("MultitaskWrapper", lambda: ({"a": rand(12)}, {"a": rand(12)})),
    ("PanopticQuality ModifiedPanopticQuality", panorama),
    ("PeakSignalNoiseRatioWithBlockedEffect", lambda: rand(2, 2, 1, 16, 16)),
    ("Perplexity", lambda: (rand(2, 8, 5), ints(5, 2, 8))),
    ("SpatialDistortionIndex QualityWithNoReference", sharpened),
    ("PerceptualEvaluationSpeechQuality ShortTimeObjectiveIntelligibility", lambda: randn(2, 16000)),
    ("SpeechReverberationModulationEnergyRatio", lambda: (randn(16000),)),
    ("SQuAD", answers),
    ("TotalVariation", lambda: (rand(2, 3, 24, 24),)),
    ("VisualInformationFidelity", lambda: rand(2, 2, 3, 48, 48)),
]
BY_NAME = {name: give for names, give in GIVEN for name in names.split()}


def data_for(name: str) -> Callable[[], Any]:
    domain, *_, kind = name.replace("._", ".").split(".")
    beginnings = [prefix for prefix in ("Binary", "Multilabel") if kind.startswith(prefix)]
    return next(BY_NAME[key] for key in (kind, *beginnings, domain) if key in BY_NAME)


# ---- arguments of metrics: by required parameter, and by name


class Features(nn.Module):
    """A network with a buffer that it changes."""

    num_features = 4
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(12, 4)
        self.register_buffer("calls", torch.ones(()))

    @override
    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        features: Tensor = self.linear(images.flatten(1) / 255) / self.calls
        return features.detach()


def arguments() -> dict[str, Any]:
    """Return a value for each parameter that has no default."""
    rates = dict.fromkeys(("beta", "min_precision", "min_recall", "min_sensitivity", "min_specificity"), 0.5)
    sizes = {"fs": 16000, "num_classes": 3, "num_groups": 2, "num_labels": 3, "num_outputs": 2, "p": 3}
    parts = {"metric_a": MeanMetric(), "metric_b": SumMetric(), "metric": MulticlassAccuracy(3, average=None)}
    wrapped = {"base_metric": MeanSquaredError(), "wrapped_metric": MeanSquaredError()}
    tasks = {"task_metrics": {"a": MetricCollection([MeanSquaredError()])}}
    chosen = {"data_range": 1.0, "threshold": 0.5, "mode": "wb", "personalized": False, "task": "multiclass"}
    sets = {"things": {0, 1}, "stuffs": {2}, "mouth_map": [0, 1, 2]}
    functions = {"metric_func": scale_invariant_signal_distortion_ratio, "operator": torch.add}
    base = {"fn": "sum", "default_value": torch.tensor(0.0)}
    return rates | sizes | parts | wrapped | tasks | chosen | sets | functions | base


SHARING = ("image.fid.FrechetInceptionDistance", "image.kid.KernelInceptionDistance")
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "BinaryTargetTransformer": lambda: {"wrapped_metric": BinaryAccuracy()},
    "FeatureShare": lambda: {"metrics": [make(name) for name in SHARING]},
    "FrechetInceptionDistance": lambda: {"feature": Features()},
    "InceptionScore": lambda: {"feature": Features(), "splits": 2},
    "KernelInceptionDistance": lambda: {"feature": Features(), "subsets": 3, "subset_size": 4},
    "MemorizationInformedFrechetInceptionDistance": lambda: {"feature": Features()},
    "MetricCollection": lambda: {"metrics": {"a": MulticlassAccuracy(3), "b": MulticlassAccuracy(3, 2)}},
    "MetricTracker": lambda: {"metric": MeanSquaredError()},
    "MultiScaleStructuralSimilarityIndexMeasure": lambda: {"kernel_size": 3, "betas": (0.5, 0.5)},
    "RetrievalFallOut": lambda: {"top_k": 2},
    "RetrievalHitRate": lambda: {"top_k": 1},
    "RetrievalRecall": lambda: {"top_k": 2},
    "ROUGEScore": lambda: {"rouge_keys": ("rouge1", "rougeL")},
}


def make(name: str) -> Any:
    kind, given = SHIPPED[name], arguments()
    asked = {key: each.default is each.empty for key, each in inspect.signature(kind).parameters.items()}
    needed = {key: given[key] for key in asked.keys() & given if asked[key] or key == "num_classes"}
    return kind(**needed | OPTIONS.get(kind.__name__.removeprefix("_"), dict)())


# ---- missing packages: a star marks metrics that also download weights

MISSING = {
    "gammatone": "SpeechReverberationModulationEnergyRatio",
    "librosa": "DeepNoiseSuppressionMeanOpinionScore* NonIntrusiveSpeechQualityAssessment*",
    "pesq": "PerceptualEvaluationSpeechQuality",
    "pycocotools": "MeanAveragePrecision",
    "pystoi": "ShortTimeObjectiveIntelligibility",
    "torch_linear_assignment": "ClusterAccuracy",
    "torchaudio": "SpeechReverberationModulationEnergyRatio",
    "torchvision": "ARNIQA* CompleteIntersectionOverUnion DeepImageStructureAndTextureSimilarity* "
    "DistanceIntersectionOverUnion GeneralizedIntersectionOverUnion IntersectionOverUnion "
    "LearnedPerceptualImagePatchSimilarity* PerceptualPathLength*",
    "transformers": "BERTScore* CLIPImageQualityAssessment* CLIPScore* InfoLM*",
    "vmaf_torch": "VideoMultiMethodAssessmentFusion",
}


def skip_where_missing(name: str) -> None:
    """Skip a metric whose package is not installed, after checking that it fails because of that."""
    kind = SHIPPED[name].__name__
    for package, names in MISSING.items():
        if find_spec(package) is None and {kind, f"{kind}*"} & set(names.split()):
            with pytest.raises((ModuleNotFoundError, RuntimeError), match=package.replace("_", ".")):
                make(name).update(*data_for(name)())
            pytest.skip(f"{kind} needs {package}")
        if f"{kind}*" in names.split():
            pytest.skip(f"{kind} downloads its weights")


# ---- resuming


def feed(metrics: Sequence[Any], give: Callable[[], Any], seeds: range, hows: str) -> None:
    for metric in metrics:
        for seed in seeds:
            torch.manual_seed(seed)
            if isinstance(metric, MetricTracker):
                metric.increment()
            (metric.update if hows[seed] == "u" else metric.forward)(*give())


def bits(value: object) -> object:
    """Return a value that compares equal only if every bit is equal."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [bits(part) for part in value]
    return repr(sorted(value) if isinstance(value, set) else value)


def computed(metric: Any) -> object:
    torch.manual_seed(0)  # some draw random numbers when they compute
    return bits(metric.compute())


def states(metric: object) -> MetricStates:
    return MetricStates({"metric": metric})


def through(directory: Path, saved: MetricStates) -> Any:
    return through_files(directory, {"metric": saved.state_dict()})["metric"]


def check_resumes(make: Callable[[], Any], give: Callable[[], Any], directory: Path, hows: str = "ufufu") -> Any:
    """Check that a metric resumes from its state; return one that ran through, and one with the later data only."""
    through_run, saved, resumed, late = make(), make(), make(), make()
    expected, before_save, after_load = map(states, (through_run, saved, resumed))
    feed([through_run, saved], give, range(3), hows)
    state = through(directory, before_save)
    loaded = bits(state)
    after_load.load_state_dict(state)
    assert bits(after_load.state_dict()) == bits(expected.state_dict())
    assert computed(resumed) == computed(through_run)
    feed([through_run, resumed, late], give, range(3, 5), hows)
    assert computed(resumed) == computed(through_run)
    assert bits(after_load.state_dict()) == bits(expected.state_dict())
    assert bits(state) == loaded, "a metric shares memory with the state that it has loaded"
    return through_run, late


SHIPPED = shipped()
FORGETS = {"aggregation.BaseAggregator", "aggregation.MinMetric"}
REFUSED = {"wrappers.tracker.MetricTracker": r"added or removed during a run cannot be resumed: \['metric.1'"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_metric_resumes(name: str, tmp_path: Path) -> None:
    skip_where_missing(name)
    if name in REFUSED:
        with pytest.raises(CheckpointError, match=REFUSED[name]):
            check_resumes(lambda: make(name), data_for(name), tmp_path)
        return
    # `forward` would compute one half of the pictures without the other; a BootStrapper's forgets earlier batches.
    hows = "uuuuu" if data_for(name) is pictures or name.endswith("BootStrapper") else "ufufu"
    through_run, late = check_resumes(lambda: make(name), data_for(name), tmp_path, hows)
    assert (computed(late) == computed(through_run)) == (name in FORGETS), "the data do not show if a state was loaded"


def test_every_export_is_tried() -> None:
    packages = [each.name for each in pkgutil.iter_modules(torchmetrics.__path__)]
    modules = [torchmetrics, *(importlib.import_module(f"torchmetrics.{name}") for name in packages)]
    exported = [getattr(module, name) for module in modules for name in getattr(module, "__all__", vars(module))]
    assert [value for value in exported if is_tried(value) and value not in SHIPPED.values()] == []
    assert len(SHIPPED) > 250
