"""Ways to train. To add one: a class here, or a line in `TRAININGS` if it is of a known kind.

`Training` is joint training, and what the others change of it. A training step is encode, loss,
backward, `before_update`, the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import mmbal_fast
from mmbal_fast._task import Loader, Loaders
from mmbal_fast.compare._network import Features, Network
from mmbal_fast.fusion import ShuffleModality
from mmbal_fast.nn import shapley_logits


@dataclass(frozen=True)
class Setup:
    """What a training is made from. Torch's generator is seeded before it is."""

    network: Network
    loaders: Loaders
    optimizer: torch.optim.Optimizer
    """Of all parameters of the network."""
    epochs: int
    seed: int


@dataclass(frozen=True)
class Outputs:
    """What a network says of N samples."""

    features: Features
    unimodal: Mapping[str, Tensor]
    """Logits ``[N, C]`` of each modality's head."""
    fused: Tensor
    """Logits ``[N, C]``."""


class Training:
    """Joint training: the cross-entropy of the fused prediction, and nothing else."""

    trains_heads = False
    """Whether the modalities' own heads learn, so that one can predict from them."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.network, self.optimizer = setup.network, setup.optimizer

    def prepare(self) -> None:
        """Called before the first step, in training mode."""

    def step(self, inputs: Mapping[str, Tensor], target: Tensor) -> None:
        """One step of the optimizer."""
        features = self.network.encode(inputs)
        loss = self.loss(features, target)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.before_update({name: each.detach() for name, each in features.items()}, target)
        self.optimizer.step()

    def loss(self, features: Features, target: Tensor) -> Tensor:
        """What is differentiated."""
        return cross_entropy(self.network.fuse(features), target)

    def before_update(self, features: Features, target: Tensor) -> None:
        """Where a method changes the gradients."""

    def end_epoch(self) -> None:
        """Called after each epoch."""

    def state_dict(self) -> dict[str, Any]:
        """What predicting needs after training."""
        return {"network": self.network.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self.network.load_state_dict(state["network"])

    def outputs(self, features: Features) -> Outputs:
        """What the network says, in evaluation mode and without autograd."""
        return Outputs(features, self.network.unimodal(features), self.network.fuse(features))

    def own(self, outputs: Outputs) -> dict[str, Tensor]:
        """Logits ``[N, C]`` of each modality's own classifier."""
        if self.trains_heads:
            return dict(outputs.unimodal)
        return self.network.shares(outputs.features)


class UnimodalLosses(Training):
    """The cross-entropies of the fused prediction and of each modality's head, all of weight 1."""

    trains_heads = True

    def losses(self, features: Features, target: Tensor) -> dict[str, Tensor]:
        """``"fused"``, and of each modality's head."""
        logits = {"fused": self.network.fuse(features), **self.network.unimodal(features)}
        return {name: cross_entropy(each, target) for name, each in logits.items()}

    def loss(self, features: Features, target: Tensor) -> Tensor:
        """``L(fused) + sum_m L(head_m)``."""
        return torch.stack(list(self.losses(features, target).values())).sum()


class Independent(UnimodalLosses):
    """Every encoder learns from its own head; the fusion learns on top, and teaches it nothing.

    With separate heads this is what each modality becomes when it is trained alone.
    """

    def loss(self, features: Features, target: Tensor) -> Tensor:
        """``L(fused of detached features) + sum_m L(head_m)``."""
        heads = self.network.unimodal(features).values()
        fused = self.network.fuse({name: each.detach() for name, each in features.items()})
        return torch.stack([cross_entropy(each, target) for each in (fused, *heads)]).sum()


class Shuffled(UnimodalLosses):
    """Unimodal losses, and the fusion sees other samples' features of all modalities but one.

    That one, the anchor, is the slowest to learn in the first two epochs, which are without.
    """

    PLAIN_EPOCHS = 2

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.shuffle = ShuffleModality(setup.network.names, seed=setup.seed)
        self.epoch = 0

    def loss(self, features: Features, target: Tensor) -> Tensor:
        """``L(fused of shuffled features) + sum_m L(head_m)``."""
        heads = self.network.unimodal(features)
        if self.shuffle.anchor is None:
            self.shuffle.observe(heads, target)
        fused = self.network.fuse(self.shuffle(features))
        losses = [cross_entropy(each, target) for each in (fused, *heads.values())]
        return torch.stack(losses).sum()

    def end_epoch(self) -> None:
        """Chooses the anchor."""
        self.epoch += 1
        if self.epoch == self.PLAIN_EPOCHS:
            self.shuffle.choose_anchor()


