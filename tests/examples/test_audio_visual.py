"""The parts of examples/audio_visual.py, and what it says of a folder that is not as expected."""

from __future__ import annotations

import importlib.util
import pickle
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.examples.clips import make_clips, write_sound

pytest.importorskip("PIL", reason="Pillow is not installed")

SCRIPT = Path(__file__).parents[2] / "examples" / "audio_visual.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audio_visual", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["audio_visual"] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("pristine") / "clips", train=4, test=2)


def test_is_a_resnet18(example: ModuleType) -> None:
    model = example.AudioVisual(classes=6, width=64)
    # torchvision's has 11,689,512 parameters, 513,000 of them in its classifier.
    assert sum(each.numel() for each in model.encoders["visual"].parameters()) == 11_176_512
    convolutions = [each for each in model.encoders.parameters() if each.ndim == 4]
    assert len(convolutions) == 40
    model = example.AudioVisual(classes=6, width=4)
    assert model.encoders["visual"][:-2](torch.zeros(2, 3, 64, 64)).shape == (2, 32, 2, 2)


def test_unimodal_logits_add_up(example: ModuleType) -> None:
    model = example.AudioVisual(classes=6, width=4)
    fused, logits = model(torch.randn(2, 1, 257, 188), torch.randn(2, 3, 3, 32, 32))
    torch.testing.assert_close(logits["audio"] + logits["visual"], fused)


def test_spectrogram_shows_the_tone(example: ModuleType, tmp_path: Path) -> None:
    write_sound(tmp_path / "tone.wav", tone=1000.0, seconds=1.0)
    spectrogram = example.spectrogram(tmp_path / "tone.wav")
    assert spectrogram.shape == (1, 257, 188)
    assert spectrogram[0].mean(dim=1).argmax() == 1000 * 512 // 16000
    assert (spectrogram[0, 32, 1:-1] > 4).all()  # repeated to three seconds


def test_reads_clips(example: ModuleType, pristine: Path) -> None:
    arguments = (pristine / "AudioWAV", pristine / "Image-01-FPS", 16000)
    clips = example.read_clips(pristine / "train.csv", *arguments)
    assert [clip.label for clip in clips] == ["ANG", "HAP", "ANG", "HAP"]
    assert [len(clip.frames) for clip in clips] == [1, 2, 3, 1]
    data = example.Clips(clips, ["ANG", "HAP"], size=16, frames=2, augment=False)
    sound, images, label = data[1]
    assert sound.shape == (1, 257, 188)
    assert images.shape == (2, 3, 16, 16)
    assert label == 1
    blue = images[0, :, 8, 8]  # (40, 40, 200), normalized
    torch.testing.assert_close(blue, torch.tensor([-1.43, -1.34, 1.68]), atol=0.05, rtol=0)


def test_skips_a_first_line_of_names(example: ModuleType, pristine: Path, tmp_path: Path) -> None:
    table = tmp_path / "named.csv"
    table.write_text("clip,label\n" + (pristine / "train.csv").read_text())
    arguments = (pristine / "AudioWAV", pristine / "Image-01-FPS", 16000)
    assert len(example.read_clips(table, *arguments)) == 4


