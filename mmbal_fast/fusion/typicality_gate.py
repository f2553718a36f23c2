"""A gate that trusts a modality as far as its features look like those of the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mmbal_fast import _progress
from mmbal_fast.functional import _checks
from mmbal_fast.fusion._buffers import WideBuffers
from mmbal_fast.nn._late_fusion import evaluating
from mmbal_fast.nn._pool import at_least_float32, log_linear_pool, log_probabilities

if TYPE_CHECKING:
    from typing_extensions import Self

Mode = Literal["soft", "hard"]
Encode = Callable[[Any], Mapping[str, Tensor]]

SMALLEST = 1e-12
"""Least typicality: keeps the ratio of two of them, and their mean logarithm, finite."""


class TypicalityGate(nn.Module):
    """Weigh each modality's own prediction by how typical its features look.

    Needs held-out inputs *without* labels that come from where the training data come from, and at
    inference, for ``mode="hard"``, a batch of unlabelled inputs that were shifted alike; no labels
    of the target. It sees a shift only where the features of the shifted modality show it: a
    modality that misleads but looks normal passes, and a harmless shift costs accuracy, too.

    With features ``z_m``, class means ``mu_mc`` and tied covariance ``S_m`` of the training
    features (Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
    Adversarial Attacks", NeurIPS 2018, section 2.1), shrunk to ``(1 - r) S + r mean(diag S) I``::

        D_m(x) = min_c (z_m - mu_mc)' S_m^-1 (z_m - mu_mc)
        q_m(x) = max(1 - Phi((log D_m(x) - a_m) / s_m), 1e-12)

    ``a_m`` and ``s_m`` are mean and standard deviation of ``log D_m`` over the held-out inputs, so
    that ``q_m`` is about uniform on inputs like those. Then, with each modality's own prediction
    ``p_m``,

    - *soft*, one sample at a time: ``sum_m (q_m / max_k q_k) p_m``, normalised;
    - *hard*, a batch at a time: the product of the ``p_m`` with ``mean_batch log q_m`` above the
      threshold, of the most typical one if there is none. A uniform ``q`` has mean -1.

    Fitting costs a pass over the training data and one over the held-out ones, no gradients. A
    prediction costs a triangular solve with ``[D_m, D_m]`` and C distances for each modality.

    A modality that is missing is None in both arguments, or NaN or inf in the rows of single
    samples: it then has no say. A sample that lacks all of them predicts NaN.

    Args:
        widths: the number of features ``D_m`` of each of the M >= 2 modalities.
        num_classes: C.
        mode: ``"soft"`` (default) or ``"hard"``; may be assigned later.
        shrinkage: ``r``, 0 to 1; default 0.1.
        threshold: of ``"hard"``; default -3. Both defaults were set once, by other data than what
            they are measured on, see ``docs/fusion.md``.

    Attributes:
        names: the modalities, in the order of every ``[B, M]``.

    Shape:
        - features: ``[B, D_m]`` for each modality, or None; half precision computes in float32.
        - logits: ``[B, C]`` for each modality, or None.
        - Output: log-probabilities ``[B, C]``, float32, or float64 for float64 inputs.

    Raises:
        ValueError: fewer than two modalities, a width below 1, fewer than two classes, another
            mode, or ``shrinkage`` or ``threshold`` out of range; in the forward pass other names,
            shapes that do not fit, or no modality at all.
        TypeError: in the forward pass, features or logits that are no floating point tensors.
        RuntimeError: in the forward pass, the gate was neither fitted nor loaded.

    Example:
        >>> import torch
        >>> from mmbal_fast.fusion import TypicalityGate
        >>> generator = torch.Generator().manual_seed(0)
        >>> target = torch.arange(200) % 2
        >>> def features():  # both modalities tell the classes apart
        ...     noise = torch.randn(2, 200, 3, generator=generator)
        ...     return dict(zip(["audio", "image"], 5 * target[:, None] + noise))
        >>> gate = TypicalityGate({"audio": 3, "image": 3}, num_classes=2)
        >>> gate = gate.fit([(features(), target)], [features()])
        >>> broken = features()
        >>> broken["image"] += 40
        >>> gate.weights(broken).mean(dim=0).round(decimals=2)
        tensor([1., 0.])
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        num_classes: int,
        *,
        mode: Mode = "soft",
        shrinkage: float = 0.1,
        threshold: float = -3.0,
    ) -> None:
        super().__init__()
        op = "TypicalityGate"
        if len(widths) < 2:
            raise ValueError(f"{op}: widths must name at least 2 modalities (got {list(widths)})")
        if any(width < 1 for width in widths.values()):
            raise ValueError(f"{op}: widths must be from 1 on (got {dict(widths)})")
        if num_classes < 2:
            raise ValueError(f"{op}: num_classes must be at least 2 (got {num_classes})")
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"{op}: shrinkage must be from 0 to 1 (got {shrinkage})")
        if not (threshold < 0 and math.isfinite(threshold)):
            raise ValueError(f"{op}: threshold must be below 0 (got {threshold})")
        self.names = tuple(widths)
        self.num_classes = num_classes
        self.shrinkage = shrinkage
        self.threshold = threshold
        self.mode = mode
        self.typical = nn.ModuleDict(
            {name: _Typical(width, num_classes) for name, width in widths.items()}
        )

    @property
    def mode(self) -> Mode:
        """``"soft"`` or ``"hard"``."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in ("soft", "hard"):
            raise ValueError(f"TypicalityGate: mode must be 'soft' or 'hard' (got {mode!r})")
        self._mode: Mode = mode

    @torch.no_grad()
    def fit(
        self,
        train: Iterable[Any],
        held_out: Iterable[Any],
        *,
        encode: Encode | None = None,
        progress: bool | None = None,
    ) -> Self:
        """Learn what is typical: class means and covariance, then how far held-out inputs lie.

        Streams: holds no features, and takes the statistics in float64. What a loader with another
        order or another batch size gives differs by rounding.

        Args:
            train: batches ``(inputs, target)``, with int64 labels ``[B]`` from 0 to C - 1.
            held_out: batches of inputs from the same source that were not trained on, as
                ``inputs`` or as ``(inputs, target)``, whose target is not looked at.
            encode: from ``inputs`` to the features ``[B, D_m]`` by modality, such as a method of
                the model, which then runs in evaluation mode. Default: the inputs are the features.
            progress: show a progress bar on standard error, needs ``rich``. Default: if it is
                installed and standard error is a terminal.

        Returns:
            The gate itself. If anything is raised it is as before.

        Raises:
            ValueError: a modality is missing, features with NaN or inf or of another shape,
                labels out of range, fewer training samples than classes, a class that is never
                seen, fewer than two held-out inputs, or a modality whose features do not vary.
            TypeError: features, labels or batches of another type.
            ModuleNotFoundError: ``progress=True`` without ``rich``.
        """
        op = "TypicalityGate.fit"
        with evaluating(encode):
            seen = {name: _Scatter() for name in self.names}
            for batch in _progress.shown(train, "training features", progress):
                if not isinstance(batch, tuple | list) or len(batch) != 2:
                    raise TypeError(
                        f"{op}: train must give (inputs, target) (got {type(batch).__name__})"
                    )
                features = self._features(op, batch[0], encode)
                target = self._target(op, batch[1], features)
                for name, z in features.items():
                    seen[name].add(z, target, self.num_classes)
            shapes = {name: each.shape(op, self.num_classes) for name, each in seen.items()}
            fitted = {
                name: _whitened(op, name, *shape, self.shrinkage) for name, shape in shapes.items()
            }
            spread = {name: _Spread() for name in self.names}
            for batch in _progress.shown(held_out, "held-out features", progress):
                inputs = batch[0] if isinstance(batch, tuple | list) else batch
                for name, z in self._features(op, inputs, encode).items():
                    spread[name].add(_log_distance(z, *fitted[name]))
        reference = {name: spread[name].moments(op, name) for name in self.names}
        for name, each in self._each():
            each.set(*fitted[name], *reference[name])
        return self

    def typicality(self, features: Mapping[str, Tensor | None]) -> Tensor:
        """``log q_m`` of each sample and modality, at least ``log 1e-12``.

        Args:
            features: ``[B, D_m]`` for each modality, or None.

        Returns:
            ``[B, M]``; ``-inf`` where a modality is missing.

        Raises:
            ValueError: other names, shapes that do not fit, or no modality at all.
            TypeError: features that are no floating point tensors.
            RuntimeError: the gate was neither fitted nor loaded.
        """
        op = "TypicalityGate"
        if not all(each.fitted for _, each in self._each()):
            raise RuntimeError(f"{op}: must be fitted or loaded first (got neither)")
        _check_features(op, features, self._widths())
        first = next(each for each in features.values() if each is not None)
        columns = []
        for name, each in self._each():
            z = features[name]
            if z is None:
                columns.append(
                    first.new_full((first.shape[0],), -math.inf, dtype=at_least_float32(first))
                )
                continue
            z = z.to(at_least_float32(z))
            columns.append(each(z).masked_fill(~z.isfinite().all(dim=1), -math.inf))
        return torch.stack(columns, dim=1)

    def weights(self, features: Mapping[str, Tensor | None]) -> Tensor:
        """How much each modality has to say about each sample.

        Args:
            features: as for `typicality`.

        Returns:
            ``[B, M]``: soft ``q_m / max_k q_k``, hard 1 for what is kept and 0 for the rest. NaN
            for a sample that lacks all modalities.

        Raises:
            ValueError: as `typicality`.
            TypeError: as `typicality`.
            RuntimeError: as `typicality`.
        """
        log_q = self.typicality(features)
        present = log_q > -math.inf
        if self.mode == "soft":
            return (log_q - log_q.amax(dim=1, keepdim=True)).exp()
        total = torch.where(present, log_q, 0.0).sum(dim=0)
        mean = torch.where(present, total / present.sum(dim=0), -math.inf)
        kept = (mean > self.threshold) | (mean == mean.amax(dim=1, keepdim=True))
        weights = (kept & present).to(log_q.dtype)
        return weights.masked_fill(~present.any(dim=1, keepdim=True), math.nan)

    def forward(
        self, features: Mapping[str, Tensor | None], logits: Mapping[str, Tensor | None]
    ) -> Tensor:
        """The weighted prediction: log-probabilities ``[B, C]``."""
        op = "TypicalityGate"
        weights = self.weights(features)
        log_probs = log_probabilities(op, self.names, logits)
        for name, each in zip(self.names, log_probs, strict=True):
            if (each is None) != (features[name] is None):
                raise ValueError(
                    f"{op}: features and logits must lack the same modalities "
                    f"(got only one of them for {name!r})"
                )
            if each is not None and each.shape != (weights.shape[0], self.num_classes):
                raise ValueError(
                    f"{op}: logits must be [B, C] like the features and classes, "
                    f"[{weights.shape[0]}, {self.num_classes}] (got {list(each.shape)})"
                )
        if self.mode == "hard":
            none = weights.isnan().any(dim=1, keepdim=True)
            return log_linear_pool(log_probs, weights).masked_fill(none, math.nan)
        terms = [
            torch.where(weight > 0, each, 0.0) + weight.log()
            for each, weight in zip(log_probs, weights.T.unsqueeze(2), strict=True)
            if each is not None
        ]
        return torch.stack(terms).logsumexp(dim=0) - weights.sum(dim=1, keepdim=True).log()

    def extra_repr(self) -> str:
        """What `repr` shows besides the modalities' statistics."""
        return (
            f"num_classes={self.num_classes}, mode={self.mode!r}, "
            f"shrinkage={self.shrinkage}, threshold={self.threshold}"
        )

    def _each(self) -> Iterable[tuple[str, _Typical]]:
        return self.typical.items()  # type: ignore[return-value]

    def _widths(self) -> dict[str, int]:
        return {name: len(each.center) for name, each in self._each()}

    def _features(self, op: str, inputs: Any, encode: Encode | None) -> dict[str, Tensor]:
        """The features in float64, all of them there and finite."""
        features = inputs if encode is None else encode(inputs)
        _check_features(op, features, self._widths())
        for name, each in features.items():
            if each is None:
                raise ValueError(f"{op}: every modality must be there (got None for {name!r})")
            if not bool(each.isfinite().all()):
                rows = int((~each.isfinite().all(dim=1)).sum())
                raise ValueError(
                    f"{op}: features of {name!r} must be finite "
                    f"(got NaN or inf in {rows} of {len(each)} samples)"
                )
        return {name: features[name].double() for name in self.names}

    def _target(self, op: str, target: object, features: Mapping[str, Tensor]) -> Tensor:
        if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
            kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(f"{op}: target must be a tensor of integer labels (got {kind})")
        first = next(iter(features.values()))
        if target.shape != first.shape[:1]:
            raise ValueError(
                f"{op}: target must be [{len(first)}], a label for each sample "
                f"(got {list(target.shape)})"
            )
        if len(target) and not 0 <= int(target.min()) <= int(target.max()) < self.num_classes:
            raise ValueError(
                f"{op}: target must be from 0 to {self.num_classes - 1} "
                f"(got {int(target.min())} to {int(target.max())})"
            )
        return target.to(first.device, torch.int64)


