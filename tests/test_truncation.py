"""The closed forms against each other, against the published routes, and against a brute-force optimiser."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration import products
from calibration.gram import across, add_gram
from calibration.moments import GroupCollector, Moments
from compress.methods import METHODS
from compress.truncation import NotFinite, descending, leading, root_of, symmetric_root, truncate

SHAPES = [(24, 40), (40, 24), (30, 30)]


def problem(d_out: int, d_in: int, tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs ``(tokens, d_in)`` with a mean and a wide spectrum, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, dtype=torch.float64, generator=generator)
    mix = torch.randn(d_in, d_in, dtype=torch.float64, generator=generator) * torch.logspace(
        0, -2, d_in, dtype=torch.float64
    )
    x = torch.randn(tokens, d_in, dtype=torch.float64, generator=generator) @ mix.T + 0.3
    return weight, x


def moments_of(weight: torch.Tensor, x: torch.Tensor) -> Moments:
    """Moments as the collector gives them, but in float64; output gradients are random."""
    second = x.T @ x / len(x)
    g = torch.randn(len(x), len(weight), dtype=torch.float64, generator=torch.Generator().manual_seed(len(x)))
    fisher = g.T @ g / len(g)
    tall = weight.shape[1] < weight.shape[0]
    return Moments(
        len(x),
        float(second.diagonal().mean()),
        input=second if tall else None,
        output=None if tall else weight @ second @ weight.T,
        mean_absolute=x.abs().mean(0),
        mean=x.mean(0),
        mean_square=x.square().mean(0),
        row_fisher=g.square().T @ x.square().sum(1) / len(x),
        gradient_tokens=len(g),
        gradient_power=float(fisher.diagonal().mean()),
        gradient=None if tall else fisher,
        pulled=weight.T @ fisher @ weight if tall else None,
        input_samples=x,
        gradient_samples=g,
    )


def objective(weight: torch.Tensor, approximation: torch.Tensor, x: torch.Tensor) -> float:
    return float(((x @ (weight - approximation).T) ** 2).sum() / len(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_cholesky_symmetric_root_and_output_pca_are_one_optimum(shape):
    weight, x = problem(*shape)
    second = x.T @ x / len(x)
    rank = 9

    def by_root(root: torch.Tensor) -> torch.Tensor:
        u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
        return torch.linalg.solve(root.T, ((u[:, :rank] * s[:rank]) @ v[:rank]).T).T

    values, vectors = torch.linalg.eigh(second)
    _, basis = torch.linalg.eigh(weight @ second @ weight.T)
    basis = basis.flip(1)[:, :rank]
    cholesky = by_root(torch.linalg.cholesky(second))
    root = by_root(vectors @ torch.diag(values.sqrt()) @ vectors.T)
    features = basis @ (basis.T @ weight)
    ours = truncate(weight, second, rank)
    for other in (cholesky, root, features):
        assert torch.allclose(ours.a @ ours.b, other, atol=1e-8 * float(weight.abs().max()))
    assert ours.loss[rank] == pytest.approx(objective(weight, ours.a @ ours.b, x), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_brute_force_optimiser_does_not_beat_it(shape):
    weight, x = problem(*shape)
    second = x.T @ x / len(x)
    rank = 5
    best = objective(weight, (lambda f: f.a @ f.b)(truncate(weight, second, rank)), x)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):  # alternating least squares from random starts: each step is exact
        b = torch.randn(rank, shape[1], dtype=torch.float64, generator=generator)
        for _ in range(300):
            a = weight @ second @ b.T @ torch.linalg.inv(b @ second @ b.T)
            b = torch.linalg.solve(a.T @ a, a.T @ weight)
        found = objective(weight, a @ b, x)
        assert found >= best * (1 - 1e-9)
    assert found <= best * 1.05, "the optimiser does come near: the comparison means something"


def test_svd_llm_and_llm_rom_agree_on_dense_inputs():
    for shape in SHAPES:
        weight, x = problem(*shape)
        moments = moments_of(weight, x)
        one, other = (METHODS[name].decompose(weight, moments, 7, 1e-8) for name in ("svd-llm", "llm-rom"))
        assert torch.allclose(one.a @ one.b, other.a @ other.b, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_asvd_is_the_published_scaling(shape):
    weight, x = problem(*shape)
    scale = x.abs().mean(0) ** 0.5
    u, s, v = torch.linalg.svd(weight * scale, full_matrices=False)
    expected = (u[:, :6] * s[:6]) @ v[:6] / scale
    ours = METHODS["asvd"].decompose(weight, moments_of(weight, x), 6, 0.0)
    assert torch.allclose(ours.a @ ours.b, expected, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_is_eckart_young(shape):
    weight, x = problem(*shape)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    ours = METHODS["svd"].decompose(weight, moments_of(weight, x), 6, 0.0)
    assert torch.allclose(ours.a @ ours.b, (u[:, :6] * s[:6]) @ v[:6], atol=1e-9)
    assert float(ours.loss[6]) == pytest.approx(float((s[6:] ** 2).sum()))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.decompose])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_rank_is_a_slice_full_rank_is_the_weight_and_losses_fall(name, data):
    """Also from fewer tokens than dimensions, dead channels and constant inputs."""
    d_out, d_in = data.draw(st.integers(2, 20)), data.draw(st.integers(2, 20))
    tokens = data.draw(st.integers(1, 30))
    weight, x = problem(d_out, d_in, tokens, seed=data.draw(st.integers(0, 1000)))
    kind = data.draw(st.sampled_from(["plain", "dead", "constant", "zero", "outlier"]))
    if kind == "dead":
        x[:, 0] = 0
    elif kind == "constant":
        x[:] = x[0].clone()
    elif kind == "zero":
        x.zero_()
    elif kind == "outlier":
        x[:, -1] *= 1e4
    full = min(d_out, d_in)
    factors = METHODS[name].decompose(weight, moments_of(weight, x), full, 1e-6)
    assert bool(torch.isfinite(factors.a).all() and torch.isfinite(factors.b).all())
    whole = factors.at_rank(full)
    assert torch.allclose(whole.a @ whole.b, weight, atol=1e-6 * float(weight.abs().max()))
    assert bool((factors.loss.diff() <= 0).all()) and len(factors.loss) == full + 1
    rank = data.draw(st.integers(1, full))
    fewer = METHODS[name].decompose(weight, moments_of(weight, x), rank, 1e-6)
    assert torch.allclose(fewer.a @ fewer.b, factors.at_rank(rank).a @ factors.at_rank(rank).b, atol=1e-9)


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(NotFinite):
        truncate(torch.ones(3, 3, dtype=torch.float64), torch.full((3, 3), torch.nan, dtype=torch.float64), 2)


def test_a_zero_layer_is_harmless():
    factors = truncate(torch.zeros(6, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64), 3)
    assert not bool((factors.a @ factors.b).any()) and float(factors.loss[0]) == 0


@pytest.mark.parametrize("function", [symmetric_root, root_of])
def test_symmetric_root_of_a_singular_moment(function):
    x = torch.randn(3, 8, dtype=torch.float64)
    root = function(x.T @ x)
    assert torch.allclose(root @ root.T, x.T @ x, atol=1e-12)


@pytest.mark.parametrize(("openblas", "threads"), [(False, 1), (True, 1), (True, 2)])
def test_bfloat16_grams_are_exact_to_float32(openblas, threads, monkeypatch):
    monkeypatch.setattr(products, "OPENBLAS_IS_WIDER", openblas)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows = torch.randn(3000, 640, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = torch.zeros(640, 640)
    add_gram(total, rows)
    across(total)
    exact = rows.double().T @ rows.double()
    assert float((total.double() - exact).abs().max() / exact.abs().max()) < 1e-5
    assert float(torch.linalg.eigvalsh(total.double()).min()) > 0


def test_collector_takes_the_smaller_side_and_leaves_the_bias_out():
    torch.manual_seed(0)
    wide = torch.nn.Linear(12, 5)
    collector = GroupCollector({"down": (5, 12)}, ["down"], frozenset({"second"}))
    handles = collector.hooks({"down": wide})
    x = torch.randn(7, 9, 12)
    with torch.no_grad():
        for part in x:
            wide(part)
    for handle in handles:
        handle.remove()
    moments = collector.moments(0)["down"]
    rows = x.reshape(-1, 12) @ wide.weight.T
    assert moments.input is None and moments.tokens == 63
    assert torch.allclose(moments.output, rows.T @ rows / 63, atol=1e-5)
    assert moments.input_power == pytest.approx(float((x**2).mean()), rel=1e-5)


@pytest.mark.parametrize("count", [1, 10, 40, 300])
@pytest.mark.parametrize("decay", [0.0, 1.0, 8.0])
def test_a_few_leading_directions_are_as_good_as_all_would_give(count: int, decay: float) -> None:
    """Of a spectrum as flat as a quantization error's, of one that falls off, and of one that rounding ends; also twice the same."""
    rows = torch.randn(400, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows *= torch.arange(1, 301, dtype=torch.float64) ** -decay
    symmetric = rows.T @ rows
    start = torch.randn(300, count + 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    vectors = leading(lambda vectors: symmetric @ vectors, start, count)
    best, _ = descending(symmetric)
    assert torch.allclose(vectors.T @ vectors, torch.eye(count, dtype=torch.float64), atol=1e-10)
    held = torch.linalg.eigvalsh(vectors.T @ symmetric @ vectors).flip(0)
    assert bool((held >= best[:count] * (1 - 4e-3) - 1e-5 * best[0]).all()), "each of them, not only the largest"
    assert torch.equal(leading(lambda vectors: symmetric @ vectors, start, count), vectors)


def test_leading_directions_of_nothing_and_of_what_is_no_number() -> None:
    start = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    vectors = leading(torch.zeros_like, start, 4)
    assert torch.allclose(vectors.T @ vectors, torch.eye(4, dtype=torch.float64), atol=1e-12)
    with pytest.raises(NotFinite):
        leading(lambda vectors: vectors * torch.nan, start, 4)
