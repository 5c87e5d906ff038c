"""What trackers hold, read back with the packages' own readers: the points of each of their runs."""

import csv
import importlib
import json
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Points: TypeAlias = dict[str, list[tuple[int, float]]]
"""The points of one run: the steps of each value, with the value at each."""
TIMED = "items_per_second"


def collect_points(rows: Iterable[tuple[int, Mapping[str, float]]]) -> Points:
    """Collect the points of rows of values, without images and values that depend on the time."""
    points: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for step, values in rows:
        for name, value in values.items():
            if name != TIMED and not name.startswith("samples"):
                points[name].append((step, value))
    return dict(points)


def round_points(points: Points) -> Points:
    """Round values to single precision, in which TensorBoard stores them."""
    return {name: [(step, float(np.float32(value))) for step, value in found] for name, found in points.items()}


def read_json_lines(directory: Path) -> list[Points]:
    files = sorted(directory.glob("*.jsonl"))
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [collect_points((row.pop("step"), row) for row in run) for run in rows]


def read_csv(directory: Path) -> list[Points]:
    runs = [list(csv.DictReader(file.read_text().splitlines())) for file in sorted(directory.glob("*.csv"))]
    return [
        collect_points((int(row.pop("step")), {k: float(v) for k, v in row.items() if v}) for row in run)
        for run in runs
    ]


def read_tensorboard(directory: Path) -> list[Points]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = []
    for path in sorted(path for path in (directory / "tensorboard").iterdir() if path.is_dir()):
        events: Any = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        names = [name for name in events.Tags()["scalars"] if name != TIMED]
        runs.append({name: [(event.step, event.value) for event in events.Scalars(name)] for name in names})
    return runs


def read_tensorboard_images(directory: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(directory / "tensorboard" / "ptacc"), size_guidance={"images": 0}).Reload()
    return [event.step for event in events.Images("samples")]


def read_mlflow_run(directory: Path) -> tuple[str, int]:
    """Return the status of the run, and its number of parameters."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{directory}/mlflow.db")
    experiment = client.get_experiment_by_name("ptacc")
    assert experiment is not None
    run = client.search_runs([experiment.experiment_id])[0]
    return run.info.status, len(run.data.params)


def read_wandb(directory: Path) -> list[Points]:
    """Read the files of offline runs; those of a resumed run, which `wandb sync` uploads to the same run, together."""
    rows: defaultdict[str, list[tuple[int, dict[str, float]]]] = defaultdict(list)
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        for record in read_wandb_records(file):
            if record.HasField("history"):
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                values = {name: json.loads(value) for name, value in items.items() if not name.startswith("_")}
                rows[file.stem].append((record.history.step.num, values))
    return [collect_points(run) for run in rows.values()]


def read_wandb_records(file: Path) -> Iterator[Any]:
    """Yield the messages of a file, in LevelDB's log format with a header of seven bytes."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    content, position, message = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if (left := 32_768 - position % 32_768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        message += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record, message = messages.Record.FromString(message), b""
            yield record


def read_mlflow(directory: Path) -> list[Points]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{directory}/mlflow.db")
    experiment = client.get_experiment_by_name("ptacc")
    assert experiment is not None
    runs = []
    for run in reversed(client.search_runs([experiment.experiment_id])):
        histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        points = {name: sorted((m.step, m.value) for m in history) for name, history in histories.items()}
        runs.append({name: points[name] for name in points if name != TIMED})
    return runs


def read_trackio(directory: Path) -> list[Points]:
    from trackio.sqlite_storage import SQLiteStorage

    runs = []
    for record in SQLiteStorage.get_run_records("ptacc"):
        rows = SQLiteStorage.get_logs("ptacc", record["name"], run_id=record["id"])
        values = [(row["step"], {k: v for k, v in row.items() if k not in ("step", "timestamp")}) for row in rows]
        runs.append(collect_points(values))
    return runs


READERS: Mapping[str, Callable[[Path], list[Points]]] = {
    "jsonl": read_json_lines,
    "csv": read_csv,
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}
