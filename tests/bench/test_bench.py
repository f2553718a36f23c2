"""The baselines that are timed compute what they should, and the command writes what it says."""

from __future__ import annotations

import csv
import time
from functools import partial

import pytest
import torch
from rich.console import Console
from torch import nn

import mmbal_fast
from mmbal_fast import functional
from mmbal_fast.bench import DTYPES, Case, _baselines, _methods, _pairs, all_cases, main, run
from mmbal_fast.bench._measure import Provider, Timing, count, interleaved
from mmbal_fast.bench._providers import OURS, PLAIN, PUBLISHED, USUAL, step
from mmbal_fast.bench._workloads import GRADIENTS, SCORING, Features, Gradients, Scoring

CPU = torch.device("cpu")


def test_baselines_agree_on_the_coefficients():
    logits, target = Scoring(2, 32, 6).make(torch.float32, CPU)
    logits[1] *= 3
    for order in (logits, logits[::-1]):
        scores = functional.contribution_scores(order, target)
        ours = functional.modulation_coefficients(functional.discrepancy_ratios(scores), 0.3)
        found, published = _baselines.published_coefficients(order, target, 0.3)
        assert found == pytest.approx(scores.tolist(), rel=1e-5)
        assert published == pytest.approx(ours.tolist(), rel=1e-5)
        plain = _baselines.plain_coefficients(order, target, 0.3)
        torch.testing.assert_close(plain, ours)
        assert min(published) < 1 == max(published)


