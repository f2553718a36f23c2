"""`MMTM` against its formula, written out sample by sample."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmbal_fast.nn import MMTM
from tests.defaults import default

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "vectors": [(3,), (5,)],
    "maps of different sizes": [(3, 4, 5), (2, 7)],
    "three branches": [(3, 2, 2), (4,), (2, 3, 2, 2)],
    "wide to narrow": [(8, 6), (1, 2, 2)],
}


def make(shapes: Sequence[tuple[int, ...]], batch: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, generator=generator).double() for shape in shapes]


def module(shapes: Sequence[tuple[int, ...]], *, trained_on: int = 0) -> MMTM:
    torch.manual_seed(1)
    mmtm = MMTM([shape[0] for shape in shapes]).double()
    for seed in range(trained_on):
        mmtm(*make(shapes, batch=3 + seed, seed=10 + seed))
    return mmtm


def squeeze(features: Sequence[Tensor]) -> list[Tensor]:
    return [x.reshape(x.shape[0], x.shape[1], -1).mean(-1) for x in features]


def literal_gates(
    mmtm: MMTM, features: Sequence[Tensor], hidden: set[tuple[int, int]]
) -> list[Tensor]:
    """Gates of each branch; ``(m, j)`` in ``hidden``: branch m sees the average of branch j."""
    averages = mmtm.running_squeeze.split(list(mmtm.channels))
    result = []
    for m, layer in enumerate(mmtm.gates):
        assert isinstance(layer, torch.nn.Linear)
        rows = []
        for i in range(features[0].shape[0]):
            z = torch.cat(
                [averages[j] if (m, j) in hidden else s[i] for j, s in enumerate(squeeze(features))]
            )
            e = (mmtm.squeeze.weight @ z + mmtm.squeeze.bias).clamp(min=0)
            rows.append(1 / (1 + torch.exp(-(layer.weight @ e + layer.bias))))
        result.append(torch.stack(rows))
    return result


def literal(features: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.stack([x[i] * g[i].reshape(-1, *[1] * (x.ndim - 2)) for i in range(len(x))])
        for x, g in zip(features, gates, strict=True)
    ]


def isolated(branches: int) -> set[tuple[int, int]]:
    return {(m, j) for m in range(branches) for j in range(branches) if m != j}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_normal_mode_is_the_formula(shapes: list[tuple[int, ...]], training: bool) -> None:
    mmtm, features = module(shapes, trained_on=2).train(training), make(shapes)
    expected = literal(features, literal_gates(mmtm, features, set()))
    for found, wanted in zip(mmtm(*features), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("branch", [None, 0, 1])
def test_isolated_branches_see_averages_of_the_others(
    shapes: list[tuple[int, ...]], training: bool, branch: int | None
) -> None:
    mmtm, features = module(shapes, trained_on=2).train(training), make(shapes)
    mmtm.set_mode("isolated", branch)
    hidden = {pair for pair in isolated(len(shapes)) if branch in (None, pair[0])}
    expected = literal(features, literal_gates(mmtm, features, hidden))
    for found, wanted in zip(mmtm(*features), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("branch", [None, 0, 1])
def test_average_gates_include_the_batch(shapes: list[tuple[int, ...]], branch: int | None) -> None:
    mmtm, features = module(shapes, trained_on=2), make(shapes)
    mmtm.set_mode("average_gate", branch)
    gates = literal_gates(mmtm, features, set())
    found = mmtm(*features)
    for m, average in enumerate(mmtm.running_gate.split(list(mmtm.channels))):
        if branch in (None, m):
            gates[m] = average.expand_as(gates[m])
    for one, wanted in zip(found, literal(features, gates), strict=True):
        torch.testing.assert_close(one, wanted)


def test_average_gates_act_in_training_only() -> None:
    shapes = SHAPES["three branches"]
    mmtm, features = module(shapes, trained_on=2).eval(), make(shapes)
    normal = mmtm(*features)
    mmtm.set_mode("average_gate", 1)
    for found, wanted in zip(mmtm(*features), normal, strict=True):
        assert torch.equal(found, wanted)


def test_normal_mode_clears_every_switch() -> None:
    shapes = SHAPES["three branches"]
    mmtm, features = module(shapes, trained_on=1).eval(), make(shapes)
    normal = mmtm(*features)
    mmtm.set_mode("isolated")
    assert not torch.equal(mmtm(*features)[0], normal[0])
    mmtm.set_mode("average_gate")
    assert not mmtm.replace_squeeze.any()
    mmtm.set_mode("normal")
    assert not mmtm.average_gate.any()
    assert torch.equal(mmtm(*features)[0], normal[0])


def test_isolated_branch_does_not_depend_on_the_others() -> None:
    mmtm = module(SHAPES["three branches"], trained_on=2)
    mmtm.set_mode("isolated", 1)
    features = [x.requires_grad_() for x in make(SHAPES["three branches"])]
    mmtm(*features)[1].sum().backward()
    assert features[1].grad is not None
    assert features[1].grad.abs().sum() > 0
    assert all(x.grad is None or not x.grad.any() for x in (features[0], features[2]))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_averages_run_over_all_samples_of_their_own_branch(shapes: list[tuple[int, ...]]) -> None:
    mmtm = module(shapes)
    batches = [make(shapes, batch=size, seed=size) for size in (5, 1, 3)]
    for batch in batches:
        mmtm(*batch)
    squeezes = [torch.cat(s) for s in zip(*(squeeze(b) for b in batches), strict=True)]
    gates = [
        torch.cat(g) for g in zip(*(literal_gates(mmtm, b, set()) for b in batches), strict=True)
    ]
    assert mmtm.num_samples == 9
    channels = list(mmtm.channels)
    for m in range(len(shapes)):
        torch.testing.assert_close(mmtm.running_squeeze.split(channels)[m], squeezes[m].mean(0))
        torch.testing.assert_close(mmtm.running_gate.split(channels)[m], gates[m].mean(0))


def test_averages_rest_in_evaluation() -> None:
    mmtm = module(SHAPES["vectors"], trained_on=2).eval()
    before = copy.deepcopy(mmtm.state_dict())
    mmtm(*make(SHAPES["vectors"]))
    assert all(torch.equal(value, before[name]) for name, value in mmtm.state_dict().items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_averages_leave_out_a_batch_that_is_not_finite(bad: float) -> None:
    mmtm = module(SHAPES["vectors"], trained_on=1)
    before = copy.deepcopy(mmtm.state_dict())
    features = make(SHAPES["vectors"])
    features[1][2, 0] = bad
    mmtm(*features)
    assert all(torch.equal(value, before[name]) for name, value in mmtm.state_dict().items())


def test_empty_batch_changes_nothing() -> None:
    mmtm = module(SHAPES["vectors"])
    found = mmtm(*make(SHAPES["vectors"], batch=0))
    assert [list(x.shape) for x in found] == [[0, 3], [0, 5]]
    assert not mmtm.running_gate.any()
    assert mmtm.num_samples == 0


def test_averages_can_be_forgotten() -> None:
    mmtm = module(SHAPES["vectors"], trained_on=1)
    mmtm.reset_averages()
    assert not any(t.any() for t in (mmtm.running_gate, mmtm.running_squeeze, mmtm.num_samples))


@pytest.mark.parametrize("mode", ["normal", "isolated"])
def test_gradcheck(mode: str) -> None:
    shapes = [(2, 2), (3,)]
    mmtm = module(shapes, trained_on=2).eval()
    mmtm.set_mode(mode)  # type: ignore[arg-type]
    parameters = list(mmtm.parameters())
    inputs = [*make(shapes, batch=2), *(p.detach().clone() for p in parameters)]

    def run(x: Tensor, y: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(dict(mmtm.named_parameters()), values, strict=True))
        return torch.func.functional_call(mmtm, named, (x, y))

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs])


def test_average_gate_passes_the_gradient_of_a_constant() -> None:
    shapes = [(2, 2), (3,)]
    mmtm = module(shapes, trained_on=2)
    mmtm.set_mode("average_gate", 0)
    x, y = (each.requires_grad_() for each in make(shapes))
    out, _ = mmtm(x, y)
    weight = torch.rand_like(out)
    (out * weight).sum().backward()
    average = mmtm.running_gate[:2]
    torch.testing.assert_close(x.grad, weight * average[:, None])
    assert y.grad is None or not y.grad.any()
    for parameter in mmtm.parameters():
        assert parameter.grad is None or not parameter.grad.any()


def test_checkpoint_holds_averages_and_no_switches() -> None:
    mmtm = module(SHAPES["vectors"], trained_on=2)
    mmtm.set_mode("average_gate")
    file = io.BytesIO()
    torch.save(mmtm.state_dict(), file)
    file.seek(0)
    other = MMTM([3, 5]).double()
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.running_gate, mmtm.running_gate)
    assert torch.equal(other.running_squeeze, mmtm.running_squeeze)
    assert other.num_samples == 7
    assert not other.average_gate.any()
    features = make(SHAPES["vectors"])
    assert torch.equal(other.eval()(*features)[0], mmtm.eval()(*features)[0])


def test_moves_with_its_buffers() -> None:
    mmtm = MMTM([3, 5]).to("meta")
    assert all(buffer.is_meta for buffer in mmtm.buffers())
    made = MMTM([3, 5], device="meta", dtype=torch.float64)
    assert made.running_gate.dtype == torch.float64
    assert all(t.is_meta for t in [*made.buffers(), *made.parameters()])


def test_compiles_into_one_graph_that_serves_every_mode() -> None:
    shapes = SHAPES["three branches"]
    mmtm, features = module(shapes, trained_on=1), make(shapes)
    other = copy.deepcopy(mmtm)
    compiled = torch.compile(mmtm, fullgraph=True, backend="aot_eager")
    compiled(*features), other(*features)
    with torch.compiler.set_stance("fail_on_recompile"):
        for mode, branch in [("normal", None), ("average_gate", 1), ("isolated", None)]:
            for each in (mmtm, other):
                each.set_mode(mode, branch)  # type: ignore[arg-type]
            for found, wanted in zip(compiled(*features), other(*features), strict=True):
                torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(mmtm.running_gate, other.running_gate)
    assert mmtm.num_samples == other.num_samples


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mmtm = MMTM([3, 5])
    mmtm.set_mode("average_gate", 0)
    with torch.autocast("cpu", dtype=dtype):
        x, y = mmtm(torch.randn(4, 3), torch.randn(4, 5, 2).to(dtype))
    assert (x.dtype, y.dtype) == (torch.float32, dtype)
    assert mmtm.running_gate.dtype == torch.float32
    assert mmtm.num_samples == 4


def test_bypass_is_the_squeeze_layer_and_the_own_gate_layer() -> None:
    mmtm = MMTM([3, 5, 2])
    expected = [*mmtm.squeeze.parameters(), *mmtm.gates[1].parameters()]
    assert [id(p) for p in mmtm.bypass_parameters(1)] == [id(p) for p in expected]


@pytest.mark.parametrize(
    ("channels", "ratio", "width"), [([128, 128], 4, 128), ([3, 4], 4, 3), ([1, 1], 64, 1)]
)
def test_width_of_the_bottleneck(channels: list[int], ratio: float, width: int) -> None:
    mmtm = MMTM(channels, ratio)
    assert mmtm.squeeze.out_features == width
    assert f"channels={channels}, ratio={ratio}" in repr(mmtm)


@pytest.mark.parametrize(
    ("channels", "ratio", "message"),
    [
        ([4], 4, r"at least two branches \(got 1\)"),
        ([4, 0], 4, r"at least 1 \(got \[4, 0\]\)"),
        ([4, 4], 0, r"ratio must be above 0 \(got 0\)"),
        ([4, 4], float("nan"), r"ratio must be above 0 \(got nan\)"),
    ],
)
def test_refuses_to_be_made(channels: list[int], ratio: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"MMTM: .*{message}"):
        MMTM(channels, ratio)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(4, 3)], r"2 branches \(got 1\)"),
        ([(4, 3), (4, 5), (4, 5)], r"2 branches \(got 3\)"),
        ([(4, 3), (4, 3, 5)], r"branch 1 must be \[B, 5, ...\] \(got \[4, 3, 5\]\)"),
        ([(3,), (4, 5)], r"branch 0 must be \[B, 3, ...\] \(got \[3\]\)"),
        ([(4, 3), (2, 5)], r"batch size of branch 0, 4 \(got 2 for branch 1\)"),
    ],
)
def test_refuses_features(shapes: list[tuple[int, ...]], message: str) -> None:
    mmtm = MMTM([3, 5])
    with pytest.raises(ValueError, match=f"MMTM: .*{message}"):
        mmtm(*(torch.randn(shape) for shape in shapes))
    assert mmtm.num_samples == 0


@pytest.mark.parametrize(
    ("mode", "branch", "message"),
    [("off", None, "got 'off'"), ("isolated", 2, "got 2"), ("average_gate", -1, "got -1")],
)
def test_refuses_modes(mode: str, branch: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMTM([3, 5]).set_mode(mode, branch)  # type: ignore[arg-type]


DEFAULTS = [torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DEFAULTS, ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_defaults_of_torch_do_not_matter(dtype: torch.dtype, device: str) -> None:
    def run(mmtm: MMTM) -> list[Tensor]:
        mmtm.squeeze.requires_grad_(False)
        for parameter in mmtm.parameters():
            torch.nn.init.constant_(parameter, 0.1)
        outs = []
        for branch in (None, 0, 1):
            for mode in ("normal", "average_gate", "isolated"):
                mmtm.set_mode(mode, branch)  # type: ignore[arg-type]
                outs += mmtm(*features)
        mmtm.eval()
        return [*outs, *mmtm(*features), *mmtm.state_dict().values()]

    features = [x.float() for x in make(SHAPES["three branches"])]
    expected = run(MMTM([3, 4, 2], device="cpu", dtype=torch.float32))
    with default(dtype), default(device):
        found = run(MMTM([3, 4, 2], device="cpu", dtype=torch.float32))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@contextmanager
def filled_memory() -> Iterator[None]:
    """What was never written holds NaN, True and the largest numbers."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("assign", [False, True])