class _Typical(WideBuffers):
    """Where the features of one modality lie."""

    center: Tensor
    factor: Tensor
    means: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        nan = math.nan
        self.register_buffer("center", torch.full((width,), nan))
        self.register_buffer("factor", torch.full((width, width), nan))
        self.register_buffer("means", torch.full((num_classes, width), nan))
        self.register_buffer("mean", torch.tensor(nan))
        self.register_buffer("deviation", torch.tensor(nan))
        self.fitted = False

    def set(self, *values: Tensor) -> None:
        for buffer, value in zip(self.buffers(), values, strict=True):
            buffer.copy_(value)
        self.fitted = True

    def forward(self, z: Tensor) -> Tensor:
        """``log q`` of each of ``[B, D]``."""
        center, factor, means = (
            each.to(z.dtype) for each in (self.center, self.factor, self.means)
        )
        beyond = (_log_distance(z, center, factor, means) - self.mean) / self.deviation
        log_q: Tensor = torch.special.log_ndtr(-beyond)
        return log_q.clamp(min=math.log(SMALLEST))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.fitted = not (self.deviation.is_meta or bool(self.deviation.isnan()))


class _Scatter:
    """Class means and within-class scatter of features that come in batches.

    Batches merge by Chan's formula, so that no large sums of squares cancel.
    """

    def __init__(self) -> None:
        self.counts: Tensor | float = 0.0  # [C]
        self.means: Tensor | float = 0.0  # [C, D]
        self.scatter: Tensor | float = 0.0  # [D, D]

    def add(self, z: Tensor, target: Tensor, num_classes: int) -> None:
        one_hot = nn.functional.one_hot(target, num_classes).to(z.dtype)
        counts = one_hot.sum(dim=0)
        means = one_hot.T @ z / counts.clamp(min=1.0).unsqueeze(1)
        within = z - means[target]
        total = counts + self.counts
        share = counts / total.clamp(min=1.0)
        delta = means - self.means
        between = (delta * (share * self.counts).unsqueeze(1)).T @ delta
        self.scatter = within.T @ within + between + self.scatter
        self.means = self.means + delta * share.unsqueeze(1)
        self.counts = total

    def shape(self, op: str, num_classes: int) -> tuple[Tensor, Tensor]:
        """Class means ``[C, D]`` and tied covariance ``[D, D]``."""
        counts = self.counts
        if isinstance(counts, float) or counts.sum() < num_classes:
            number = int(counts) if isinstance(counts, float) else int(counts.sum())
            raise ValueError(
                f"{op}: train must hold at least as many samples as classes, {num_classes} "
                f"(got {number})"
            )
        assert isinstance(self.means, Tensor)
        assert isinstance(self.scatter, Tensor)
        if (counts == 0).any():
            unseen = (counts == 0).nonzero().flatten().tolist()
            raise ValueError(f"{op}: train must hold every class (got no sample of {unseen})")
        return self.means, self.scatter / counts.sum()