def test_resumes_where_it_stopped(
    example: ModuleType,
    pristine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    small = ["--width=4", "--size=32", "--batch-size=2", "--workers=0"]
    command = ["audio_visual.py", str(pristine), *small, f"--out={tmp_path}"]
    printed = []
    for options in (["--epochs=1"], ["--epochs=3", "--modulate-epochs=2", "--resume"]):
        monkeypatch.setattr(sys, "argv", [*command, *options])
        assert example.main() == 0
        printed.append(re.findall(r"^epoch (\d+)", capsys.readouterr().out, re.MULTILINE))
    assert printed == [["1"], ["2", "3"]]
    checkpoint = torch.load(tmp_path / "last.pt")
    assert checkpoint["epochs"] == 3
    # Two steps in each epoch, none that counts in the one without modulation.
    assert checkpoint["balancer"] == {
        "names": ["audio", "visual"], "seed": 0, "step": 4, "enabled": False,
    }  # fmt: skip


def test_code_in_a_checkpoint_does_not_run(
    example: ModuleType, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever torch does where it is not told."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"epochs": Path("one")}, tmp_path / "last.pt")
    command = ["audio_visual.py", str(pristine), "--width=4", f"--out={tmp_path}", "--resume"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        example.main()


def test_ends_with_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["audio_visual.py", "nowhere"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "no file nowhere/train.csv\n"
        "expected in nowhere:\n"
        "  train.csv and test.csv              lines of clip,label, such as 1001_DFA_ANG_XX,ANG;\n"
        '                                      a first line "clip,label" may be there\n'
        "  AudioWAV/<clip>.wav\n"
        "  Image-01-FPS/<clip>/*.jpg or *.png\n"
        "Another folder for the sound or the frames: --audio, --images.\n"
    )


def no_table(root: Path) -> None:
    (root / "test.csv").unlink()


def empty_table(root: Path) -> None:
    (root / "train.csv").write_text("clip,label\n")


def third_column(root: Path) -> None:
    (root / "train.csv").write_text("train0_ANG_XX,ANG,0.5\n")


def binary_table(root: Path) -> None:
    (root / "train.csv").write_bytes(b"\xff\xfe\x00")


def no_sound(root: Path) -> None:
    (root / "AudioWAV" / "train1_HAP_XX.wav").unlink()


def other_rate(root: Path) -> None:
    write_sound(root / "AudioWAV" / "train1_HAP_XX.wav", 440, rate=44100)


def empty_sound(root: Path) -> None:
    write_sound(root / "AudioWAV" / "train1_HAP_XX.wav", 440, seconds=0)


def no_wave(root: Path) -> None:
    (root / "AudioWAV" / "train1_HAP_XX.wav").write_bytes(b"ID3 and more of an MP3")


def no_frames(root: Path) -> None:
    shutil.rmtree(root / "Image-01-FPS" / "test1_HAP_XX")


def other_label(root: Path) -> None:
    (root / "test.csv").write_text("test0_ANG_XX,CALM\n")


def all_sounds(root: Path) -> None:
    shutil.rmtree(root / "AudioWAV")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_table, "no file {root}/test.csv"),
        (empty_table, "no clip in {root}/train.csv"),
        (third_column, "{root}/train.csv, line 1: not clip,label but 'train0_ANG_XX,ANG,0.5'"),
        (binary_table, "{root}/train.csv: no CSV ("),
        (no_sound, "no file {root}/AudioWAV/train1_HAP_XX.wav"),
        (other_rate, "not 16-bit PCM of 16000 Hz but 16 bit, 44100 Hz, 44100 samples; try ffmpeg"),
        (empty_sound, "not 16-bit PCM of 16000 Hz but 16 bit, 16000 Hz, 0 samples"),
        (no_wave, "not 16-bit PCM of 16000 Hz but file does not start with RIFF id"),
        (no_frames, "no image in {root}/Image-01-FPS/test1_HAP_XX"),
        (other_label, "labels in {root}/test.csv only: CALM"),
        (all_sounds, "no file {root}/AudioWAV/train3_HAP_XX.wav"),
    ],
)
def test_says_what_is_wrong_with_the_folder(
    example: ModuleType,
    pristine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    root = tmp_path / "clips"
    shutil.copytree(pristine, root)
    spoil(root)
    monkeypatch.setattr(sys, "argv", ["audio_visual.py", str(root), "--out", str(tmp_path / "out")])
    assert example.main() == 2
    output = capsys.readouterr()
    assert message.format(root=root) in output.err
    assert f"expected in {root}:" in output.err
    assert output.out == ""
    assert not (tmp_path / "out").exists()


def test_lists_only_the_first_faults(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "train.csv"
    table.write_text("".join(f"clip{index},ANG\n" for index in range(9)))
    with pytest.raises(example.DataError, match=r"(?s)(no file [^\n]*\n){5}\.\.\. and 4 more$"):
        example.read_clips(table, tmp_path, tmp_path, 16000)
