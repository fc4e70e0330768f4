"""The training loop: resume bit for bit, seeds, averaged weights, divergence, clipping, time, precision."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autodet.data import Batch, BatchPlan, Loader
from autodet.detectors import Dense, DetectorSpec, Features, Inputs, build, load_detector
from autodet.distill import Distiller, Formula, Teacher
from autodet.training import Diverged, Epoch, Trainer, TrainSettings
from autodet.training.loop import ExtraLosses
from autodet.training.task import Distillation

SHORT = TrainSettings(epochs=4, batch_size=4, warmup=2)
FORMULA = "global: mask(0.35) | l2; logits.roi: softmax(c, t=2) | kl * 4"


class Extra:
    """Extra losses from a function of the features."""

    def __init__(self, losses: Callable[[Features], dict[str, Tensor]]) -> None:
        self.module = nn.Module()
        self._losses = losses

    def __call__(self, batch: Batch, inputs: Inputs, features: Features, dense: Dense) -> dict[str, Tensor]:
        return self._losses(features)


@pytest.fixture
def make(tiny_spec: DetectorSpec, tiny_loader: Loader, teacher_file: Path) -> Callable[..., Trainer]:
    """Trainers that all start from the same weights."""

    def trainer(
        settings: TrainSettings = SHORT,
        seed: int = 0,
        checkpoint: Path | None = None,
        distil: bool = False,
        extra: ExtraLosses | None = None,
    ) -> Trainer:
        torch.manual_seed(5)
        student = build(tiny_spec)
        if distil:
            teacher = Teacher(load_detector(teacher_file)[0], ("global", "logits.roi"))
            distiller = Distiller(Formula.parse(FORMULA), tiny_spec, teacher.detector.spec, normalise=True)
            extra = Distillation(distiller, teacher, student)
        return Trainer(student, tiny_loader, settings, seed, extra, checkpoint)

    return trainer


def losses_of(epochs: list[Epoch]) -> list[Mapping[str, float]]:
    return [epoch.losses for epoch in epochs]


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    other = second.state_dict()
    assert [name for name, tensor in first.state_dict().items() if not torch.equal(tensor, other[name])] == []


@pytest.mark.parametrize(
    ("settings", "distil"),
    [(SHORT, False), (replace(SHORT, optimizer="sgd", lr=0.01), False), (replace(SHORT, ema=0.9), True)],
    ids=["adamw", "sgd", "distilled and averaged"],
)
def test_a_resumed_training_continues_bit_for_bit(
    make: Callable[..., Trainer], tmp_path: Path, settings: TrainSettings, distil: bool
) -> None:
    straight = make(settings, distil=distil)
    whole = list(straight.epochs())
    killed = make(settings, distil=distil, checkpoint=tmp_path / "c.pt")
    first = list(islice(killed.epochs(), 3))[:2]  # the third epoch was never reported, so it is trained again
    torch.manual_seed(99)  # another process has drawn other numbers
    resumed = make(settings, distil=distil, checkpoint=tmp_path / "c.pt")
    rest = list(resumed.epochs())
    assert [epoch.number for epoch in first + rest] == [1, 2, 3, 4]
    assert losses_of(first + rest) == losses_of(whole)
    assert_same_weights(resumed.model, straight.model)
    assert_same_weights(resumed.detector.model, straight.detector.model)
    if distil:
        assert isinstance(resumed.extra, Distillation) and isinstance(straight.extra, Distillation)
        assert resumed.extra.distiller.scales() == straight.extra.distiller.scales()
    assert list(make(settings, distil=distil, checkpoint=tmp_path / "c.pt").epochs()) == []


def test_an_epoch_is_on_disk_only_after_its_report_was_taken_in(make: Callable[..., Trainer], tmp_path: Path) -> None:
    """Killed between the two, the epoch and its report are repeated; the other order would lose the report."""
    for epoch in make(replace(SHORT, epochs=2), checkpoint=tmp_path / "c.pt").epochs():
        assert make(replace(SHORT, epochs=2), checkpoint=tmp_path / "c.pt").epoch == epoch.number - 1
    assert make(replace(SHORT, epochs=2), checkpoint=tmp_path / "c.pt").epoch == 2


def test_a_damaged_checkpoint_is_told_and_the_training_begins_anew(
    make: Callable[..., Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, path = replace(SHORT, epochs=2), tmp_path / "c.pt"
    whole = make(settings)
    losses = losses_of(list(whole.epochs()))
    list(islice(make(settings, checkpoint=path).epochs(), 2))
    path.write_bytes(path.read_bytes()[:1000])
    again = make(settings, checkpoint=path)
    assert again.epoch == 0 and not path.exists() and "c.pt is no readable checkpoint" in caplog.text
    assert losses_of(list(again.epochs())) == losses
    assert_same_weights(again.model, whole.model)


def test_the_seed_decides_the_training(make: Callable[..., Trainer]) -> None:
    settings = replace(SHORT, epochs=1)
    first, again, other = (make(settings, seed=seed) for seed in (0, 0, 1))
    losses = [losses_of(list(trainer.epochs())) for trainer in (first, again, other)]
    assert losses[0] == losses[1] != losses[2]
    assert_same_weights(first.model, again.model)


def test_neighbouring_seeds_and_steps_draw_different_numbers(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    manual_seed = torch.manual_seed

    def recorded(seed: int) -> torch.Generator:
        seeds.append(seed)
        return manual_seed(seed)

    for seed in (0, 1, 2):
        trainer = make(replace(SHORT, epochs=2), seed=seed)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "manual_seed", recorded)
            list(trainer.epochs())
    assert len(seeds) == len(set(seeds)) == 3 * 2 * 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"seed": 1}, "with seed 0, not 1"), ({"settings": replace(SHORT, epochs=9)}, "with settings .*'epochs': 4")],
)
def test_a_checkpoint_of_another_training_is_refused(
    make: Callable[..., Trainer], tmp_path: Path, changed: dict[str, TrainSettings], message: str
) -> None:
    list(islice(make(checkpoint=tmp_path / "c.pt").epochs(), 2))
    with pytest.raises(ValueError, match=rf"c\.pt is of a training {message}"):
        make(checkpoint=tmp_path / "c.pt", **changed)


def test_a_checkpoint_of_another_detector_or_formula_is_refused(
    make: Callable[..., Trainer], tmp_path: Path, teacher_file: Path, tiny_loader: Loader
) -> None:
    path = tmp_path / "c.pt"
    list(islice(make(checkpoint=path).epochs(), 2))
    with pytest.raises(ValueError, match=r"c\.pt is of another detector or formula"):
        make(checkpoint=path, distil=True)
    with pytest.raises(ValueError, match=r"c\.pt is of another detector or formula"):
        Trainer(load_detector(teacher_file)[0], tiny_loader, SHORT, 0, checkpoint=path)


def test_averaged_weights_are_the_average_by_hand(tiny_spec: DetectorSpec, tiny_loader: Loader) -> None:
    whole = Loader(
        tiny_loader.cache, tiny_loader.dataset, tiny_loader.labels, BatchPlan(8, seed=0)
    )  # one step an epoch
    trainer = Trainer(build(tiny_spec), whole, replace(SHORT, epochs=6, ema=0.3), seed=0)
    expected: dict[str, Tensor] = {}
    for step, _ in enumerate(trainer.epochs()):
        current = {name: tensor.clone() for name, tensor in trainer.detector.model.state_dict().items()}
        decay = 0.0 if step == 0 else min(0.3, (1 + step) / (10 + step))  # 2/11, 3/12, then 0.3
        for name, tensor in current.items():
            moving = step > 0 and tensor.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * tensor if moving else tensor
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    assert any("running_mean" in name for name in expected)
    gap = trainer.model.state_dict()["rpn.head.cls_logits.weight"] - current["rpn.head.cls_logits.weight"]
    assert gap.abs().max() > 0


def test_without_averaging_the_trained_weights_are_kept(make: Callable[..., Trainer]) -> None:
    trainer = make()
    assert trainer.model is trainer.detector.model


def test_a_loss_that_is_not_finite_stops_the_training(make: Callable[..., Trainer]) -> None:
    calls = iter([0.0, 1.0, 2.0, float("nan")])
    extra = Extra(lambda features: {"distill/0/global": features[8].sum() * 0 + next(calls)})
    with pytest.raises(Diverged, match=r"at step 3: \{'distill/0/global': nan\}\. Lower"):
        list(make(extra=extra).epochs())


def test_a_gradient_that_is_not_finite_stops_the_training(make: Callable[..., Trainer]) -> None:
    extra = Extra(lambda features: {"steep": ((features[8] - features[8].detach()) * 3e38).sum()})
    trainer = make(extra=extra)
    before = {name: p.clone() for name, p in trainer.detector.model.named_parameters()}
    with pytest.raises(Diverged, match=r"gradient's norm is (inf|nan) at step 0"):
        list(trainer.epochs())
    assert all(torch.equal(p, before[name]) for name, p in trainer.detector.model.named_parameters())


@pytest.mark.parametrize(("clip", "clipped"), [(0.01, True), (1e6, False)])
def test_gradients_are_clipped_to_their_norm(
    tiny_spec: DetectorSpec, tiny_loader: Loader, clip: float, clipped: bool
) -> None:
    whole = Loader(tiny_loader.cache, tiny_loader.dataset, tiny_loader.labels, BatchPlan(8, seed=0))
    settings = TrainSettings(1, optimizer="sgd", lr=0.5, momentum=0, weight_decay=0, warmup=0, clip_norm=clip)
    trainer = Trainer(build(tiny_spec), whole, settings, seed=0)
    before = [p.detach().clone() for p in trainer.detector.model.parameters()]
    list(trainer.epochs())  # one step, at the full rate
    changes = [p.detach() - old for p, old in zip(trainer.detector.model.parameters(), before, strict=True)]
    norm = float(torch.cat([change.flatten() for change in changes]).norm())
    assert (norm == pytest.approx(0.5 * clip, rel=1e-2)) == clipped
    assert norm > 0.5 * 0.01 * 0.99


def test_frozen_parameters_stay(make: Callable[..., Trainer], tiny_spec: DetectorSpec, tiny_loader: Loader) -> None:
    student = build(tiny_spec)
    for parameter in student.model.get_submodule("backbone.body").parameters():
        parameter.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    list(Trainer(student, tiny_loader, replace(SHORT, epochs=1), seed=0).epochs())
    for name, parameter in student.model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("backbone.body."), name


def test_the_adapter_is_trained_but_no_part_of_the_student(
    tiny_spec: DetectorSpec, teacher_spec: DetectorSpec, tiny_loader: Loader
) -> None:
    student, wide = build(tiny_spec), build(replace(teacher_spec, neck_width=24))
    names = set(student.model.state_dict())
    distiller = Distiller(Formula.parse("global: l2"), tiny_spec, wide.spec)
    assert distiller.adapter is not None
    before = distiller.adapter.weight.detach().clone()
    trainer = Trainer(
        student, tiny_loader, replace(SHORT, epochs=1), 0, Distillation(distiller, Teacher(wide, ("global",)), student)
    )
    list(trainer.epochs())
    assert not torch.equal(distiller.adapter.weight, before)
    assert set(trainer.model.state_dict()) == names
    assert all(parameter.grad is None for parameter in wide.model.parameters())


def test_the_parts_of_an_epochs_time_are_its_wall_time(make: Callable[..., Trainer]) -> None:
    epochs = make(replace(SHORT, epochs=2)).epochs()
    next(epochs)
    started = time.perf_counter()
    epoch = next(epochs)
    wall = time.perf_counter() - started
    assert 0.9 * wall - 0.005 < sum(epoch.seconds.values()) <= wall
    assert min(epoch.seconds[part] for part in ("forward", "backward", "step")) > 0
    assert epoch.images == 8 and epoch.images_per_second == pytest.approx(8 / sum(epoch.seconds.values()))


def test_overhead_is_the_share_outside_forward_backward_and_step() -> None:
    seconds = {"data": 1.0, "forward": 4.0, "backward": 3.0, "step": 1.0, "other": 0.5}
    epoch = Epoch(1, {}, 19, seconds)
    assert epoch.overhead == pytest.approx(1.5 / 9.5)
    assert epoch.images_per_second == pytest.approx(2.0)


def test_an_epochs_losses_are_means_over_images(make: Callable[..., Trainer], tiny_loader: Loader) -> None:
    uneven = Loader(tiny_loader.cache, tiny_loader.dataset, tiny_loader.labels, BatchPlan(5, seed=0))
    extra = Extra(lambda features: {"images": features[8].sum() * 0 + float(len(features[8]))})
    trainer = make(replace(SHORT, epochs=1), extra=extra)
    trainer.loader = uneven  # batches of 5 and 3
    (epoch,) = trainer.epochs()
    assert epoch.losses["images"] == pytest.approx((5 * 5 + 3 * 3) / 8)


@pytest.mark.parametrize(
    ("variant", "tolerance"),
    [(replace(SHORT, channels_last=True), 1e-3), (replace(SHORT, precision="bf16"), 0.03)],
    ids=["channels last", "bf16"],
)
@pytest.mark.parametrize("distil", [False, True])
def test_memory_format_and_precision_change_little(
    make: Callable[..., Trainer], variant: TrainSettings, tolerance: float, distil: bool
) -> None:
    plain, other = (next(make(settings, distil=distil).epochs()).losses for settings in (SHORT, variant))
    assert set(plain) == set(other)
    for name, loss in plain.items():
        assert other[name] == pytest.approx(loss, rel=tolerance, abs=tolerance), name