class _Spread:
    """Mean and standard deviation of numbers that come in batches, merged by Chan's formula."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        if len(values) == 0:
            return
        variance, mean = torch.var_mean(values, correction=0)
        total = self.count + len(values)
        delta = mean - self.mean
        share = len(values) / total
        self.squares = variance * len(values) + delta**2 * self.count * share + self.squares
        self.mean = self.mean + delta * share
        self.count = total

    def moments(self, op: str, name: str) -> tuple[Tensor, Tensor]:
        if self.count < 2:
            raise ValueError(f"{op}: held_out must hold at least 2 inputs (got {self.count})")
        assert isinstance(self.mean, Tensor)
        assert isinstance(self.squares, Tensor)
        deviation = (self.squares / (self.count - 1)).sqrt()
        if not deviation > 0:
            raise ValueError(
                f"{op}: held-out inputs of {name!r} must differ in their distance from the "
                f"classes (got one distance for all {self.count})"
            )
        return self.mean, deviation


def _whitened(
    op: str, name: str, means: Tensor, covariance: Tensor, shrinkage: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Centre ``[D]``, Cholesky factor ``[D, D]`` and class means in its coordinates ``[C, D]``."""
    target = covariance.diagonal().mean() * torch.eye(
        len(covariance), dtype=covariance.dtype, device=covariance.device
    )
    factor, info = torch.linalg.cholesky_ex(torch.lerp(covariance, target, shrinkage))
    if int(info) != 0:
        raise ValueError(
            f"{op}: features of {name!r} must vary within the classes, in every direction if "
            f"shrinkage is 0 (got a covariance of rank {torch.linalg.matrix_rank(covariance)} of "
            f"{len(covariance)})"
        )
    center = means.mean(dim=0)
    return center, factor, _solve(factor, means - center)


