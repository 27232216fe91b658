"""The training loss: one method per term, weights as data.

Letters: B batch, T frames, N keypoints, D values per keypoint (confidence last), E edges of the skeleton.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_pose_tokenizer import PoseTokenizerConfig

# Where smooth-L1 turns from square to straight, in shoulder widths: noise of the estimators lies below.
SMOOTH_L1_BETA = 0.02
# A shorter bone counts as this long, in shoulder widths: its direction is noise.
SHORTEST_BONE = 1e-4


@dataclass
class LossInputs:
    """What every term sees.

    Attributes:
        prediction (`torch.Tensor` of shape `(B, T, N, D)`): Reconstruction, confidence last.
        target (`torch.Tensor` of shape `(B, T, N, D)`): Poses; finite wherever `valid`.
        valid (`torch.BoolTensor` of shape `(B, T, N)`): Keypoints that are there.
        frames (`torch.BoolTensor` of shape `(B, T)`): Real frames.
        commitment (`torch.Tensor`): The quantizer's commitment loss.
    """

    prediction: torch.Tensor
    target: torch.Tensor
    valid: torch.Tensor
    frames: torch.Tensor
    commitment: torch.Tensor

    _known: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    # What several terms need is computed once, keypoints first: there masks, weights, bones and differences in time
    # meet whole rows of numbers, where they would meet pairs of coordinates. (A graph breaks on `cached_property`.)

    @property
    def there(self) -> torch.Tensor:
        """Keypoints that are there `(N, 1, B, T)`."""
        if "there" not in self._known:
            self._known["there"] = self.valid.permute(2, 0, 1).contiguous()[:, None]
        return self._known["there"]

    @property
    def places(self) -> torch.Tensor:
        """True coordinates `(N, D - 1, B, T)`."""
        if "places" not in self._known:
            self._known["places"] = self.target[..., :-1].permute(2, 3, 0, 1).contiguous()
        return self._known["places"]

    @property
    def error(self) -> torch.Tensor:
        """Errors of coordinates `(N, D - 1, B, T)`, 0 where not valid: by `where`, since what stands there may be
        NaN."""
        if "error" not in self._known:
            predicted = self.prediction[..., :-1].permute(2, 3, 0, 1).contiguous()
            self._known["error"] = torch.where(self.there, predicted - self.places, 0.0)
        return self._known["error"]


def masked_mean(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean of `values` over the entries that count, 0 where none does. `weight` broadcasts to `values`' shape."""
    weight = weight.to(values.dtype).expand_as(values)
    return (values * weight).sum() / weight.sum().clamp(min=1.0)


