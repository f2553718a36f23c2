"""A weighted product of the modalities' predictions, its weights fitted on labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mmbal_fast.functional import _checks
from mmbal_fast.fusion._buffers import WideBuffers
from mmbal_fast.nn._pool import log_linear_pool, log_probabilities

if TYPE_CHECKING:
    from typing_extensions import Self


class LogLinearPool(WideBuffers):
    """Weigh each head's prediction by weights that are fitted on held-out labels.

    Needs *labelled* held-out samples that look like the target: fitted on samples in which the
    shortcut still works, the weights favour the shortcut. Ten such samples can be enough.

    Genest, Zidek, "Combining Probability Distributions: A Critique and an Annotated Bibliography"
    (Statistical Science 1986), section 3: with the predictions ``p_m`` of M heads::

        log p = log softmax sum_m w_m log p_m,    w_m = softplus(a_m)

    The weights minimise the mean negative log-likelihood plus ``penalty * sum_m w_m^2``, by L-BFGS
    in float64, from ``w_m = 1``: the plain product, which is also what an unfitted pool predicts.
    They need not add up to 1, so that they calibrate, too.

    Args:
        names: of the M >= 2 heads.
        penalty: from 0 on; default 1e-3.

    Attributes:
        names: of the heads, in the order of `weights`.
        weights: a buffer, float32 ``[M]``, not negative.

    Shape:
        - logits: ``[B, C]`` or ``[B, C, ...]`` for each head, or None where a modality is missing;
          half precision computes in float32.
        - Output: log-probabilities of the same shape, float32, or float64 for float64 inputs.

    Raises:
        ValueError: fewer than two heads, a name given twice, or a negative penalty; in the forward
            pass other names, no logits at all, or logits of different shapes.
        TypeError: in the forward pass, logits that are no floating point tensors.

    Example:
        >>> import torch
        >>> from mmbal_fast.fusion import LogLinearPool
        >>> target = torch.tensor([0, 1, 2, 0, 1, 2])
        >>> sure = 2 * torch.eye(3)[target]
        >>> logits = {"shape": sure, "color": sure.roll(1, dims=0)}  # its colour is another's
        >>> pool = LogLinearPool(["shape", "color"]).fit(logits, target)
        >>> bool(pool.weights[0] > 1), round(pool.weights[1].item(), 3)
        (True, 0.0)
        >>> pool(logits).argmax(dim=1)
        tensor([0, 1, 2, 0, 1, 2])
    """

    weights: Tensor

    def __init__(self, names: Sequence[str], *, penalty: float = 1e-3) -> None:
        super().__init__()
        op = "LogLinearPool"
        if len(names) < 2 or isinstance(names, str):
            raise ValueError(f"{op}: there must be at least 2 names (got {names!r})")
        if len(set(names)) < len(names):
            raise ValueError(f"{op}: the names must differ (got {list(names)})")
        self.names = tuple(names)
        self.penalty = _checks.number(op, "penalty", penalty)
        self.register_buffer("weights", torch.ones(len(names)))

    def fit(self, logits: Mapping[str, Tensor], target: Tensor) -> Self:
        """Fit the weights on held-out samples with labels.

        Args:
            logits: ``[N, C]`` or ``[N, C, ...]`` of each head; detached.
            target: integer labels ``[N]`` or ``[N, ...]``; -100 is left out.

        Returns:
            The pool itself. If anything is raised it is as before.

        Raises:
            ValueError: other names, a head without logits, no label that counts, logits with NaN
                or inf, or shapes that do not fit.
            TypeError: logits or target of another type.
            IndexError: a label out of range.
        """
        op = "LogLinearPool.fit"
        given = []
        for name, each in zip(self.names, log_probabilities(op, self.names, logits), strict=True):
            if each is None:
                raise ValueError(f"{op}: every head must have logits (got None for {name!r})")
            if not bool(each.isfinite().all()):
                raise ValueError(f"{op}: logits must be finite (got NaN or inf for {name!r})")
            given.append(each.detach().double())
        if isinstance(target, Tensor) and target.is_floating_point():
            raise TypeError(f"{op}: target must be integer labels (got {target.dtype})")
        _checks.batch(op, given, target)
        counted = target[target != -100]
        if len(counted) == 0:
            raise ValueError(f"{op}: there must be a label that counts (got none)")
        classes = given[0].shape[1]
        if not 0 <= int(counted.min()) <= int(counted.max()) < classes:
            raise IndexError(
                f"{op}: labels must be from 0 to {classes - 1} "
                f"(got {int(counted.min())} to {int(counted.max())})"
            )
        self.weights.copy_(_fitted(given, target.long(), self.penalty))
        return self

    def forward(self, logits: Mapping[str, Tensor | None]) -> Tensor:
        """The pooled prediction: log-probabilities shaped like the logits."""
        log_probs = log_probabilities("LogLinearPool", self.names, logits)
        return log_linear_pool(log_probs, self.weights)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{', '.join(self.names)}; penalty={self.penalty}"


@torch.inference_mode(False)
@torch.enable_grad()
def _fitted(log_probs: Sequence[Tensor], target: Tensor, penalty: float) -> Tensor:
    """The best weights, float64 ``[M]``."""
    one = math.log(math.expm1(1.0))  # softplus of it is 1
    inputs = [each.clone() for each in log_probs]  # of inference mode none, for autograd
    labels = target.clone()
    raw = torch.full((len(inputs),), one, dtype=torch.float64, device=labels.device)
    raw.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [raw],
        max_iter=200,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weights = F.softplus(raw)
        loss = (
            F.nll_loss(log_linear_pool(inputs, weights), labels) + penalty * weights.square().sum()
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return F.softplus(raw).detach()
