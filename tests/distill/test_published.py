"""Published losses in the language against a direct computation from each paper's equation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autodet.distill.formula import Formula
from autodet.distill.published import PUBLISHED
from autodet.distill.terms import term_loss
from autodet.distill.values import Value, map_value, vector_value


def detkds(S: Tensor, T: Tensor) -> Tensor:
    """Channel attention, 2×2 max-pool, L2 norm over the batch, mean absolute difference; times 6."""

    def side(X: Tensor) -> Tensor:
        N, C, H, W = X.shape
        attention = C * torch.softmax(X.abs().mean(3).mean(2) / 0.5, dim=1)
        X = X * attention.sqrt()[:, :, None, None]
        X = X.view(N, C, H // 2, 2, W // 2, 2).amax((3, 5))
        return X / torch.sqrt((X**2).sum(0))

    return 6 * (side(S) - side(T)).abs().mean()


def fitnets(S: Tensor, T: Tensor) -> Tensor:
    """½ ‖T − S‖² per element."""
    return 0.5 * torch.nn.functional.mse_loss(S, T)


def pkd(S: Tensor, T: Tensor) -> Tensor:
    """1/(2m) Σ (ŝ − t̂)² with each channel standardised over the batch's positions."""

    def side(X: Tensor) -> Tensor:
        flat = X.transpose(0, 1).flatten(1)
        return (flat - flat.mean(1, keepdim=True)) / flat.var(1, correction=0, keepdim=True).sqrt()

    return ((side(S) - side(T)) ** 2).sum() / (2 * S.numel())


def cwd(S: Tensor, T: Tensor) -> Tensor:
    """t²/C Σ_c Σ_i φ(T) log(φ(T)/φ(S)) with φ a softmax over positions, t = 4; mean over images."""
    C = S.shape[1]
    phi_s, phi_t = (torch.softmax(X.flatten(2) / 4, dim=2) for X in (S, T))
    return (16 / C * (phi_t * torch.log(phi_t / phi_s)).sum((1, 2))).mean()


def at(S: Tensor, T: Tensor) -> Tensor:
    """Half the squared distance of the normalised attention maps Σ_c F², averaged over positions."""

    def side(X: Tensor) -> Tensor:
        Q = (X**2).sum(1).flatten(1)
        return Q / torch.sqrt((Q**2).sum(1, keepdim=True))

    return 0.5 * ((side(S) - side(T)) ** 2).mean()


DIRECT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "detkds": detkds,
    "fitnets": fitnets,
    "pkd": pkd,
    "cwd": cwd,
    "at": at,
}


def weighted(formula: Formula, student: list[Value], teacher: list[Value]) -> Tensor:
    return torch.stack([term_loss(term, student, teacher) * term.weight for term in formula.terms]).sum()


def levels(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    sizes = [(3, 4, 8, 6), (3, 4, 4, 2)]
    draw = [torch.randn(2, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    return [(both[0], both[1]) for both in draw]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", sorted(DIRECT))
def test_the_formula_is_the_paper_on_every_level(name: str, dtype: torch.dtype) -> None:
    pairs = levels(dtype)
    ours = weighted(PUBLISHED[name].formula, [map_value(s) for s, _ in pairs], [map_value(t) for _, t in pairs])
    expected = torch.stack([DIRECT[name](s, t) for s, t in pairs]).mean()
    torch.testing.assert_close(ours, expected)
    assert expected > 0


def test_kd_is_hinton_on_every_region_averaged_per_image() -> None:
    generator = torch.Generator().manual_seed(6)
    S, T = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    counts = [2, 3]
    ours = weighted(PUBLISHED["kd"].formula, [vector_value(S, counts)], [vector_value(T, counts)])
    p_s, p_t = (torch.softmax(X / 2, dim=1) for X in (S, T))
    rows = 4 * (p_t * torch.log(p_t / p_s)).sum(1)
    torch.testing.assert_close(ours, (rows[:2].mean() + rows[2:].mean()) / 2)


def test_pkd_is_one_minus_the_pearson_correlation() -> None:
    pairs = levels(torch.float64)
    student, teacher = [map_value(s) for s, _ in pairs], [map_value(t) for _, t in pairs]
    correlations = [
        torch.stack([torch.corrcoef(torch.stack([s[:, c].flatten(), t[:, c].flatten()]))[0, 1] for c in range(4)])
        for s, t in pairs
    ]
    expected = torch.stack([1 - r.mean() for r in correlations]).mean()
    torch.testing.assert_close(weighted(PUBLISHED["pkd"].formula, student, teacher), expected)
    torch.testing.assert_close(weighted(Formula.parse("global: pearson(nhw)"), student, teacher), expected)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_texts_are_canonical_and_explained(name: str) -> None:
    published = PUBLISHED[name]
    assert str(published.formula.canonical()) == published.text
    assert published.source and published.remark


def test_all_have_a_direct_computation_here() -> None:
    assert {*DIRECT, "kd"} == set(PUBLISHED)


def test_only_the_formula_that_normalises_over_the_batch_needs_two_images() -> None:
    assert {name: p.formula.min_batch for name, p in PUBLISHED.items() if p.formula.min_batch > 1} == {"detkds": 2}


def test_where_terms_are_normalised_published_formulas_enter_with_weight_one() -> None:
    for published in PUBLISHED.values():
        assert published.weighted(normalised=False) == published.formula
        plain, unit = published.formula.terms, published.weighted(normalised=True).terms
        assert [term.body for term in unit] == [term.body for term in plain]
        assert {term.weight for term in unit} == {1.0}