class Disentangled(UnimodalLosses):
    """DGL: as independent encoders, their losses four times as heavy."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.dgl = mmbal_fast.DGL(setup.network.names)

    def loss(self, features: Features, target: Tensor) -> Tensor:
        """``L(fused of detached features) + 4 sum_m L(head_m)``."""
        heads = self.network.unimodal(features).items()
        return self.dgl.loss(
            cross_entropy(self.network.fuse(self.dgl.detached(features)), target),
            {name: cross_entropy(each, target) for name, each in heads},
        )


class Dropped(Training):
    """OPM: joint training that drops samples' features of the modality that dominates."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.opm = mmbal_fast.OPM(setup.network.names, seed=setup.seed)

    def loss(self, features: Features, target: Tensor) -> Tensor:
        """The mean over the samples that kept a modality."""
        self.opm.observe(self.network.shares(features), target)
        kept, weight = self.opm(features)
        losses = cross_entropy(self.network.fuse(kept), target, reduction="none")
        return (losses * weight).sum() / weight.sum().clamp(min=1)


class Modulated(Training):
    """Joint training with a method that scales the encoders' gradients."""

    def __init__(self, setup: Setup, method: Callable[[Setup], Any]) -> None:
        super().__init__(setup)
        self.method = method(setup)

    def before_update(self, features: Features, target: Tensor) -> None:
        """Scores from each modality's share of the fused logits."""
        self.method.step(self.network.shares(features), target)


class Adaptive(Modulated):
    """AGM, which takes Shapley values where the fusion is not linear."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, _agm)

    def before_update(self, features: Features, target: Tensor) -> None:
        """Scores from each modality's Shapley logits."""
        self.method.step(self.network.shares(features, shapley_logits), target)


class ModulatedLosses(UnimodalLosses):
    """Unimodal losses with MLB, which scales the encoders' gradients by the heads' scores."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.mlb = mmbal_fast.MLB(setup.network.model.encoders, alpha=0.8)

    @torch.no_grad()
    def before_update(self, features: Features, target: Tensor) -> None:
        """Scores from each modality's head."""
        self.mlb.step(self.network.unimodal(features), target)


class Held(UnimodalLosses):
    """Unimodal losses with InfoReg, which holds the encoder that is ahead near its weights."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.inforeg = mmbal_fast.InfoReg(setup.network.model.encoders)

    def prepare(self) -> None:
        """Keeps the weights of the first epoch."""
        self.inforeg.start_epoch()

    @torch.no_grad()
    def before_update(self, features: Features, target: Tensor) -> None:
        """Scores from each modality's head."""
        self.inforeg.step(self.network.unimodal(features), target)

    def end_epoch(self) -> None:
        """Keeps the weights of the next epoch."""
        self.inforeg.start_epoch()


class Combined(UnimodalLosses):
    """Unimodal losses whose two gradients of each encoder MMPareto combines."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.pareto = mmbal_fast.MMPareto(setup.network.model.encoders)

    def step(self, inputs: Mapping[str, Tensor], target: Tensor) -> None:
        """One step of the optimizer."""
        losses = self.losses(self.network.encode(inputs), target)
        self.optimizer.zero_grad()
        self.pareto.backward(losses)
        self.pareto.step()
        self.optimizer.step()


class Probed(Training):
    """Joint training, slowed down where the accuracy of a head on detached features gains most."""

    trains_heads = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.method = mmbal_fast.MetricModulation(setup.network.model.encoders)

    def loss(self, features: Features, target: Tensor) -> Tensor:
        """``L(fused) + sum_m L(head_m of detached features)``."""
        heads = self.network.unimodal({name: each.detach() for name, each in features.items()})
        logits = (self.network.fuse(features), *heads.values())
        return torch.stack([cross_entropy(each, target) for each in logits]).sum()

    @torch.no_grad()
    def before_update(self, features: Features, target: Tensor) -> None:
        """Metrics from each modality's head."""
        self.method.step(self.network.unimodal(features), target)


