"""Prediction in the quantizer's loop: what each residual level expects of a latent, so that a code says only the rest.

Letters: B batch, G token groups, L residual levels, Q codebooks, M vectors, d dimensions of a latent.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init

from .codebook_pose_tokenizer import carry

# Share of the inputs' mean energy that is added to each of them: it keeps the prediction from amplifying what codes
# get wrong, step after step.
RIDGE = 1e-2
# Spectral radius that a fitted prediction does not exceed: what is off must die out, step after step.
LARGEST_RADIUS = 0.99


def take_rows(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """`tensor[rows]` for ascending rows, by slices: no tensor of numbers, which a loop in an exported graph cannot
    hold."""
    if len(rows) == rows[-1] - rows[0] + 1:
        return tensor[rows[0] : rows[-1] + 1]
    return torch.cat([tensor[row : row + 1] for row in rows])


def put_rows(tensor: torch.Tensor, rows: Sequence[int], values: torch.Tensor) -> torch.Tensor:
    """`tensor` with `values` in ascending rows instead, by slices as in `take_rows`."""
    if len(rows) == len(tensor):
        return values
    pieces, start = [], 0
    for number, row in enumerate(rows):
        pieces += [tensor[start:row], values[number : number + 1]]
        start = row + 1
    return torch.cat([piece for piece in (*pieces, tensor[start:]) if len(piece)])


def ridge_regression(gram: torch.Tensor, moment: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """Weights `(g, n, d)` from inputs' products `(g, n, n)` and theirs with targets `(g, n, d)`, to whose inputs a
    share `(g, 1, 1)` of their mean energy is added."""
    energy = gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None].clamp(min=1e-6)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(moment, torch.linalg.cholesky(gram + ridge * energy * eye)).float()


def radius(matrices: torch.Tensor) -> torch.Tensor:
    """Spectral radius `(g,)` of matrices `(g, d, d)`."""
    return torch.linalg.eigvals(matrices).abs().amax(-1)


class PoseTokenizerPredictor(nn.Module):
    """Linear prediction of a latent before its code is read, one for every codebook.

    Level l of a group knows, when its turn comes, the latent decoded up to level l - 1, and of the step before those
    decoded up to levels l - 1 and l. All of them come from codes of levels up to l, so a prefix of the levels decodes
    as it was encoded: scalable predictive coding (Rose and Regunathan, "Toward optimality in scalable predictive
    coding", IEEE Transactions on Image Processing 10(7), 2001) in its linear form. The groups behind the first, which
    hang on it as hands hang on arms, also know the first one's latents of the same levels.

    A key step is predicted without the step before it.

    Args:
        owners: Group and level of each of the Q codebooks, level-major.
        dim: d.
    """

    def __init__(self, owners: Sequence[tuple[int, int]], dim: int):
        super().__init__()
        self.owners, self.dim = tuple(owners), dim
        self.num_latents = 2 if any(group for group, _ in owners) else 1  # its own, and the first group's
        books, fp32 = len(self.owners), torch.float32  # whatever the dtype that the model is made in
        # Own latent of the levels before; the first group's up to this level and before it. [usual, key] steps.
        self.present = nn.Parameter(torch.zeros(2, books, (2 * self.num_latents - 1) * dim, dim, dtype=fp32))
        # Of the step before: own up to this level and before it, and the same of the first group.
        self.past = nn.Parameter(torch.zeros(books, 2 * self.num_latents * dim, dim, dtype=fp32))
        self.bias = nn.Parameter(torch.zeros(2, books, 1, dim, dtype=fp32))
        for name, value in self.constants().items():
            self.register_buffer(name, value, persistent=False)

    def constants(self) -> dict[str, torch.Tensor]:
        groups, levels = (torch.tensor(numbers) for numbers in zip(*self.owners, strict=True))
        return {"group": groups, "level": levels}

    def reset_parameters(self) -> None:
        """Without prediction: a level expects what the levels before it say, as in plain residual quantization."""
        init.zeros_(self.past)
        init.zeros_(self.bias)
        identity = torch.zeros(self.present.shape)
        identity[:, :, : self.dim] = torch.eye(self.dim)
        init.copy_(self.present, identity)

    def past_inputs(self, before: torch.Tensor, books: slice) -> torch.Tensor:
        """Latents of the step before `(L + 1, G, M, d)`, entry l up to level l - 1, to inputs `(q, M, ...)`."""
        group, level = self.group[books], self.level[books]
        number = level * before.shape[1] + group  # among the latents of all levels and groups
        flat = before.flatten(0, 1)
        inputs = [flat.index_select(0, number + before.shape[1]), flat.index_select(0, number)]
        if self.num_latents == 2:
            first = (group == 0)[:, None, None]
            trunk = before[:, 0]
            inputs += [torch.where(first, 0.0, trunk.index_select(0, level + index)) for index in (1, 0)]
        return torch.cat(inputs, -1)

    def from_past(self, inputs: torch.Tensor, books: slice) -> torch.Tensor:
        """The step before's share of the prediction: `past_inputs` to `(q, M, d)`."""
        return torch.bmm(inputs, self.past[books].float())

    def present_inputs(self, levels: Sequence[torch.Tensor], groups: Sequence[int], level: int) -> torch.Tensor:
        """Latents of this step `(G, M, d)`, entry l decoded up to level l - 1, to inputs `(g, M, ...)`; the first
        group has no more than its own."""
        own = take_rows(levels[level], groups)
        if groups[0] == 0:
            return own
        first = torch.cat([levels[level + 1][:1], levels[level][:1]], -1)
        return torch.cat([own, first.expand(len(groups), -1, -1)], -1)

    def from_present(self, inputs: torch.Tensor, books: slice, key: bool | torch.Tensor) -> torch.Tensor:
        """This step's share of the prediction: `present_inputs` to `(g, M, d)`."""
        if isinstance(key, torch.Tensor):
            usual, alone = (self.from_present(inputs, books, kind) for kind in (False, True))
            return torch.where(key, alone, usual)
        weight = self.present[int(key), books, : inputs.shape[-1]]
        return torch.baddbmm(self.bias[int(key), books].float(), inputs, weight.float())

    def carry(
        self,
        latents: torch.Tensor,
        slope: torch.Tensor,
        stages: Sequence[tuple[int, list[int], slice]],
        usual: Sequence[int],
        key: Sequence[int],
    ) -> torch.Tensor:
        """0, with the gradient of a loss that has the slope `slope` with respect to the predictions.

        Args:
            latents (`torch.Tensor` of shape `(S, L + 1, G, B, d)`): Entry l decoded up to level l - 1.
            slope (`torch.Tensor` of shape `(q, S, B, d)`): Of the first q codebooks.
            stages: Level, groups and codebooks of what is predicted at once.
            usual, key: Which of the S steps are which.
        """
        present, past, bias = (
            torch.zeros_like(parameter, dtype=torch.float32) for parameter in (self.present, self.past, self.bias)
        )
        for kind, steps in enumerate((usual, key)):
            if not steps:
                continue
            now = take_rows(latents, steps).permute(1, 2, 0, 3, 4).flatten(2, 3)  # (L + 1, G, s B, d)
            slopes = take_rows(slope.transpose(0, 1), steps).transpose(0, 1).flatten(1, 2)  # (q, s B, d)
            bias[kind, : len(slopes)] = slopes.sum(1, keepdim=True)
            for level, groups, books in stages:
                inputs = self.present_inputs(list(now), groups, level)
                present[kind, books, : inputs.shape[-1]] = torch.bmm(inputs.transpose(1, 2), slopes[books])
            if kind == 0:
                before = take_rows(latents, [step - 1 for step in steps]).permute(1, 2, 0, 3, 4).flatten(2, 3)
                known = slice(0, len(slopes))
                past[known] = torch.bmm(self.past_inputs(before, known).transpose(1, 2), slopes)
        return carry(present, self.present) + carry(past, self.past) + carry(bias, self.bias)

    @torch.no_grad()
    def fit(
        self,
        books: slice,
        targets: torch.Tensor,
        present: torch.Tensor,
        past: torch.Tensor,
        weights: torch.Tensor,
        key: torch.Tensor,
    ) -> None:
        """Ridge regression of latents on the inputs, for usual and for key steps; without any, nothing changes.

        What the levels before say stands, and what is missing of it is regressed: the ridge draws to plain residual
        quantization. Drawn to 0, a prediction forgets at every level what was said in directions of little energy.

        With the same codes, what a level was off in the step before goes through the weights of its own last latent
        alone: its other inputs are of lower levels or of the first group. Their spectral radius says whether it dies
        out. Few or growing latents can raise it above 1, and then the ridge is doubled until it is not.

        Args:
            targets (`torch.Tensor` of shape `(g, M, d)`): Latents.
            present, past (`torch.Tensor` of shape `(g, M, ...)`): Inputs.
            weights (`torch.Tensor` of shape `(g, M)`): 1 where the latent counts, 0 elsewhere.
            key (`torch.BoolTensor` of shape `(M,)`): Key steps.
        """
        missing, identity = targets - present[..., : self.dim], torch.eye(self.dim).to(targets)
        present = torch.nn.functional.pad(present, (0, self.present.shape[2] - present.shape[2]))
        for kind, inputs in ((0, torch.cat([present, past], -1)), (1, present)):
            weight = weights * (key if kind else ~key)
            rows = torch.nn.functional.pad(inputs, (0, 1), value=1.0).double()
            weighted = rows * weight[..., None]
            gram, moment = weighted.transpose(1, 2) @ rows, weighted.transpose(1, 2) @ missing.double()
            known = (weight.sum(-1) > 1)[:, None, None]
            width, ridge = present.shape[-1], torch.full((len(gram), 1, 1), RIDGE).to(gram)
            found = ridge_regression(gram, moment, ridge)
            while not kind and (unstable := radius(found[:, width : width + self.dim]) > LARGEST_RADIUS).any():
                ridge[unstable] *= 2
                found = ridge_regression(gram, moment, ridge)
            found[:, : self.dim] += identity
            parts = [(self.present[kind], found[:, :width]), (self.bias[kind], found[:, -1:])]
            for parameter, fitted in parts if kind else [*parts, (self.past, found[:, width:-1])]:
                parameter[books] = torch.where(known, fitted, parameter[books])