def _solve(factor: Tensor, rows: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.solve_triangular(factor, rows.mT, upper=False)
    return solution.mT


def _log_distance(z: Tensor, center: Tensor, factor: Tensor, means: Tensor) -> Tensor:
    """``log D`` of each of ``[B, D]``: squared Mahalanobis distance from the nearest class."""
    # Not by a matrix product, which would cancel where a sample is near its mean.
    distances = torch.cdist(
        _solve(factor, z - center), means, compute_mode="donot_use_mm_for_euclid_dist"
    )
    return 2.0 * distances.amin(dim=1).clamp(min=torch.finfo(z.dtype).tiny).log()


def _check_features(op: str, features: object, widths: Mapping[str, int]) -> None:
    ordered = _checks.by_name(op, "features", features, list(widths))
    rows = None
    for (name, width), each in zip(widths.items(), ordered, strict=True):
        if each is None:
            continue
        if not isinstance(each, Tensor) or not each.is_floating_point():
            kind = each.dtype if isinstance(each, Tensor) else type(each).__name__
            raise TypeError(
                f"{op}: features of {name!r} must be a floating point tensor (got {kind})"
            )
        rows = each.shape[0] if rows is None and each.ndim else rows
        if each.shape != (rows, width):
            raise ValueError(
                f"{op}: features of {name!r} must be [B, {width}], B the same for all "
                f"(got {list(each.shape)})"
            )
    if rows is None:
        raise ValueError(f"{op}: one modality at least must be there (got None for all)")
