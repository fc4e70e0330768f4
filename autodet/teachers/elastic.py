"""One detector that contains many: members whose weights and gradients are slices of shared ones.

A member is a plain detector of its own architecture. Activated, its parameters *are* views of the shared ones, and so
are their gradients: training it trains the pool, and no layer knows of it. So all families can be elastic, and the
largest member is the shared detector itself. Depth keeps a stage's first blocks, width the first channels of each group
(Joint-DetNAS, Yao et al. 2021, elastic teacher pool; slicing as in Cai et al. 2020, OFA).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

from autodet.detectors import Detector, DetectorSpec, build, steps_of
from autodet.detectors.channels import channel_counts, channel_groups, first_channels
from autodet.detectors.dims import Groups
from autodet.teachers.space import Member, PoolSpace, SpaceError

Take = Callable[[str, tuple[slice, ...]], Tensor]  # a tensor's name and an index → that slice of it
KEPT = 16  # activated members that are kept at hand


class ElasticDetector:
    """A detector of a space's largest member, of which any member can be had.

    detector: its parameters are the shared weights. Their gradients are views of ``gradient``, one flat vector, so that
    a single operation clears them or adds them up over workers; they are never None, and must not be set to it. Move
    the detector to its device and memory format before: a later ``.to`` would cut the views off. SpaceError where the
    detector is not the space's largest member, or its norms are frozen.
    """

    def __init__(self, detector: Detector, space: PoolSpace) -> None:
        spec = detector.spec
        if (spec.body, spec.min_size) != (space.largest.body, space.largest.size):
            raise SpaceError(f"Expected a detector with the space's largest body, {space.largest}, found {spec}.")
        if spec.norm == "frozen":
            raise SpaceError("Members need norm statistics of their own, and frozen norms have none: use norm 'batch'.")
        self.detector, self.space = detector, space
        self._groups = channel_groups(spec)
        parameters = dict(detector.model.named_parameters())
        self._shared: dict[str, Tensor] = {**parameters, **dict(detector.model.named_buffers())}
        device = next(iter(parameters.values())).device
        self.gradient = torch.zeros(sum(parameter.numel() for parameter in parameters.values()), device=device)
        start = 0
        for parameter in parameters.values():  # strides as the weights', which may be channels_last
            parameter.grad = torch.as_strided(self.gradient, parameter.shape, parameter.stride(), start)
            start += parameter.numel()
        self._active: OrderedDict[Member, Detector] = OrderedDict()

    def spec_of(self, member: Member) -> DetectorSpec:
        """The detector that a member is; SpaceError where it is not in the space."""
        self.space.check(member)
        return member_spec(self.detector.spec, member)

    def activate(self, member: Member) -> Detector:
        """A detector on slices of the shared weights. Its norm statistics are its own, and start as slices.

        Its parameters see every change of the shared ones, and its backward passes add to ``gradient``.
        """
        if member == self.space.largest:
            return self.detector
        if member not in self._active:
            self._active[member] = sliced(
                self.spec_of(member), self._groups, lambda name, index: _view(self._shared[name], index)
            )
            if len(self._active) > KEPT:
                self._active.popitem(last=False)
        self._active.move_to_end(member)
        found = self._active[member]
        found.model.train(self.detector.model.training)
        return found

    def extract(self, member: Member) -> Detector:
        """A plain detector of its own with the member's weights. Its norm statistics are slices: recalibrate them."""
        return sliced(self.spec_of(member), self._groups, copies_of(self._shared))


def member_spec(largest: DetectorSpec, member: Member) -> DetectorSpec:
    """The spec of a member, given the largest one's."""
    spec = largest if member.size == largest.min_size else largest.at_size(member.size)
    return replace(spec, body=member.body)


def sliced(spec: DetectorSpec, groups: Mapping[str, Groups], take: Take) -> Detector:
    """A detector of ``spec``, in evaluation mode, made of slices of a larger one's tensors.

    groups: of the larger one's channels. take: a tensor's name in its state dict and an index → the slice.
    """
    with torch.device("meta"):
        member = build(spec)
    for module in member.model.modules():
        if isinstance(module, AnchorGenerator):  # the one part of a detector that is made of plain tensors
            module.cell_anchors = [
                module.generate_anchors(sizes, ratios)
                for sizes, ratios in zip(module.sizes, module.aspect_ratios, strict=True)
            ]
    counts = channel_counts(spec)
    for prefix, module in member.model.named_modules():
        for name, own in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            key = f"{prefix}.{name}" if prefix else name
            part = take(key, first_channels(own.dim(), groups.get(key, ()), counts))
            assert part.shape == own.shape, key
            plain = not isinstance(own, nn.Parameter) or isinstance(part, nn.Parameter)
            setattr(module, name, part if plain else nn.Parameter(part))
    member.model.eval()
    return steps_of(member.model, spec)


def copies_of(state: Mapping[str, Tensor]) -> Take:
    """Slices of a state dict that share nothing with it."""
    return lambda name, index: state[name].detach()[index].clone()


def _view(whole: Tensor, index: tuple[slice, ...]) -> Tensor:
    """A parameter whose values and gradient are slices of a shared one's; the shared one where it is all of it.

    Of a buffer a copy: each member has norm statistics of its own.
    """
    if not isinstance(whole, nn.Parameter):
        return whole[index].clone()
    values = whole.detach()[index]
    if values.shape == whole.shape:
        return whole
    assert whole.grad is not None
    part = nn.Parameter(values, whole.requires_grad)
    part.grad = whole.grad[index]  # a backward pass adds to a gradient that is there, in place
    return part
