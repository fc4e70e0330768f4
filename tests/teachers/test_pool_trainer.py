"""Training a pool: one worker or several give the same, resumed or not; and what each unit trains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detector_cases import small_spec, stirred
from pool_cases import space_of
from torch import Tensor

from autodet.data import BatchPlan, ImageCache, Loader, read_dataset
from autodet.data.shapes import CATEGORY_IDS
from autodet.detectors import build
from autodet.detectors.channels import body_counts
from autodet.distill.formula import Formula
from autodet.morphism.importance import channel_importance, importance_order
from autodet.teachers.schedule import Schedule
from autodet.teachers.statistics import measure_statistics
from autodet.teachers.trainer import Alone, PoolSettings, PoolTrainer, Workers
from autodet.teachers.workers import DistributedWorkers
from autodet.training import Trainer, TrainSettings
from autodet.training.loop import Clock
from autodet.training.settings import Optimizer

LABELS = tuple((id_, name) for name, id_ in CATEGORY_IDS.items())
SPACE = space_of("tied")
FORMULAS = {
    "faster_rcnn": "global: l2; logits.dense: sigmoid | l2; logits.roi: softmax(c) | kl",
    "retinanet": "global: l2; logits.dense: l2 * 0.1",
    "fcos": "fg: mask(0.35) | l2; logits.dense: sigmoid | l1",
    "gfl": "global: l2; logits.dense: sigmoid | l2",
}
LONG, SHORT = "1*largest > 1*sandwich(0.5, 2) > 1*sandwich(1, 2)", "1*largest > 1*sandwich(0.5, 2)"
Make = Callable[..., PoolTrainer]


@pytest.fixture(scope="module")
def loader(shapes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """Eight images in batches of 3, so that an epoch ends with a smaller one."""
    dataset = read_dataset(shapes_folder)["train"]
    cache = ImageCache(dataset, 64, 96, tmp_path_factory.mktemp("pool-images"))
    return Loader(cache, dataset, dict(zip(CATEGORY_IDS.values(), range(1, 6), strict=True)), BatchPlan(3, seed=0))


@pytest.fixture
def make(loader: Loader) -> Make:
    def made(
        family: str = "fcos",
        workers: Workers | None = None,
        parts: int = 1,
        schedule: str = LONG,
        formula: str | None = None,
        checkpoint: Path | None = None,
        ema: float = 0.0,
        optimizer: Optimizer = "adamw",
    ) -> PoolTrainer:
        torch.manual_seed(0)
        detector = stirred(replace(small_spec(family, LABELS), body=SPACE.largest.body))
        plan = Schedule.parse(schedule)
        settings = TrainSettings(plan.epochs, batch_size=3, lr=1e-3, warmup=2, ema=ema, optimizer=optimizer)
        chosen = Formula.parse(FORMULAS[family] if formula is None else formula)
        return PoolTrainer(detector, SPACE, loader, settings, PoolSettings(plan, chosen, parts), 0, workers, checkpoint)

    return made


def weights(trainer: PoolTrainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.detector.model.named_parameters()}


def worker(rank: int, count: int, meeting: Path, make: Make, family: str, parts: int) -> None:
    """One process of a group: trains, and leaves its weights and reports in a file."""
    trainer = joined(rank, count, meeting, make, family, parts, SHORT)
    losses = [dict(epoch.losses) for epoch in trainer.epochs()]
    averaged = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    torch.save({"weights": weights(trainer), "averaged": averaged, "losses": losses}, meeting / f"{rank}.pt")
    dist.destroy_process_group()


def worker_of_one_epoch(rank: int, count: int, meeting: Path, make: Make, path: Path) -> None:
    """One process of a group that takes a training on by an epoch."""
    trainer = joined(rank, count, meeting, make, "fcos", 1)
    if path.exists():
        trainer.load(path)
    next(trainer.epochs())
    if rank == 0:
        trainer.save(path)
    dist.destroy_process_group()


def joined(
    rank: int, count: int, meeting: Path, make: Make, family: str, parts: int, schedule: str = LONG
) -> PoolTrainer:
    """The trainer of a process that has found its group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}/group", rank=rank, world_size=count)
    return make(family, DistributedWorkers(), parts, schedule, ema=0.5, optimizer="sgd")


