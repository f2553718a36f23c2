"""Balanced training on sound and video frames: two ResNet-18, late fusion, OGM-GE.

    python examples/audio_visual.py DATA --epochs 70

DATA is a folder of clips, by default as CREMA-D is prepared for the code of the OGM-GE paper:

    DATA/train.csv                                  lines of clip,label: 1001_DFA_ANG_XX,ANG
    DATA/test.csv                                   the same
    DATA/AudioWAV/1001_DFA_ANG_XX.wav               16-bit PCM, 16 kHz; --audio names the folder
    DATA/Image-01-FPS/1001_DFA_ANG_XX/00001.jpg     one or more; --images names the folder

Needs Pillow, and matplotlib for the plot at the end. It prints:

    24 clips to train on, 12 to test: 2 classes (ANG, HAP)
    epoch 1: loss 0.69, test accuracy 50.0 % (audio 50.0 %, visual 50.0 %)
    ...
    wrote runs/audio_visual/last.pt and modulation.png

``--resume`` goes on from ``last.pt``. Small settings for a first look: ``--width 8 --size 64``.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import sys
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import mmbal_fast

EXPECTED = """expected in {root}:
  train.csv and test.csv              lines of clip,label, such as 1001_DFA_ANG_XX,ANG;
                                      a first line "clip,label" may be there
  {audio}/<clip>.wav
  {images}/<clip>/*.jpg or *.png
Another folder for the sound or the frames: --audio, --images."""

SECONDS = 3
IMAGES = (".jpg", ".jpeg", ".png")


# ---- Data ----------------------------------------------------------------------------------------


class DataError(Exception):
    """The folder is not as expected."""


@dataclass(frozen=True)
class Clip:
    """A labelled video, as sound and frames."""

    sound: Path
    frames: tuple[Path, ...]
    label: str


def read_clips(table: Path, audio: Path, images: Path, rate: int) -> list[Clip]:
    """The clips that a CSV file lists, all of them checked."""
    if not table.is_file():
        raise DataError(f"no file {table}")
    try:
        with table.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.reader(lines))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: no CSV ({error})") from error
    clips, faults = [], []
    for number, row in enumerate(rows, start=1):
        if not row or (number == 1 and row == ["clip", "label"]):
            continue
        if len(row) != 2 or not all(row):
            faults.append(f"{table}, line {number}: not clip,label but {','.join(row)!r}")
            continue
        sound, folder = audio / f"{row[0]}.wav", images / row[0]
        found = folder.iterdir() if folder.is_dir() else ()
        frames = sorted(each for each in found if each.suffix.lower() in IMAGES)
        if fault := sound_fault(sound, rate):
            faults.append(fault)
        elif not frames:
            faults.append(f"no image in {folder}")
        else:
            clips.append(Clip(sound, tuple(frames), row[1]))
    if faults:
        more = f"\n... and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError("\n".join(faults[:5]) + more)
    if not clips:
        raise DataError(f"no clip in {table}")
    return clips


def sound_fault(path: Path, rate: int) -> str:
    """What is wrong with a wav file, or nothing."""
    if not path.is_file():
        return f"no file {path}"
    try:
        with wave.open(str(path)) as file:
            width, found, length = file.getsampwidth(), file.getframerate(), file.getnframes()
        if width == 2 and found == rate and length:
            return ""
        reason = f"{8 * width} bit, {found} Hz, {length} samples"
    except (wave.Error, EOFError) as error:
        reason = str(error) or "empty"
    convert = f"ffmpeg -i {path.name} -ac 1 -ar {rate} -c:a pcm_s16le out.wav"
    return f"{path}: not 16-bit PCM of {rate} Hz but {reason}; try {convert}"


def spectrogram(path: Path) -> Tensor:
    """Log magnitudes of three seconds, ``[1, 257, 188]`` for 16 kHz; short sounds repeat."""
    with wave.open(str(path)) as file:
        rate, channels = file.getframerate(), file.getnchannels()
        data = bytearray(file.readframes(rate * SECONDS))
    sound = torch.frombuffer(data, dtype=torch.int16).view(-1, channels).float().mean(1) / 32768
    wanted = rate * SECONDS
    sound = sound.repeat(math.ceil(wanted / len(sound)))[:wanted]
    window = torch.hann_window(512)
    spectrum = torch.stft(sound, 512, round(0.016 * rate), window=window, return_complex=True)
    return spectrum.abs().add(1e-7).log().unsqueeze(0)


def picture(path: Path, size: int, augment: bool) -> Tensor:
    """``[3, size, size]``, normalized as for ImageNet; a random part of it to train on."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    width, height = image.size
    part = random.uniform(0.5, 1.0) if augment else 1.0
    left, top = (random.uniform(0, side * (1 - part)) for side in (width, height))
    box = (left, top, left + part * width, top + part * height)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if augment and random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((pixels.view(size, size, 3) / 255 - mean) / std).permute(2, 0, 1)


class Clips(Dataset[tuple[Tensor, Tensor, int]]):
    """Spectrogram ``[1, F, T]``, frames ``[N, 3, size, size]``, class."""

    def __init__(
        self, clips: list[Clip], classes: list[str], size: int, frames: int, augment: bool
    ) -> None:
        """Takes ``frames`` of each clip: at random to train, else spread over the clip."""
        self.clips, self.classes = clips, classes
        self.size, self.frames, self.augment = size, frames, augment

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        clip = self.clips[index]
        if self.augment:
            paths = sorted(random.choices(clip.frames, k=self.frames))
        else:
            step = len(clip.frames) / self.frames
            paths = [clip.frames[int((each + 0.5) * step)] for each in range(self.frames)]
        images = torch.stack([picture(path, self.size, self.augment) for path in paths])
        return spectrogram(clip.sound), images, self.classes.index(clip.label)


# ---- Network -------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Halves the image if the stride is 2."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, image: Tensor) -> Tensor:
        """``[B, outputs, H / stride, W / stride]``."""
        return torch.relu(self.layers(image) + self.shortcut(image))


def resnet18(channels: int, width: int) -> nn.Sequential:
    """ResNet-18 without its classifier: ``[B, channels, H, W]`` to ``[B, 8 * width]``."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = width
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class AudioVisual(nn.Module):
    """A ResNet-18 for each modality, concatenation, one linear head."""

    def __init__(self, classes: int, width: int) -> None:
        """64 channels in the first layers is the usual width."""
        super().__init__()
        self.encoders = nn.ModuleDict({"audio": resnet18(1, width), "visual": resnet18(3, width)})
        self.head = nn.Linear(16 * width, classes)

    def forward(self, sound: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The fused prediction, and what each modality predicts on its own: ``[B, C]`` each."""
        frames = self.encoders["visual"](images.flatten(0, 1))
        features = {
            "audio": self.encoders["audio"](sound),
            "visual": frames.unflatten(0, images.shape[:2]).mean(1),
        }
        fused = self.head(torch.cat([features["audio"], features["visual"]], dim=1))
        with torch.no_grad():
            logits = mmbal_fast.nn.unimodal_logits(features, self.head)
        return fused, logits


@torch.no_grad()
def accuracies(model: AudioVisual, loader: DataLoader[Any], device: torch.device) -> list[float]:
    """In per cent: of the model, and of each modality alone."""
    model.eval()
    correct, count = [0, 0, 0], 0
    for batch in loader:
        sound, images, label = (each.to(device) for each in batch)
        fused, logits = model(sound, images)
        for row, each in enumerate((fused, *logits.values())):
            correct[row] += int((each.argmax(dim=1) == label).sum())
        count += len(label)
    model.train()
    return [100 * each / count for each in correct]


# ---- Training ------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    """The defaults are those of the OGM-GE paper's code for CREMA-D."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path, help="folder with train.csv and test.csv")
    parser.add_argument("--audio", default="AudioWAV", help="folder in it of <clip>.wav")
    parser.add_argument("--images", default="Image-01-FPS", help="folder in it of <clip>/*.jpg")
    parser.add_argument("--rate", type=int, default=16000, help="samples per second of the sound")
    parser.add_argument("--frames", type=int, default=1, help="of each clip")
    parser.add_argument("--size", type=int, default=224, help="pixels of a frame's side")
    parser.add_argument("--width", type=int, default=64, help="channels of the first layers")
    parser.add_argument("--epochs", type=int, default=70)
    parser.add_argument("--modulate-epochs", type=int, default=51, help="plain training after them")
    parser.add_argument("--alpha", type=float, default=0.8, help="0 trains with noise only")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/audio_visual"))
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in --out")
    return parser.parse_args()


def load(opt: argparse.Namespace) -> tuple[list[str], Clips, Clips]:
    """Classes, and the clips to train on and to test."""
    train, test = (
        read_clips(opt.data / name, opt.data / opt.audio, opt.data / opt.images, opt.rate)
        for name in ("train.csv", "test.csv")
    )
    classes = sorted({clip.label for clip in train})
    if unknown := {clip.label for clip in test} - set(classes):
        raise DataError(f"labels in {opt.data / 'test.csv'} only: {', '.join(sorted(unknown))}")
    return (
        classes,
        Clips(train, classes, opt.size, opt.frames, augment=True),
        Clips(test, classes, opt.size, opt.frames, augment=False),
    )


def main() -> int:
    """Trains."""
    opt = options()
    try:
        classes, train, test = load(opt)
    except DataError as error:
        expected = EXPECTED.format(root=opt.data, audio=opt.audio, images=opt.images)
        print(f"{error}\n{expected}", file=sys.stderr)
        return 2
    names = ", ".join(classes)
    print(f"{len(train)} clips to train on, {len(test)} to test: {len(classes)} classes ({names})")

    torch.manual_seed(opt.seed)
    random.seed(opt.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AudioVisual(len(classes), opt.width).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 70, 0.1)
    balancer = mmbal_fast.OGMGE(model.encoders, alpha=opt.alpha, seed=opt.seed)
    history = mmbal_fast.History(balancer.names)
    stateful: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "balancer": balancer,
    }
    first, last = 0, opt.out / "last.pt"
    if opt.resume:
        checkpoint = torch.load(last, map_location=device, weights_only=True)
        first = checkpoint.pop("epochs")
        for name, state in checkpoint.items():
            stateful[name].load_state_dict(state)

    def batches(data: Clips, shuffle: bool) -> DataLoader[Any]:
        pinned = device.type == "cuda"
        return DataLoader(
            data, opt.batch_size, shuffle=shuffle, num_workers=opt.workers, pin_memory=pinned
        )

    loader, test_loader = batches(train, shuffle=True), batches(test, shuffle=False)
    opt.out.mkdir(parents=True, exist_ok=True)
    for epoch in range(first, opt.epochs):
        balancer.enabled = epoch < opt.modulate_epochs
        total = torch.zeros((), device=device)
        for batch in loader:
            sound, images, label = (each.to(device, non_blocking=True) for each in batch)
            fused, logits = model(sound, images)
            loss = cross_entropy(fused, label)
            optimizer.zero_grad()
            loss.backward()
            history.record(balancer.step(logits, label))  # after backward, before the optimizer
            optimizer.step()
            total += loss.detach() * len(label)
        scheduler.step()
        both, audio, visual = accuracies(model, test_loader, device)
        print(
            f"epoch {epoch + 1}: loss {total.item() / len(train):.2f}, test accuracy "
            f"{both:.1f} % (audio {audio:.1f} %, visual {visual:.1f} %)"
        )
        states = {name: each.state_dict() for name, each in stateful.items()}
        torch.save({**states, "epochs": epoch + 1}, last)
    if len(history):
        history.plot(opt.out / "modulation.png")
        print(f"wrote {last} and modulation.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
