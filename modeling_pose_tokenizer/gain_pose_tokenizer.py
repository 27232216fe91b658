"""Gain adaptation in the quantizer's loop: how large what is left to say will be, told by what is decoded already.

Letters: B batch, G token groups, L residual levels, Q codebooks, K codes per codebook, M vectors, d dimensions of a
latent.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init

# Rounds of fitting the variance of what prediction leaves over.
FIT_ROUNDS = 100
# Share of the mean variance that is expected of a group at rest.
FLOOR = 0.02
# How many vectors of the usual size a code's own are averaged with.
PRIOR_COUNT = 20.0
# A level is not expected to leave less than this share of the scale: few training vectors have a code each.
SMALLEST_FACTOR = 0.2


class PoseTokenizerGain(nn.Module):
    """The scale of what each codebook looks up: residuals are divided by it, what codes say is multiplied.

    Motion comes in bursts, so what prediction leaves over is small at most steps and large at some, and larger still
    with someone who moves more than those of the training data. Both encoder and decoder know enough to expect it, so
    it costs no bit (backward gain adaptation, as in LD-CELP, Chen et al., IEEE Journal on Selected Areas in
    Communications 10(5), 1992):

    - at the first level, the variance is a weighted sum of the squares of the group's latent of the step before,
      decoded at the first level (ARCH, Engle, Econometrica 50(4), 1982), and at a key step a constant;
    - from there it changes, level by level, by a factor that belongs to the code just said.

    Both follow from codes of no higher level, so prefixes of levels decode as they were encoded.

    Args:
        owners: Group and level of each of the Q codebooks, level-major.
        num_codes: K.
        dim: d.

    Buffers (fitted before training, then fixed):
        past (G, d + 1): weights of the squares, and a constant.
        largest (G,): variance that is not exceeded, so that no sequence of codes runs off.
        key (G,): variance at key steps.
        factor (Q, K): what a code multiplies the scale by.
    """

    def __init__(self, owners: Sequence[tuple[int, int]], num_codes: int, dim: int):
        super().__init__()
        groups = 1 + max(group for group, _ in owners)
        for name, shape in {
            "past": (groups, dim + 1),
            "largest": (groups,),
            "key": (groups,),
            "factor": (len(owners), num_codes),
        }.items():
            self.register_buffer(name, torch.ones(shape, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All scales 1."""
        for buffer in (self.largest, self.key, self.factor):
            init.ones_(buffer)
        init.copy_(self.past, torch.eye(self.past.shape[1])[-1:].expand_as(self.past))

    def start(self, before: torch.Tensor, key: bool | torch.Tensor, first: int = 0) -> torch.Tensor:
        """Scales `(g, M)` at the first level of g groups, number `first` and those behind it, from their latents
        `(g, M, d)` of the step before, decoded at the first level; `key` as one answer or many."""
        groups = slice(first, first + len(before))
        alone = self.key[groups].float()[:, None].expand(before.shape[:2])
        if key is True:
            return alone.sqrt()
        past = self.past[groups].float()
        variance = torch.baddbmm(past[:, None, -1:], before.square(), past[:, :-1, None])[..., 0]
        variance = variance.minimum(self.largest[groups].float()[:, None])
        return torch.where(key, alone, variance).sqrt() if isinstance(key, torch.Tensor) else variance.sqrt()

    def follow(self, codes: torch.Tensor, books: slice) -> torch.Tensor:
        """Factors `(g, M)` of codes `(g, M)`."""
        return self.factor[books].float().gather(1, codes)

    @torch.no_grad()
    def fit_start(
        self, group: int, residual: torch.Tensor, before: torch.Tensor, weight: torch.Tensor, key: torch.Tensor
    ) -> None:
        """Fit the first level's scales of a group, for usual and for key steps; without any, nothing changes.

        The weights w >= 0 that minimise sum(e / v + log v) for v = w . z, where e is what the residual's mean square
        is and z are the squares: multiplicative updates of the Itakura-Saito divergence (Fevotte, Bertin and Durrieu,
        Neural Computation 21(3), 2009).

        Args:
            residual (`torch.Tensor` of shape `(M, d)`): What prediction left over.
            before (`torch.Tensor` of shape `(M, d)`): Latents of the step before, decoded at the first level.
            weight (`torch.BoolTensor` of shape `(M,)`): What counts.
            key (`torch.BoolTensor` of shape `(M,)`): Key steps.
        """
        energy = residual.square().mean(-1).double()
        if (weight & key).any():
            self.key[group] = energy[weight & key].mean().clamp(min=1e-6)
        rows = weight & ~key
        if not rows.any():
            return
        energy = energy[rows]
        floor = FLOOR * energy.mean().clamp(min=1e-6)
        squares = nn.functional.pad(before[rows].square().double(), (0, 1), value=1.0)
        weights = energy.mean().clamp(min=1e-6) / (squares.shape[1] * squares.mean(0).clamp(min=1e-6))
        for _ in range(FIT_ROUNDS):
            variance = squares @ weights + floor
            raised, lowered = squares.T @ (energy / variance.square()), squares.T @ (1 / variance)
            weights = weights * (raised / lowered.clamp(min=1e-12)).sqrt()
        weights[-1] += floor
        self.past[group] = weights.to(self.past)
        self.largest[group] = (squares @ weights).max()

    @torch.no_grad()
    def fit_factor(self, book: int, residual: torch.Tensor, codes: torch.Tensor, weight: torch.Tensor) -> None:
        """Fit the factors of a codebook: the root mean square of what is left over for each of its codes.

        Args:
            residual (`torch.Tensor` of shape `(M, d)`): What the next level looks up, divided by this level's scale.
            codes (`torch.LongTensor` of shape `(M,)`): What this level said.
            weight (`torch.BoolTensor` of shape `(M,)`): What counts.
        """
        if not weight.any():
            return
        energy, said = residual.square().mean(-1)[weight], codes[weight]
        usual = energy.mean().clamp(min=1e-6)
        counts = torch.full_like(self.factor[book], PRIOR_COUNT).index_add(0, said, torch.ones_like(energy))
        sums = torch.full_like(counts, float(PRIOR_COUNT * usual)).index_add(0, said, energy)
        self.factor[book] = (sums / counts).sqrt().clamp(min=SMALLEST_FACTOR)