class PoseTokenizerLoss(nn.Module):
    """Weighted sum of terms, each a method `loss_<term>(inputs) -> scalar` with its weight in `weights`.

    To add a term, subclass, add a method and its weight, and give the model an instance:
    `model.loss_function = MyLoss(config)`. Positions are in the units of the model's input, shoulder widths.

    Buffers (derived from the configuration, not saved):
        keypoint_weight (N,): `hand_weight` for keypoints of the hands, 1 for the others.
        parent, child (number of edges,): the skeleton's bones.
    """

    def __init__(self, config: PoseTokenizerConfig):
        super().__init__()
        self.config = config
        self.weights: dict[str, float] = {
            "position": config.reconstruction_weight,
            "velocity": config.temporal_weight,
            "acceleration": config.temporal_weight,
            "bone": config.perceptual_weight,
            "bone_direction": config.perceptual_weight / 10,
            "confidence": config.confidence_weight,
            "commitment": config.quantization_weight,
        }
        for name, value in self.constants().items():
            self.register_buffer(name, value, persistent=False)

    def constants(self) -> dict[str, torch.Tensor]:
        """Values of the buffers, for construction and for models built on the meta device."""
        layout = self.config.layout
        edges = torch.tensor(layout.edges, dtype=torch.long).view(-1, 2)
        weights = self.config.keypoint_weights
        return {"keypoint_weight": weights, "parent": edges[:, 0].clone(), "child": edges[:, 1].clone()}

    def forward(self, inputs: LossInputs) -> dict[str, torch.Tensor]:
        """Unweighted terms by name. `total` sums them with their weights; a term of weight 0 is not computed."""
        return {name: getattr(self, f"loss_{name}")(inputs) for name, weight in self.weights.items() if weight}

    def total(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """The number to minimise."""
        return torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()

    def loss_position(self, inputs: LossInputs) -> torch.Tensor:
        """Smooth-L1 of coordinates, hands weighted up."""
        return self._weighted(inputs.error, inputs.there)

    def loss_velocity(self, inputs: LossInputs) -> torch.Tensor:
        """Smooth-L1 of the difference between neighbouring frames, where both are there."""
        return self._difference_loss(inputs, order=1)

    def loss_acceleration(self, inputs: LossInputs) -> torch.Tensor:
        """Smooth-L1 of the second difference, where all three frames are there."""
        return self._difference_loss(inputs, order=2)

    def loss_bone(self, inputs: LossInputs) -> torch.Tensor:
        """Smooth-L1 of bone vectors: what a viewer sees of a handshape, wherever the hand is."""
        valid = self._bones_there(inputs)
        return self._weighted(torch.where(valid, self._bones(inputs.error), 0.0), valid, self.child)

    def loss_bone_direction(self, inputs: LossInputs) -> torch.Tensor:
        """One minus the cosine between bones, so that short finger bones count as much as long limbs."""
        valid = self._bones_there(inputs)
        target = torch.where(valid, self._bones(inputs.places), 1.0)  # a missing bone has no direction
        predicted = target + torch.where(valid, self._bones(inputs.error), 0.0)
        squares = [bones.square().sum(1).clamp(min=SHORTEST_BONE**2) for bones in (predicted, target)]
        cosine = (predicted * target).sum(1) * squares[0].rsqrt() * squares[1].rsqrt()
        return masked_mean(1 - cosine, valid[:, 0])

    def loss_confidence(self, inputs: LossInputs) -> torch.Tensor:
        """Binary cross entropy of the confidence on real frames; it tells the decoder's reader what is missing."""
        target = inputs.target[..., -1].nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
        # What is no number would end the program here (on a GPU without a word); the other terms pass it on.
        confidence = inputs.prediction[..., -1].nan_to_num(0.5)
        entropy = F.binary_cross_entropy(confidence, target, reduction="none")
        return masked_mean(entropy, inputs.frames[..., None])

    def loss_commitment(self, inputs: LossInputs) -> torch.Tensor:
        """Latents stay near their codes (arXiv 1711.00937)."""
        return inputs.commitment

    def _weighted(
        self, error: torch.Tensor, valid: torch.Tensor, keypoints: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean smooth-L1 of `(keypoints, D - 1, B, ...)`, finite everywhere, over what is valid, hands weighted up."""
        weight = self.keypoint_weight if keypoints is None else self.keypoint_weight[keypoints]
        zero = error.new_zeros(()).expand_as(error)
        distance = F.smooth_l1_loss(error, zero, reduction="none", beta=SMOOTH_L1_BETA)
        return masked_mean(distance, valid * weight[:, None, None, None])

    def _difference_loss(self, inputs: LossInputs, order: int) -> torch.Tensor:
        error, valid = inputs.error, inputs.there
        for _ in range(order):
            error = error.diff(dim=-1)
            valid = valid[..., 1:] & valid[..., :-1]
        return self._weighted(error, valid)

    def _bones(self, places: torch.Tensor) -> torch.Tensor:
        """From each edge's parent to its child: `(N, D - 1, B, T)` to `(E, D - 1, B, T)`."""
        return places.index_select(0, self.child) - places.index_select(0, self.parent)

    def _bones_there(self, inputs: LossInputs) -> torch.Tensor:
        """Where both ends are there `(E, 1, B, T)`."""
        return inputs.there.index_select(0, self.child) & inputs.there.index_select(0, self.parent)