def test_published_steps_of_other_methods_agree_with_ours():
    small = Gradients("small", (((8, 8),), ((4, 4),)))
    for part in _methods.PARTS:
        providers = {each.name: each for each in _methods.PARTS[part](small, torch.float32, CPU)}
        # The first step of metric modulation is an error of the released code, see its page.
        ours, theirs = providers[_methods.OURS], providers[_methods.PUBLISHED]
        assert count(ours.run).synchronisations == 0, part
        assert count(theirs.run).synchronisations > 1, part
    logits, target = Scoring(2, 32, 6).make(torch.float32, CPU)
    logits[1] *= 3
    pairs = [nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    encoders = {"a": pairs[:1], "b": pairs[1:]}
    memories: list[dict] = [{}, {}]
    agm, mlb = mmbal_fast.AGM(encoders, alpha=0.8), mmbal_fast.MLB(encoders, alpha=0.8)
    for _ in range(3):
        logits = [each.roll(1, 0) for each in logits]
        for method, published, memory in zip(
            (agm, mlb),
            (_baselines.published_agm_coefficients, _baselines.published_mlb_coefficients),
            memories,
            strict=True,
        ):
            for each in pairs:
                each.grad = torch.ones(2, 2)
            found = method.step(dict(zip("ab", logits, strict=True)), target).coefficients
            expected = published(logits, target, memory)
            assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_published_mask_scales_as_ours():
    features = Features(50, (4, 12)).make(torch.float32, CPU)
    (first, second), gone = _baselines.published_dropping(features, [0.5, 0.25])
    factor = 1 / (1 - (4 * 0.5 + 12 * 0.25) / 16)
    for one, other in ((first, features[0]), (second, features[1])):
        kept = one.abs().sum(1) > 0
        torch.testing.assert_close(one[kept], factor * other[kept])
    assert torch.equal(gone, (first.abs().sum(1) + second.abs().sum(1)) == 0)


@pytest.mark.parametrize("noise", [False, True])
def test_baselines_update_alike(noise):
    torch.manual_seed(0)
    before = [torch.randn(60, 70) * scale + 1 for scale in (1.0, 5.0)]
    results = {}
    for name in ("ours", "published", "plain"):
        grads = [grad.clone() for grad in before]
        if name == "ours":
            functional.modulate_(grads, torch.tensor([0.25, 1.0]), [0, 1], noise=float(noise))
        elif name == "published":
            _baselines.published_update_(grads, [0.25, 1.0], [0, 1], noise)
        else:
            _baselines.plain_update_(grads, torch.tensor([0.25, 1.0]), [0, 1], noise)
        results[name] = grads
    for grads in results.values():
        for grad, old, k in zip(grads, before, (0.25, 1.0), strict=True):
            residual = grad - k * old
            if noise:
                assert residual.std().item() == pytest.approx(old.std().item(), rel=0.05)
                assert abs(residual.mean().item()) < 0.05 * old.std().item()
            else:
                torch.testing.assert_close(grad, k * old)


def test_workloads_have_the_sizes_they_are_known_by():
    assert len(GRADIENTS["av-resnet18"].modality) == 40
    assert GRADIENTS["av-resnet18"].elements == pytest.approx(22.3e6, rel=0.01)
    assert GRADIENTS["vit-b-pair"].elements == pytest.approx(172e6, rel=0.01)
    assert len(GRADIENTS["many"].modality) == 1000
    assert {(each.modalities, each.classes) for each in SCORING} >= {(2, 6), (3, 310), (8, 21000)}


def test_a_step_of_ours_reads_nothing_and_starts_two_kernels():
    small = Gradients("small", (((8, 8),) * 5, ((8, 8),) * 5))
    providers = {each.name: each for each in step(small, torch.float32, CPU, True, False)}
    providers[OURS].restore()
    for _ in range(2):  # the first call makes what later ones keep
        counts = count(providers[OURS].run)
    assert (counts.launches, counts.synchronisations, counts.extra_bytes) == (2, 0, 0)
    published = count(providers[PUBLISHED].run)
    assert published.synchronisations > 10 * 1 + 2 * 64
    assert count(providers[PLAIN].run).synchronisations == 0


def test_counts_memory_that_is_held_at_once():
    def run():
        first = torch.ones(1000)
        del first
        second = torch.ones(500)
        return second + 1

    assert count(run).extra_bytes == 4000


def test_providers_take_turns():
    calls: list[str] = []

    def slowly(name):
        time.sleep(2e-3)
        calls.append(name)

    providers = [Provider(name, partial(slowly, name)) for name in ("a", "b", "c")]
    timings = interleaved(providers, CPU, seconds=0.0)
    assert calls[:6] == ["a", "a", "b", "b", "c", "c"]
    rounds = list(zip(*[iter(calls[6:])] * 3, strict=True))
    assert len(rounds) == 5
    assert {frozenset(each) for each in rounds} == {frozenset("abc")}
    assert len(set(rounds)) > 1  # none is always the one after the slowest
    assert {len(each.seconds) for each in timings.values()} == {5}
    assert Timing([1.0, 2.0, 3.0, 4.0, 5.0]).quantile(0.2) == pytest.approx(1.8)


def test_what_is_short_is_warm():
    events: list[str] = []
    provider = Provider("a", lambda: events.append("run"), lambda: events.append("restore"))
    interleaved([provider], CPU, seconds=0.0)
    assert events == ["restore", "run"] * 2 + ["restore", "run", "restore", "run"] * 5


def test_the_cache_is_emptied_before_cold_runs(monkeypatch):
    events: list[str] = []

    class Memory:
        def zero_(self):
            events.append("evict")

    monkeypatch.setattr(torch, "empty", lambda size, **kwargs: Memory())
    provider = Provider("a", lambda: events.append("run"), lambda: events.append("restore"))
    interleaved([provider], CPU, seconds=0.0, cold=True)
    assert events == ["restore", "evict", "run"] * 7


def test_threads_of_a_case():
    def threads_of(case):
        (row,) = (row for row in run([case], CPU, Console(quiet=True)) if row.provider == OURS)
        return row.threads

    torch.set_num_threads(2)
    small = Gradients("small", (((8, 8),), ((8, 8),)))
    assert threads_of(Case(small, torch.float32, seconds=0.0, threads=1)) == 1
    assert threads_of(Case(small, torch.float32, seconds=0.0)) == 2
    assert torch.get_num_threads() == 2


def test_cases_of_devices():
    on = {name: list(all_cases(True, torch.device(name))) for name in ("cpu", "cuda")}
    assert {case.threads for case in on["cpu"]} == {None, 1}
    assert {case.threads for case in on["cuda"]} == {None}
    assert [case.name for case in on["cpu"] if case.cold] == ["score-2x64x310, cold"]
    cold = [case for case in on["cuda"] if case.cold]
    steps = [case for case in cold if isinstance(case.workload, Gradients)]
    assert {(case.name, case.dtype, case.noise) for case in steps} == {
        ("av-resnet18, cold", dtype, noise) for dtype in DTYPES for noise in (True, False)
    }
    assert sum(case.compiled for case in on["cpu"]) == 2


def test_other_types_are_timed_beside_the_usual_one():
    small = (((3, 3),), ((4, 4),))
    cases = [
        Case(Gradients("small", small), torch.bfloat16, noise=True),
        Case(GRADIENTS["av-resnet18"], torch.float32, noise=True),
        Case(GRADIENTS["av-resnet18"], torch.bfloat16),
        Case(GRADIENTS["av-resnet18"], torch.bfloat16, noise=True),
        Case(GRADIENTS["av-resnet18 channels_last"], torch.float32, noise=True),
    ]
    found = [[each.name for each in case.providers(CPU)].count(USUAL) for case in cases]
    assert found == [0, 0, 0, 1, 1]


def test_steps_that_walk_several_lists():
    """MMPareto and InfoReg in one call that reads nothing; published, the host reads and clones."""
    small = Gradients("small", (((8, 8),) * 3, ((8, 8),) * 3))
    cases = [Case(small, torch.float32, part=part, seconds=0.0) for part in _pairs.PARTS]
    rows = {(row.workload, row.provider): row for row in run(cases, CPU, Console(quiet=True))}
    for part in _pairs.PARTS:
        ours = rows[f"{part} small", OURS]
        assert (ours.launches, ours.synchronisations) == (1 + (part != "mmpareto"), 0)
        assert ours.peak_extra_bytes <= 8 * 3 * 6  # what it returns
    assert rows["mmpareto small", PUBLISHED].synchronisations > 0
    assert rows["mmpareto small", PUBLISHED].peak_extra_bytes > 3 * 6 * 64 * 4
    assert rows["info_reg small", PUBLISHED].peak_extra_bytes >= 6 * 64 * 4
    assert [each.least_bytes // (6 * 64 * 4) for each in cases] == [2, 5, 4]


def test_channels_last_gradients():
    workload = GRADIENTS["av-resnet18 channels_last"]
    grads = workload.make(torch.bfloat16, CPU)
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in grads)
    assert sum(g.numel() for g in grads) == workload.elements
    plain = GRADIENTS["av-resnet18"].make(torch.bfloat16, CPU)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))


def test_least_bytes():
    work = Gradients("small", (((8,),), ((8,),)))
    assert Case(work, torch.float32).least_bytes == 16 * 4 * 2
    assert Case(work, torch.bfloat16, part="moments").least_bytes == 16 * 2
    assert Case(Scoring(3, 2, 5), torch.float32).least_bytes == 30 * 4


def test_command_writes_table_csv_and_picture(tmp_path, capsys):
    assert main(["--quick", "--only", "tiny", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "tiny float32 noise" in printed
    (table,) = tmp_path.glob("*.csv")
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {row["provider"] for row in rows} == {"mmbal_fast", "published", "plain", "floor"}
    for row in rows:
        assert float(row["median_ms"]) > 0
        assert row["machine"]
        assert row["torch"] == torch.__version__


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--only", "nothing like it"]])
def test_command_refuses(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--quick", *arguments])
    assert arguments[1] in capsys.readouterr().err