def run_group(count: int, target: Callable[..., None], meeting: Path, *arguments: object) -> None:
    """Run a group of processes to its end."""
    meeting.mkdir(exist_ok=True)
    context = mp.get_context("fork")
    processes = [context.Process(target=target, args=(rank, count, meeting, *arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0


@pytest.mark.parametrize(
    ("family", "count", "parts"),
    [("fcos", 3, 2), ("faster_rcnn", 2, 2)],
)
def test_workers_together_train_as_one_alone(family: str, count: int, parts: int, make: Make, tmp_path: Path) -> None:
    """Members dealt to workers, parts of the batch dealt to workers, and numbers that do not divide.

    By SGD: gradients differ by rounding, and where one is as small as that, AdamW's step would be any.
    """
    alone = make(family, None, parts, SHORT, ema=0.5, optimizer="sgd")
    reports = [epoch.losses for epoch in alone.epochs()]
    run_group(count, worker, tmp_path, make, family, parts)
    for rank in range(count):
        saved = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, expected in weights(alone).items():
            torch.testing.assert_close(saved["weights"][name], expected, rtol=0, atol=1e-5)
        for name, parameter in alone.model.named_parameters():
            torch.testing.assert_close(saved["averaged"][name], parameter.detach(), rtol=0, atol=1e-5)
        for ours, theirs in zip(saved["losses"], reports, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_workers_may_become_more_and_fewer(make: Make, tmp_path: Path) -> None:
    """Three workers, then one, then two, an epoch each, against one process that trains all epochs."""
    alone, path = make("fcos", ema=0.5, optimizer="sgd"), tmp_path / "checkpoint.pt"
    list(alone.epochs())
    for leg, count in enumerate((3, 1, 2)):
        run_group(count, worker_of_one_epoch, tmp_path / str(leg), make, path)
    found = make("fcos", ema=0.5, optimizer="sgd", checkpoint=path)
    assert found.epoch == 3
    for name, expected in weights(alone).items():
        torch.testing.assert_close(weights(found)[name], expected, rtol=0, atol=1e-5)


class Half:
    """One of two workers, of whom the other does nothing: what this one alone adds."""

    def __init__(self, rank: int) -> None:
        self.rank, self.count = rank, 2

    def all_reduce(self, tensor: Tensor) -> None: ...

    def broadcast(self, tensor: Tensor) -> None: ...

    def merged(self, values: Mapping[str, float]) -> dict[str, float]:
        return dict(values)


def test_every_unit_is_trained_by_exactly_one_worker(make: Make) -> None:
    first, second, alone = (make("fcos", workers) for workers in (Half(0), Half(1), Alone()))
    for trainer in (first, second, alone):
        trainer.epoch = 2
        trainer.detector.model.train()
        batch = trainer.loader.load(trainer.loader.keys(2)[0])
        trainer._accumulate(2 * trainer.steps_per_epoch, batch, Clock())
    both = first.elastic.gradient + second.elastic.gradient
    torch.testing.assert_close(both, alone.elastic.gradient, rtol=1e-4, atol=1e-6)
    assert float(first.elastic.gradient.norm()) > 0 and float(second.elastic.gradient.norm()) > 0


@pytest.mark.parametrize("family", ["fcos", "faster_rcnn"])
def test_resumed_after_any_epoch_it_ends_with_the_same_pool(family: str, make: Make, tmp_path: Path) -> None:
    """Resumed after each of its epochs, which are before and after channels are sorted, against one never stopped."""
    whole, path = make(family, ema=0.9), tmp_path / "checkpoint.pt"
    list(whole.epochs())
    for done in range(whole.settings.epochs):
        resumed = make(family, ema=0.9, checkpoint=path)
        assert resumed.epoch == done
        next(resumed.epochs())
        resumed.save(path)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())
    assert resumed.averaged is not None and whole.averaged is not None
    ours, theirs = resumed.averaged.state_dict(), whole.averaged.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_largest_alone_trains_as_a_plain_detector(make: Make, loader: Loader) -> None:
    """The first phase is ordinary training: the same losses and weights as ``Trainer``'s, up to its seeds."""
    pool = make("retinanet", schedule="2*largest")
    plain = copy.deepcopy(pool.detector)
    reports = [epoch.losses for epoch in pool.epochs()]
    assert {name.split("/")[0] for name in reports[0]} == {"largest"}
    trainer = Trainer(plain, loader, pool.settings, seed=0)
    for ours, theirs in zip(reports, trainer.epochs(), strict=True):  # RetinaNet's losses draw nothing
        assert {name.split("/")[1]: value for name, value in ours.items()} == pytest.approx(theirs.losses, rel=1e-5)


def test_units_split_a_batch_among_the_parts_and_name_their_roles(make: Make, loader: Loader) -> None:
    trainer = make("fcos", parts=2)
    key = loader.keys(2)[0]
    units = trainer.units(2 * trainer.steps_per_epoch, key)
    members = list(dict.fromkeys(unit.member for unit in units))
    assert [unit.role for unit in units[:4]] == ["largest", "largest", "smallest", "smallest"]
    assert {unit.role for unit in units[4:]} == {"random"} and len(units) == 2 * len(members)
    for member in members:
        own = [unit for unit in units if unit.member == member]
        assert sum(unit.share for unit in own) == pytest.approx(1)
        assert sorted(position for unit in own for position in unit.part) == list(range(len(key.indices)))
    assert [u.member for u in trainer.units(0, key)] == [SPACE.largest] * 2


def test_steps_draw_other_members_from_what_is_open(make: Make, loader: Loader) -> None:
    trainer = make("fcos")
    half = SPACE.opened(0.5)
    seen = set()
    for step in range(trainer.steps_per_epoch, 2 * trainer.steps_per_epoch):
        seen |= {unit.member for unit in trainer.units(step, loader.keys(1)[0])}
    assert all(half.why_outside(member) is None for member in seen) and len(seen) > 4
    again = make("fcos").units(trainer.steps_per_epoch, loader.keys(1)[0])
    assert again == trainer.units(trainer.steps_per_epoch, loader.keys(1)[0])


def test_the_largest_teaches_the_others_and_not_itself(make: Make) -> None:
    *_, last = make("fcos", schedule="1*sandwich(1, 1)").epochs()
    taught = {name.split("/")[0] for name in last.losses if "distill" in name}
    assert taught == {"smallest", "random"}
    *_, untaught = make("fcos", formula="none", schedule="1*sandwich(1, 1)").epochs()
    assert not [name for name in untaught.losses if "distill" in name]
    *_, uniform = make("fcos", schedule="1*uniform(1, 3)").epochs()
    assert not [name for name in uniform.losses if "distill" in name]


@pytest.mark.parametrize("family", sorted(FORMULAS))
def test_bf16_gives_the_gradient_of_float32_up_to_its_precision(family: str, make: Make) -> None:
    """A step of the sandwich; the weights and their gradients stay float32."""
    gradients = []
    for precision in ("float32", "bf16"):
        trainer = make(family, schedule="1*sandwich(1, 1)")
        trainer.settings = replace(trainer.settings, precision=precision)
        trainer.detector.model.train()
        trainer._accumulate(0, trainer.loader.load(trainer.loader.keys(0)[0]), Clock())
        gradients.append(trainer.elastic.gradient)
    assert gradients[1].dtype == torch.float32 and bool(torch.isfinite(gradients[1]).all())
    assert not torch.equal(*gradients)
    assert float(torch.cosine_similarity(gradients[0], gradients[1], dim=0)) > 0.9


def test_statistics_are_not_tracked_in_training(make: Make) -> None:
    trainer = make("fcos", schedule="1*sandwich(1, 1)")
    before = {name: buffer.clone() for name, buffer in trainer.detector.model.named_buffers() if buffer.dim()}
    trainer.epoch = 0
    trainer.detector.model.train()
    trainer._accumulate(0, trainer.loader.load(trainer.loader.keys(0)[0]), Clock())
    after = dict(trainer.detector.model.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_losses_of_a_role_are_means_over_the_steps_that_trained_it(make: Make) -> None:
    """A random member that happens to be the largest is trained once, as the largest: its step has none of its role."""
    trainer = make("fcos", schedule="1*uniform(1, 1)", formula="none")
    roles = [trainer.units(step, key)[0].role for step, key in enumerate(trainer.loader.keys(0))]
    (report,) = [epoch.losses for epoch in trainer.epochs()]
    assert {name.split("/")[0] for name in report} == set(roles)
    assert all(value > 0.3 for name, value in report.items() if name.endswith("/classification"))


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_gradient_is_a_view_of_the_flat_vector(channels_last: bool, make: Make, loader: Loader) -> None:
    plain = make("fcos")
    settings = replace(plain.settings, channels_last=channels_last)
    trainer = PoolTrainer(build(plain.detector.spec), SPACE, loader, settings, plain.pool, 0)
    start = trainer.elastic.gradient.data_ptr()
    end = start + 4 * trainer.elastic.gradient.numel()
    for parameter in trainer.detector.model.parameters():
        assert parameter.grad is not None and start <= parameter.grad.data_ptr() < end
        assert parameter.grad.stride() == parameter.stride()
    trainer.elastic.gradient.fill_(1.0)
    assert all(bool((p.grad == 1).all()) for p in trainer.detector.model.parameters() if p.grad is not None)


class First:
    """The second of two workers: takes what the first one says."""

    def __init__(self, orders: list[Tensor]) -> None:
        self.rank, self.count, self.orders = 1, 2, orders

    def all_reduce(self, tensor: Tensor) -> None: ...

    def broadcast(self, tensor: Tensor) -> None:
        tensor.copy_(self.orders.pop(0))

    def merged(self, values: Mapping[str, float]) -> dict[str, float]:
        return dict(values)


def test_all_workers_sort_as_the_first(make: Make) -> None:
    trainer = make("fcos", ema=0.9)
    before = {name: value.clone() for name, value in trainer.detector.model.named_parameters()}
    order = importance_order(trainer.detector.model.state_dict(), trainer.detector.spec)
    reversed_ = {group: order[group].flip(0) for group in body_counts(trainer.detector.spec.body)}
    trainer.workers = First(list(reversed_.values()))
    trainer._sort()
    name = "backbone.body.layer2.0.conv1.weight"
    expected = before[name][reversed_["layer2.0.conv1"]][:, reversed_["layer1"]]
    assert torch.equal(trainer.detector.model.get_parameter(name), expected)
    assert torch.equal(trainer.model.get_parameter(name), expected)  # the averaged weights, which were equal


def test_channels_are_sorted_once_before_the_widths_open(make: Make) -> None:
    trainer = make("fcos")
    reports = trainer.epochs()
    next(reports)
    measure_statistics(trainer.detector, trainer.loader)
    before = channel_importance(trainer.detector.model.state_dict(), trainer.detector.spec)
    assert any((values[:-1] < values[1:] * 0.999).any() for values in before.values())
    trainer._sort()
    after = channel_importance(trainer.detector.model.state_dict(), trainer.detector.spec)
    for group in body_counts(trainer.detector.spec.body):
        assert (after[group][:-1] >= after[group][1:] * 0.999).all()
    heads = before.keys() - body_counts(trainer.detector.spec.body).keys()
    for group in heads:  # alike in all members, and so not sorted
        torch.testing.assert_close(after[group], before[group])


def test_settings_that_do_not_fit_are_refused(make: Make, loader: Loader) -> None:
    trainer = make("fcos")
    detector = build(trainer.detector.spec)
    with pytest.raises(ValueError, match="The recipe has 5 epochs, the schedule 3"):
        PoolTrainer(detector, SPACE, loader, replace(trainer.settings, epochs=5), trainer.pool, 0)
    with pytest.raises(ValueError, match=r"PoolSettings\.parts is 0"):
        replace(trainer.pool, parts=0)
    with pytest.raises(ValueError, match=r"'localization.dense: giou \* 1' is impossible .* other sizes"):
        make("fcos", formula="localization.dense: giou")