def test_made_on_meta_and_loaded(assign: bool) -> None:
    trained = module(SHAPES["three branches"], trained_on=2)
    with torch.device("meta"):
        mmtm = MMTM([3, 4, 2], dtype=torch.float64)
    mmtm.set_mode("average_gate")  # has no memory to be kept in
    if not assign:
        with filled_memory():
            mmtm.to_empty(device="cpu")
    mmtm.load_state_dict(trained.state_dict(), assign=assign)
    features = make(SHAPES["three branches"])
    for training in (True, False):
        found, expected = mmtm.train(training)(*features), trained.train(training)(*features)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    for each in (mmtm, trained):
        each.set_mode("isolated")
    found, expected = mmtm(*features), trained(*features)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_made_on_meta_and_initialised() -> None:
    with torch.device("meta"):
        mmtm = MMTM([3, 4, 2], dtype=torch.float64)
    with filled_memory():
        mmtm.to_empty(device="cpu")
    torch.manual_seed(1)
    mmtm.reset_parameters()
    torch.manual_seed(1)
    made = MMTM([3, 4, 2], dtype=torch.float64)
    features = make(SHAPES["three branches"])
    assert all(torch.equal(x, y) for x, y in zip(mmtm(*features), made(*features), strict=True))
    for name, value in made.state_dict().items():
        assert torch.equal(mmtm.state_dict()[name], value), name


