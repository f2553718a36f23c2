"""Clips as CREMA-D users have them, made up: the class is a tone and a colour."""

from __future__ import annotations

import math
import wave
from array import array
from pathlib import Path

RATE = 16000
CLASSES = {"ANG": (440, (200, 40, 40)), "HAP": (880, (40, 40, 200))}


def write_sound(path: Path, tone: float, seconds: float = 1.0, rate: int = RATE) -> None:
    """A sine, 16-bit PCM."""
    samples = [
        round(20000 * math.sin(2 * math.pi * tone * index / rate))
        for index in range(int(seconds * rate))
    ]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(array("h", samples).tobytes())


def make_clips(root: Path, train: int = 24, test: int = 12) -> Path:
    """The folder, with half of the clips in each class."""
    from PIL import Image

    for folder in ("AudioWAV", "Image-01-FPS"):
        (root / folder).mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        lines = []
        for index in range(count):
            label, (tone, color) = list(CLASSES.items())[index % 2]
            clip = f"{split}{index}_{label}_XX"
            lines.append(f"{clip},{label}")
            write_sound(root / "AudioWAV" / f"{clip}.wav", tone + index, 0.5)
            frames = root / "Image-01-FPS" / clip
            frames.mkdir()
            for frame in range(1 + index % 3):
                shade = tuple(each + frame for each in color)
                Image.new("RGB", (48, 36), shade).save(frames / f"{frame:05d}.jpg")
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return root
