"""Arch: text and JSON forms, validity, and torchvision's architectures read off their state dicts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchvision

from autodet.detectors.arch import Arch, ArchError, Stage

TORCHVISION: dict[str, Callable[[], Arch]] = {
    "resnet18": Arch.resnet18,
    "resnet34": Arch.resnet34,
    "resnet50": Arch.resnet50,
    "resnet101": Arch.resnet101,
    "resnet152": Arch.resnet152,
    "resnext50_32x4d": Arch.resnext50_32x4d,
    "resnext101_32x8d": Arch.resnext101_32x8d,
    "wide_resnet50_2": Arch.wide_resnet50_2,
}

TEXTS = {
    "basic-64:64x2-128x2-256x2-512x2": Arch.resnet18(),
    "bottleneck-64:256x3-512x4-1024x6-2048x3": Arch.resnet50(),
    "bottleneck[g32]-64:256x3(128)-512x4(256)-1024x6(512)-2048x3(1024)": Arch.resnext50_32x4d(),
    "bottleneck[g32,d3]-64:256x3(128)-512x4(256)-1024x6(512)-2048x3(1024)": replace(
        Arch.resnext50_32x4d(), deformable=3
    ),
    "basic[d1]-64:64x2-128x2-256x2-512x2": replace(Arch.resnet18(), deformable=1),
    "bottleneck-64:256x3(128)-512x4(256)-1024x6(512)-2048x3(1024)": Arch.wide_resnet50_2(),
    "basic-16:16x2(16,12)-32x1(8)-64x1-128x1": Arch(
        "basic", 16, (Stage(16, (16, 12)), Stage(32, (8,)), Stage(64, (64,)), Stage(128, (128,)))
    ),
}


@pytest.mark.parametrize("text", TEXTS)
def test_known_texts(text: str) -> None:
    assert Arch.parse(text) == TEXTS[text]
    assert str(TEXTS[text]) == text


def random_arch(rng: random.Random) -> Arch:
    block = rng.choice(["basic", "bottleneck"])
    groups = rng.choice([1, 2, 3]) if block == "bottleneck" else 1
    stages = tuple(
        Stage(rng.randint(1, 40), tuple(groups * rng.randint(1, 9) for _ in range(rng.randint(1, 4)))) for _ in range(4)
    )
    return Arch(block, rng.randint(1, 64), stages, groups, rng.randint(0, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(50))
def test_text_and_json_round_trip(seed: int) -> None:
    arch = random_arch(random.Random(seed))
    assert Arch.parse(str(arch)) == arch
    assert Arch.from_json(json.loads(json.dumps(arch.to_json()))) == arch
    assert hash(Arch.parse(str(arch))) == hash(arch)


def test_text_is_canonical() -> None:
    long_form = "bottleneck[g1]-64:256x3(64,64,64)-512x4(128)-1024x6-2048x3(512)"
    assert str(Arch.parse(long_form)) == str(Arch.resnet50())


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("", 0, "kind of block"),
        ("fancy-64:64x2-128x2-256x2-512x2", 0, "basic, bottleneck"),
        ("basic64:64x2-128x2-256x2-512x2", 5, "'-' and the stem"),
        ("basic-x:64x2-128x2-256x2-512x2", 6, "stem's width"),
        ("basic-064:64x2-128x2-256x2-512x2", 6, "stem's width"),
        ("basic-64:64-128x2-256x2-512x2", 11, "'x' and the stage's number of blocks"),
        ("basic-64:64x0-128x2-256x2-512x2", 12, "number of blocks"),
        ("basic-64:64x9999999-128x2-256x2-512x2", 12, "1 to 999999"),
        ("basic-64:64x2(64,64,64)-128x2-256x2-512x2", 13, "1 or 2 inner widths for 2 blocks, found 3"),
        ("basic-64:64x2(64-128x2-256x2-512x2", 16, "')'"),
        ("basic-64:64x2-128x2-256x2-512x2 ", 31, "the end"),
        ("bottleneck-64:30x2-128x2-256x2-512x2", 18, "not divisible by 4"),
        ("bottleneck[g4-64:32x2-128x2-256x2-512x2", 13, "']'"),
        ("bottleneck[d2,g4]-64:32x2-128x2-256x2-512x2", 13, "']'"),
        ("bottleneck[g4,d]-64:32x2-128x2-256x2-512x2", 15, "number of deformable stages"),
        ("basic[]-64:64x2-128x2-256x2-512x2", 6, "groups or deformable stages"),
    ],
)
def test_errors_name_position_and_expectation(text: str, position: int, words: str) -> None:
    with pytest.raises(ArchError, match=f"position {position}: expected") as error:
        Arch.parse(text)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block": "dense"}, "block 'dense' is none of"),
        ({"stem": 0}, "stem's width is 0"),
        ({"stem": True}, "stem's width is True"),
        ({"groups": 2}, "basic blocks have no groups"),
        ({"deformable": 5}, "deformable is 5, expected the number of the last stages, 0 to 4"),
        ({"deformable": -1}, "deformable is -1"),
        ({"stages": (Stage(8, (8,)),) * 3}, "3 stages, expected 4"),
        ({"stages": [Stage(8, (8,))] * 4}, "expected a tuple"),
        ({"stages": (Stage(8, (8,)),) * 3 + (Stage(8, ()),)}, "in stage 4 the inner widths"),
        ({"stages": (Stage(8, (8, -1)),) * 4}, "in stage 1 an inner width is -1"),
        ({"block": "bottleneck", "groups": 3, "stages": (Stage(8, (8,)),) * 4}, "not divisible into 3 groups"),
    ],
)
def test_invalid_values_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ArchError, match=words):
        replace(Arch.resnet18(), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [{"version": 3}, {"version": 1}, {"version": None}, {"more": 1}, {"stages": [3]}, {"stages": [{"width": 8}]}],
)
def test_foreign_json_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ArchError):
        Arch.from_json(Arch.resnet18().to_json() | change)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_architectures_are_read_from_their_state_dicts(name: str) -> None:
    with torch.device("meta"):
        state = torchvision.models.get_model(name).state_dict()
    assert Arch.of_state_dict(state) == TORCHVISION[name]()
    within = {f"backbone.body.{key}": value for key, value in state.items()}
    assert Arch.of_state_dict(within, "backbone.body.") == TORCHVISION[name]()
    with pytest.raises(ArchError, match="check the prefix"):
        Arch.of_state_dict(within)


def test_a_shortcut_against_the_rule_is_refused() -> None:
    with torch.device("meta"):
        state = torchvision.models.resnet18().state_dict()
    extra = state | {"layer1.0.downsample.0.weight": state["layer1.0.conv1.weight"]}
    with pytest.raises(ArchError, match=r"layer1\.0 needs no downsample"):
        Arch.of_state_dict(extra)
    with pytest.raises(ArchError, match=r"layer2\.0 needs a downsample"):
        Arch.of_state_dict({key: value for key, value in state.items() if "layer2.0.downsample" not in key})


def test_scaling() -> None:
    assert str(Arch.resnet18().scaled(0.25)) == "basic-16:16x2-32x2-64x2-128x2"
    assert str(Arch.resnet50().scaled(0.5)) == "bottleneck-32:128x3-256x4-512x6-1024x3"
    assert Arch.resnext50_32x4d().scaled(0.5).stages[0] == Stage(128, (64, 64, 64))
    assert Arch.resnet18().scaled(0.001).widths == (8, 8, 8, 8)
    odd = Arch.parse("basic-7:9x1-11x1-13x1-15x1")
    assert odd.scaled(1.0) == odd
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ArchError, match="factor above 0"):
            odd.scaled(factor)