def test_initialising_anew_forgets_averages_and_modes() -> None:
    mmtm = module(SHAPES["vectors"], trained_on=2)
    before = mmtm.squeeze.weight.clone()
    mmtm.set_mode("isolated")
    mmtm.reset_parameters()
    assert not torch.equal(mmtm.squeeze.weight, before)
    assert not mmtm.replace_squeeze.any()
    assert not any(t.any() for t in (mmtm.running_gate, mmtm.running_squeeze, mmtm.num_samples))


def test_switches_follow_the_module() -> None:
    mmtm = MMTM([3, 5])
    mmtm.set_mode("isolated", 1)
    switches = mmtm.replace_squeeze.clone()
    assert mmtm.to("meta").replace_squeeze.is_meta
    assert mmtm.average_gate.is_meta
    mmtm = MMTM([3, 5])
    mmtm.set_mode("isolated", 1)
    for copied in (mmtm.double(), copy.deepcopy(mmtm), pickle.loads(pickle.dumps(mmtm))):
        assert torch.equal(copied.replace_squeeze, switches)
        assert copied.replace_squeeze.dtype == torch.bool


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("in_checkpoint", "hook"),
    [(True, False), (True, True), (False, True)],
    ids=["loaded", "loaded, with an initialiser", "initialised"],
)
def test_from_pretrained(tmp_path: Path, in_checkpoint: bool, hook: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class Model(transformers.PreTrainedModel):  # type: ignore[misc, name-defined]
        config_class = transformers.PretrainedConfig

        def __init__(self, config: object) -> None:
            super().__init__(config)
            self.encoder = torch.nn.Linear(4, 3)
            if not getattr(config, "plain", False):
                self.mmtm = MMTM([3, 5])
            self.post_init()

        def _init_weights(self, module: torch.nn.Module) -> None:
            if hook and isinstance(module, torch.nn.Linear | MMTM):
                module.reset_parameters()

    trained = Model(transformers.PretrainedConfig(plain=not in_checkpoint))
    features = [x.float() for x in make(SHAPES["vectors"])]
    if in_checkpoint:
        trained.mmtm(*features)
    trained.save_pretrained(tmp_path)
    with filled_memory():
        model = Model.from_pretrained(tmp_path, config=transformers.PretrainedConfig()).train()
    if in_checkpoint:
        expected = trained.train().mmtm(*features)
        found = model.mmtm(*features)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    else:
        assert model.mmtm.num_samples == 0
        found = model.mmtm(*features)
        assert all(x.isfinite().all() for x in found)
        assert model.mmtm.running_gate.isfinite().all()


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def reduced(mmtm: MMTM, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The groups that a forward in training averages over."""
    groups: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda _, group: groups.append(group))
        mmtm.train()(*make(SHAPES["vectors"]))
    return groups


def test_a_copy_averages_over_the_same_group(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    mmtm = module(SHAPES["vectors"])
    mmtm.process_group = dist.new_group([0])
    model: Any = torch.nn.ModuleDict({"mmtm": mmtm})
    copied = copy.deepcopy(model)["mmtm"]
    average = torch.optim.swa_utils.AveragedModel(model).module["mmtm"]  # type: ignore[index]
    assert isinstance(copied, MMTM)
    assert copied.squeeze.weight is not mmtm.squeeze.weight
    for each in (copied, average):
        assert reduced(each, monkeypatch) == [mmtm.process_group]


@pytest.mark.parametrize("whole", [False, True])
def test_a_saved_module_joins_all_ranks_again(
    group: None, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    mmtm = module(SHAPES["vectors"])
    mmtm.process_group = dist.group.WORLD
    file = io.BytesIO()
    if whole:
        torch.save(mmtm, file)
    else:
        pickle.dump(mmtm, file)
    assert mmtm.process_group is dist.group.WORLD

    def load() -> MMTM:
        file.seek(0)
        loaded = torch.load(file, weights_only=False) if whole else pickle.load(file)
        assert isinstance(loaded, MMTM)
        return loaded

    first = load()
    dist.destroy_process_group()
    assert reduced(first, monkeypatch) == []  # alone, until there are ranks
    again = pickle.loads(pickle.dumps(first))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for each in (first, again, load()):
        assert reduced(each, monkeypatch) == [dist.group.WORLD]


def test_a_saved_module_asks_for_its_group(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    mmtm = module(SHAPES["vectors"])
    mmtm.process_group = dist.new_group([0])
    loaded = pickle.loads(pickle.dumps(mmtm))
    loaded.eval()(*make(SHAPES["vectors"]))
    with pytest.raises(RuntimeError, match=r"MMTM: process_group must be assigned again .* \(got"):
        loaded.train()(*make(SHAPES["vectors"]))
    loaded.process_group = None
    assert reduced(loaded, monkeypatch) == []
    loaded.process_group = mmtm.process_group
    assert reduced(loaded, monkeypatch) == [mmtm.process_group]


def test_weights_of_the_released_code() -> None:
    """Its ``state_dict``, by the function in docs/migrating.md, computes what it computed."""
    released = torch.nn.Module()
    released.fc_squeeze = torch.nn.Linear(8, 4)
    released.fc_visual = torch.nn.Linear(4, 3)
    released.fc_skeleton = torch.nn.Linear(4, 5)

    page = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
    block = re.search(r"^```python\n(def convert.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert block is not None
    names: dict[str, Any] = {
        "MMTM": MMTM,
        "old": released.state_dict(),
        "visual_channels": 3,
        "skeleton_channels": 5,
    }
    exec(block[1], names)

    visual, skeleton = torch.randn(6, 3, 2, 2), torch.randn(6, 5, 7)
    squeezed = torch.cat([visual.mean((2, 3)), skeleton.mean(2)], 1)
    excitation = released.fc_squeeze(squeezed).relu()
    gates = released.fc_visual(excitation), released.fc_skeleton(excitation)
    found = names["mmtm"](visual, skeleton)
    torch.testing.assert_close(found[0], visual * gates[0].sigmoid()[:, :, None, None])
    torch.testing.assert_close(found[1], skeleton * gates[1].sigmoid()[:, :, None])
