"""How well clusters of features agree with labels."""

from __future__ import annotations

import torch
from torch import Tensor


def purity(
    features: Tensor, labels: Tensor, *, clusters: int | None = None, seed: int = 0
) -> float:
    """How well clusters of features agree with labels: 1 if each holds one class.

    ``sum over clusters of the count of its most frequent label, over the number of samples``, of
    k-means with as many clusters as classes, on features scaled to 0 to 1 each: Wei et al. (ECCV
    2024), section 3.2. Needs scikit-learn.

    Args:
        features: ``[N, D]``, floating point.
        labels: ``[N]``, integer, of any values.
        clusters: default the number of different labels.
        seed: of k-means; default 0.

    Raises:
        ValueError: shapes that do not fit, features that are not finite, or fewer samples than
            clusters.
        ModuleNotFoundError: scikit-learn is not installed.

    Example:
        >>> import torch
        >>> from mmbal_fast import purity
        >>> features = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
        >>> purity(features, torch.tensor([7, 7, 9, 7]))
        0.75
    """
    from sklearn.cluster import KMeans

    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"purity: features must be [N, D] and labels [N] "
            f"(got {list(features.shape)} and {list(labels.shape)})"
        )
    values = features.detach().to("cpu", torch.float64)
    if not bool(values.isfinite().all()):
        raise ValueError("purity: features must be finite (got NaN or inf)")
    _, own = torch.unique(labels.cpu(), return_inverse=True)
    classes = int(own.max()) + 1 if len(own) else 0
    count = classes if clusters is None else clusters
    if not 1 <= count <= len(values):
        raise ValueError(f"purity: samples must be at least {count} (got {len(values)})")
    low, high = values.amin(0), values.amax(0)
    scaled = (values - low) / torch.where(high > low, high - low, 1.0)
    found = KMeans(count, n_init=10, random_state=seed).fit_predict(scaled.numpy())
    table = torch.zeros(count, classes, dtype=torch.int64, device="cpu")
    table.index_put_(
        (torch.as_tensor(found, dtype=torch.int64, device="cpu"), own),
        torch.ones_like(own),
        accumulate=True,
    )
    return float(table.amax(1).sum()) / len(values)
