"""Published losses in the language against a direct computation from each paper's equation.

Equal as far as each remark says: what it calls missing or averaged is so in the computation here, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from distill_outputs import CANVAS, answer, spec_of
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torchvision.ops import box_iou, roi_align

from autodet.detectors import DetectorSpec
from autodet.distill import Distiller
from autodet.distill.formula import Formula
from autodet.distill.outputs import DetectorOutput
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


RCNN, RETINANET, GFL = spec_of("faster_rcnn"), spec_of("retinanet"), spec_of("gfl")


def of_outputs(name: str, student: DetectorOutput, teacher: DetectorOutput) -> Tensor:
    losses = Distiller(PUBLISHED[name].formula, student.spec, teacher.spec)(student, teacher)
    return torch.stack(list(losses.values())).sum()


def fgd(student: DetectorOutput, teacher: DetectorOutput) -> Tensor:
    """Σ_level Σ_c Σ_xy (M·S·α + (1 − M)·S·β) (T − S)² without attention, α = 1, β = ½; S = 1/(h·w) of the smallest box
    around a cell or 1/N_bg. Mean over channels, images and levels."""
    total = []
    for stride, level in student.features.items():
        height, width = level.shape[2:]
        down, across = CANVAS[0] / height, CANVAS[1] / width
        for image, boxes in enumerate(student.boxes):
            M, S = torch.zeros(height, width), torch.zeros(height, width)
            for x0, y0, x1, y1 in boxes.tolist():
                rows = slice(math.floor(y0 / down), math.ceil(y1 / down))
                columns = slice(math.floor(x0 / across), math.ceil(x1 / across))
                M[rows, columns] = 1
                share = 1 / M[rows, columns].numel()
                S[rows, columns] = S[rows, columns].clamp_min(share)
            S = torch.where(M == 1, S, 1 / (1 - M).sum().clamp_min(1))
            weights = (1.0 * M + 0.5 * (1 - M)) * S
            gap = (teacher.features[stride][image] - level[image]) ** 2
            total.append((weights * gap).sum() / level.shape[1])
    return torch.stack(total).sum() / len(student.boxes) / len(student.features)


def test_fgd_is_the_feature_loss_of_its_focal_part() -> None:
    student, teacher = answer(RCNN, 1), answer(RCNN, 2)
    torch.testing.assert_close(of_outputs("fgd", student, teacher), fgd(student, teacher))


def test_gid_is_the_squared_difference_of_pooled_instances() -> None:
    """Each instance from the level of its size; (T − S)² averaged in an instance, its image, and the batch."""
    student, teacher = answer(RCNN, 1), answer(RCNN, 2)
    images = []
    for image, boxes in enumerate(student.boxes):
        gaps = []
        for box in boxes:
            k = math.floor(4 + math.log2(math.sqrt((box[2] - box[0]) * (box[3] - box[1])) / 224))
            stride = min(max(2**k, 8), 32)
            roi = [box[None] if other == image else torch.zeros(0, 4) for other in range(len(student.boxes))]
            t, s = (roi_align(X.features[stride], roi, 4, 1 / stride, 2, aligned=True) for X in (teacher, student))
            gaps.append(((t - s) ** 2).mean())
        images.append(torch.stack(gaps).mean() if gaps else torch.zeros(()))
    torch.testing.assert_close(of_outputs("gid", student, teacher), torch.stack(images).mean())


def binary_divergence(student: DetectorOutput, teacher: DetectorOutput) -> Tensor:
    """Σ over both outcomes of p_T log(p_T / p_S), p = sigmoid, averaged in a level; mean over levels."""
    assert student.logits is not None and teacher.logits is not None
    levels = []
    for stride, logits in student.logits.items():
        q, p = logits.double().sigmoid(), teacher.logits[stride].double().sigmoid()
        levels.append((p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))).mean())
    return torch.stack(levels).mean().float()


@pytest.mark.parametrize("spec", [RCNN, RETINANET], ids=lambda spec: spec.family)
def test_kd_of_sigmoid_heads_is_the_divergence_of_each_logits_two_outcomes(spec: DetectorSpec) -> None:
    student, teacher = answer(spec, 1), answer(spec, 2)
    expected = binary_divergence(student, teacher)
    torch.testing.assert_close(of_outputs("kd_dense", student, teacher), expected)
    # Cross-entropy, as one-stage detectors are trained with, less a constant of the teacher.
    assert student.logits is not None and teacher.logits is not None
    levels = [(logits, teacher.logits[s], teacher.logits[s].sigmoid()) for s, logits in student.logits.items()]
    less_entropy = [cross_entropy(s, p) - cross_entropy(t, p) for s, t, p in levels]
    torch.testing.assert_close(expected, torch.stack(less_entropy).mean())


def test_bckd_adds_one_minus_the_overlap_of_decoded_boxes() -> None:
    student, teacher = answer(RETINANET, 1), answer(RETINANET, 2)
    assert student.corners is not None and teacher.corners is not None and teacher.logits is not None
    for side in (student, teacher):  # proper boxes: the second corner beyond the first
        assert side.corners is not None
        for stride, x in side.corners.items():
            side.corners[stride] = torch.cat([x[:, :, :2], x[:, :, :2] + x[:, :, 2:].abs()], dim=2)
    overlaps, scores = [], []
    for stride, corners in student.corners.items():
        one, other = (x.permute(0, 1, 3, 4, 2).reshape(-1, 4) for x in (corners, teacher.corners[stride]))
        overlaps.append(torch.stack([box_iou(a[None], b[None])[0, 0] for a, b in zip(one, other, strict=True)]))
        scores.append(teacher.logits[stride].amax(2).sigmoid().flatten())
    images = len(student.boxes)
    u, w = (torch.cat([x.view(images, -1) for x in levels], dim=1) for levels in (overlaps, scores))
    boxes = ((w * (1 - u)).sum(1) / w.sum(1)).mean()
    found = of_outputs("bckd", student, teacher)
    torch.testing.assert_close(found, boxes + binary_divergence(student, teacher), rtol=1e-4, atol=1e-4)


def test_ld_is_the_divergence_of_softened_sides_where_the_teacher_sees_an_object() -> None:
    """τ² Σ_sides KL(softmax(z_T / τ) ‖ softmax(z_S / τ)) / 4 of each location, τ = 10."""
    student, teacher = answer(GFL, 1), answer(GFL, 2)
    assert student.sides is not None and teacher.sides is not None and teacher.logits is not None
    divergences, scores = [], []
    for stride, z_s in student.sides.items():
        q, p = torch.softmax(z_s.double() / 10, dim=2), torch.softmax(teacher.sides[stride].double() / 10, dim=2)
        divergences.append((100 * (p * torch.log(p / q)).sum(2)).mean(1).flatten(1))
        scores.append(torch.sigmoid(teacher.logits[stride].double().amax((1, 2))).flatten(1))
    u, w = torch.cat(divergences, dim=1), torch.cat(scores, dim=1)
    expected = ((w * u).sum(1) / w.sum(1)).mean()
    torch.testing.assert_close(of_outputs("ld", student, teacher), expected.float(), rtol=1e-4, atol=1e-5)


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
    assert {*DIRECT, "kd", "kd_dense", "bckd", "ld", "fgd", "gid"} == set(PUBLISHED)


def test_only_the_formula_that_normalises_over_the_batch_needs_two_images() -> None:
    assert {name: p.formula.min_batch for name, p in PUBLISHED.items() if p.formula.min_batch > 1} == {"detkds": 2}


def test_where_terms_are_normalised_published_formulas_enter_with_weight_one_at_most() -> None:
    for published in PUBLISHED.values():
        assert published.weighted(normalised=False) == published.formula
        plain, unit = published.formula.terms, published.weighted(normalised=True).terms
        assert [term.body for term in unit] == [term.body for term in plain]
        assert max(term.weight for term in unit) == 1.0
        ratios = {new.weight / old.weight for new, old in zip(unit, plain, strict=True)}
        assert max(ratios) == pytest.approx(min(ratios))
        assert max(term.weight for term in published.weighted(normalised=True, weight=0.3).terms) == 0.3