class Relearned(Training):
    """Joint training; three times, evenly spread, encoders that memorize are pulled back."""

    TIMES = 3

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.relearning = mmbal_fast.Relearning(setup.network.model.encoders)
        self.epoch = 0

    def end_epoch(self) -> None:
        """Measures the purities and pulls back, where it is time."""
        self.epoch += 1
        parts = self.TIMES + 1
        if self.epoch in {part * self.setup.epochs // parts for part in range(1, parts)}:
            train, held_out = map(self._purities, self.setup.loaders[:2])
            gaps = {name: train[name] - held_out[name] for name in self.network.names}
            self.relearning.step(gaps, optimizer=self.optimizer)

    @torch.no_grad()
    def _purities(self, loader: Loader) -> dict[str, float]:
        self.network.eval()
        batches = [(self.network.encode(inputs), target) for inputs, target in loader]
        self.network.train()
        labels = torch.cat([target for _, target in batches])
        return {
            name: mmbal_fast.purity(torch.cat([each[name] for each, _ in batches]), labels)
            for name in self.network.names
        }


class Joined(UnimodalLosses):
    """An MMTM on the encoders' features; the sum of the heads' losses, the mean of their logits.

    With `GreedyBalancing` from the second epoch on, or without.
    """

    trains_heads = False  # none of them is of one modality alone

    def __init__(self, setup: Setup, balanced: bool) -> None:
        super().__init__(setup)
        network = setup.network
        self.mmtm = mmbal_fast.nn.MMTM(list(network.widths.values()))
        self.optimizer.add_param_group({"params": list(self.mmtm.parameters())})
        self.balancing: mmbal_fast.GreedyBalancing | None = None
        if balanced:
            branches = {
                name: (network.model.encoders[name], network.heads[name]) for name in network.names
            }
            self.balancing = mmbal_fast.GreedyBalancing(
                self.mmtm,
                warmup_steps=sum(1 for _ in setup.loaders.train),
                branches=branches,
            )

    def logits(self, features: Features) -> dict[str, Tensor]:
        """Of each branch, informed by the others."""
        joined = self.mmtm(*features.values())
        return self.network.unimodal(dict(zip(features, joined, strict=True)))

    def loss(self, features: Features, target: Tensor) -> Tensor:
        """``sum_m L(branch_m)``."""
        logits = self.logits(features).values()
        return torch.stack([cross_entropy(each, target) for each in logits]).sum()

    def before_update(self, features: Features, target: Tensor) -> None:
        """Measures the learning speeds and may open a window."""
        if self.balancing is not None:
            self.balancing.step()

    def outputs(self, features: Features) -> Outputs:
        """The mean of the branches' logits."""
        self.mmtm.eval()
        logits = self.logits(features)
        return Outputs(features, logits, torch.stack(list(logits.values())).mean(dim=0))

    def own(self, outputs: Outputs) -> dict[str, Tensor]:
        """Of each branch, which the others inform."""
        return dict(outputs.unimodal)

    def state_dict(self) -> dict[str, Any]:
        """The MMTM too."""
        return {**super().state_dict(), "mmtm": self.mmtm.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        super().load_state_dict(state)
        self.mmtm.load_state_dict(state["mmtm"])


class Blended(Training):
    """Gradient-Blending, offline: each head alone for a fifth of the epochs, then all, weighted."""

    trains_heads = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.blending = mmbal_fast.GradientBlending((*self.network.names, "fused"))

    def prepare(self) -> None:
        """Estimates the weights."""
        self.blending.weights = mmbal_fast.estimate_blending_weights(
            self.network,
            self.blending.names,
            self._train_epoch,
            lambda network: (
                self._losses(self.setup.loaders.train),
                self._losses(self.setup.loaders.validation),
            ),
            epochs=max(1, self.setup.epochs // 5),
            restore=[self.optimizer],
            verbose=False,
        ).weights

    def loss(self, features: Features, target: Tensor) -> Tensor:
        """``sum_k w_k L_k``."""
        logits = {**self.network.unimodal(features), "fused": self.network.fuse(features)}
        return self.blending.loss(logits, target)

    def state_dict(self) -> dict[str, Any]:
        """The weights too, with which one can predict."""
        return {**super().state_dict(), "weights": self.blending.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        super().load_state_dict(state)
        self.blending.weights = state["weights"]

    def _train_epoch(self, network: torch.nn.Module, weights: Tensor) -> None:
        self.blending.weights = weights
        for inputs, target in self.setup.loaders.train:
            self.step(inputs, target)

    @torch.no_grad()
    def _losses(self, loader: Loader) -> Tensor:
        """Mean of each head's loss over the samples."""
        self.network.eval()
        total, count = torch.zeros(len(self.blending.names), dtype=torch.float64), 0
        for inputs, target in loader:
            self.loss(self.network.encode(inputs), target)
            assert self.blending.last is not None
            total += self.blending.last.losses * len(target)
            count += len(target)
        self.network.train()
        return total / count


def _ogm(setup: Setup, noise: float = 0.0) -> mmbal_fast.OGMGE:
    encoders = setup.network.model.encoders
    return mmbal_fast.OGMGE(encoders, alpha=1.0, noise=noise, seed=setup.seed)


def _agm(setup: Setup) -> mmbal_fast.AGM:
    network = setup.network
    if network.head is None:
        return mmbal_fast.AGM(network.model.encoders)
    return mmbal_fast.AGM(network.model.encoders, head=network.head, widths=network.widths)


TRAININGS: dict[str, Callable[[Setup], Training]] = {
    "joint": Training,
    "independent": Independent,
    "unimodal": UnimodalLosses,
    "dgl": Disentangled,
    "opm": Dropped,
    "shuffle": Shuffled,
    "ogm": partial(Modulated, method=_ogm),
    "ogm-ge": partial(Modulated, method=partial(_ogm, noise=1.0)),
    "agm": Adaptive,
    "mlb": ModulatedLosses,
    "metric": Probed,
    "info-reg": Held,
    "mmpareto": Combined,
    "relearning": Relearned,
    "blending": Blended,
    "mmtm": partial(Joined, balanced=False),
    "mmtm-greedy": partial(Joined, balanced=True),
}
