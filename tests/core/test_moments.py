"""Moments: the same numbers, however the samples are cut, merged, stored or reduced."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from rksp_core.moments import Moments

WIDTH = 7


def stream(count: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    x[:, 0] += 1e4  # a channel with a large mean, as real residual streams have
    y = x + 0.1 * torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def plain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    xc, yc = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    return torch.stack([xc.T @ xc, yc.T @ xc, yc.T @ yc])


def assert_same(a: Moments, b: Moments) -> None:
    assert a.count == b.count
    assert a.distinct == b.distinct
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.second, b.second, rtol=1e-12, atol=1e-12 * float(b.second.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_plain_formula(dtype: torch.dtype) -> None:
    x, y = stream(50, 0, dtype)
    moments = Moments(WIDTH)
    moments.update(x, y)
    torch.testing.assert_close(moments.second, plain(x, y), rtol=1e-12, atol=1e-12)


@given(cuts=st.lists(st.integers(1, 20), min_size=1, max_size=6), order=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_merging_parts_in_any_order_equals_one_pass(cuts: list[int], order: object) -> None:
    x, y = stream(sum(cuts), 1)
    whole = Moments(WIDTH)
    whole.update(x, y)
    parts = []
    for a, b in zip(x.split(cuts), y.split(cuts), strict=True):
        part = Moments(WIDTH)
        part.update(a, b)
        parts.append(part)
    order.shuffle(parts)  # type: ignore[attr-defined]
    first = parts[0]
    for part in parts[1:]:
        first.merge(part)
    assert_same(first, whole)


@given(cuts=st.lists(st.integers(1, 8), min_size=1, max_size=5), bound=st.integers(1, 20))
@settings(deadline=None, max_examples=30)
def test_keeping_snapshots_changes_nothing(cuts: list[int], bound: int) -> None:
    x, y = stream(sum(cuts), 2)
    kept, folded = Moments(WIDTH, samples=bound), Moments(WIDTH)
    for a, b in zip(x.split(cuts), y.split(cuts), strict=True):
        kept.update(a, b)
        folded.update(a, b)
    assert_same(kept, folded)


def test_snapshots_are_never_larger_than_the_moments() -> None:
    x, y = stream(3 * WIDTH, 3)
    for count in range(1, 3 * WIDTH):
        moments = Moments(WIDTH, samples=count)
        moments.update(x[:count], y[:count])
        kept = moments.snapshots
        assert kept is None or kept[0].numel() + kept[1].numel() <= moments.second.numel()


def test_snapshots_are_kept_only_while_they_are_smaller_than_the_moments() -> None:
    x, y = stream(30, 3)
    moments = Moments(WIDTH, samples=10)
    moments.update(x[:10], y[:10])
    assert moments.snapshots is not None
    moments.update(x[10:], y[10:])
    assert moments.snapshots is None


@pytest.mark.parametrize("samples", [None, 10])
def test_save_load_and_pickle(tmp_path: Path, samples: int | None) -> None:
    x, y = stream(10, 4, torch.float32)
    moments = Moments(WIDTH, samples=samples)
    moments.update(x, y)
    moments.save(tmp_path / "moments.npz")
    for copy in (Moments.load(tmp_path / "moments.npz"), pickle.loads(pickle.dumps(moments))):
        assert_same(copy, moments)
        assert copy.rounding == moments.rounding


def test_counts_distinct_rows_and_the_coarsest_rounding() -> None:
    x, y = stream(5, 5, torch.float32)
    moments = Moments(WIDTH)
    moments.update(x, y)
    moments.update(x, y)
    assert (moments.count, moments.distinct) == (10, 5)
    assert moments.rounding == 2.0**-25
    moments.update(x.bfloat16(), y.bfloat16())
    assert moments.rounding == 2.0**-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 1.0), (0.0, 1.0, 2.0, 3.0)])
def test_rows_of_few_different_bits_are_told_apart(dtype: torch.dtype, values: tuple[float, ...]) -> None:
    """Such float64 values differ in their highest bits alone, where a linear form modulo 2^64 keeps little."""
    picks = torch.randint(0, len(values), (4096, 64), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor(values, dtype=dtype)[picks]
    moments = Moments(64)
    moments.update(rows, rows)
    assert moments.distinct == len(rows.unique(dim=0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("samples", [None, 10])
def test_a_sample_that_is_not_finite_is_noticed(bad: float, samples: int | None) -> None:
    x, y = stream(10, 6)
    moments = Moments(WIDTH, samples=samples)
    moments.update(x, y)
    assert moments.finite
    y[3, 2] = bad
    moments = Moments(WIDTH, samples=samples)
    moments.update(x, y)
    assert not moments.finite


def test_refuses_other_shapes_with_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"shape \(tokens, 7\), got \(3, 6\)"):
        Moments(WIDTH).update(torch.zeros(3, 6), torch.zeros(3, 6))
    with pytest.raises(ValueError, match="floating"):
        Moments(WIDTH).update(*[torch.zeros(3, 7).to(torch.float8_e4m3fn)] * 2)
    with pytest.raises(ValueError, match="cannot be merged"):
        Moments(WIDTH).merge(Moments(3))


def _reduce(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    x, y = stream(40, 7)
    moments = Moments(WIDTH, samples=1000)
    if rank < 2:  # the last rank has no samples
        moments.update(x[rank * 10 : rank * 10 + 10 + rank], y[rank * 10 : rank * 10 + 10 + rank])
    moments.all_reduce()
    moments.save(f"{folder}/{rank}.npz")
    dist.destroy_process_group()


def test_all_reduce_over_real_processes_equals_one_pass(tmp_path: Path) -> None:
    mp.spawn(_reduce, args=(3, str(tmp_path)), nprocs=3)
    x, y = stream(40, 7)
    rows = [*range(10), *range(10, 21)]
    whole = Moments(WIDTH)
    whole.update(x[rows], y[rows])
    for rank in range(3):
        assert_same(Moments.load(tmp_path / f"{rank}.npz"), whole)
