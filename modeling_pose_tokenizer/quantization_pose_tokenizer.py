"""Residual quantizers, batched over token groups: codebooks learned by k-means and running means (RVQ), or a fixed
grid (FSQ), behind one interface.

Letters: G token groups, M vectors, d dimensions of a latent, L levels, Q codebooks, K codes per codebook. Codebooks
lie level-major, so those of one level are neighbours: level 0 of every group, then level 1 of every group that has
one, ...
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from transformers import initialization as init

from .configuration_pose_tokenizer import PoseTokenizerConfig

# Rows of scores computed at a time on a CPU: 128 x 1024 floats stay in a core's second-level cache.
ROWS_PER_CHUNK = 128
# Codes per block of the two-level search: the minimum of a block is vectorised, torch.argmin is not.
CODES_PER_BLOCK = 32


@dataclass
class QuantizerOutput:
    """What a quantizer says of a batch.

    Attributes:
        quantized (`torch.Tensor` of shape `(B, S, G, d)`): Latents as the decoder gets them (straight-through).
        codes (`torch.LongTensor` of shape `(B, Q, S)`): Codes; 0 at steps that are not valid.
        commitment_loss (`torch.Tensor`): Mean distance between residuals and their codes over valid entries, as
            2 (sqrt(1 + s) - 1) of the mean square s: s where it is small, and no outlier rules the gradient.
        quantization_error (`torch.Tensor`): Mean squared distance between latents and quantized, over valid entries.
    """

    quantized: torch.Tensor
    codes: torch.Tensor
    commitment_loss: torch.Tensor
    quantization_error: torch.Tensor


def nearest_code(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest code in Euclidean distance, the lowest one where several are equally near.

    |x - c|^2 = |x|^2 - 2 x.c + |c|^2, and |x|^2 is the same for all codes: one matrix product ranks them.

    Args:
        vectors (`torch.Tensor` of shape `(G, M, d)`): What to look up.
        codebook (`torch.Tensor` of shape `(G, K, d)`): The codes of each group.

    Returns:
        `torch.LongTensor` of shape `(G, M)`.
    """
    square_norms = codebook.square().sum(-1)[:, None]  # (G, 1, K)
    transposed = codebook.transpose(1, 2)
    num_codes = codebook.shape[1]
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # a chunk loop would freeze M
    if traced or vectors.device.type != "cpu" or num_codes % CODES_PER_BLOCK:
        return torch.baddbmm(square_norms, vectors, transposed, alpha=-2).argmin(-1)
    codes = torch.empty(vectors.shape[:2], dtype=torch.long)
    for start in range(0, vectors.shape[1], ROWS_PER_CHUNK):
        chunk = slice(start, start + ROWS_PER_CHUNK)
        scores = torch.baddbmm(square_norms, vectors[:, chunk], transposed, alpha=-2)
        blocks = scores.unflatten(-1, (-1, CODES_PER_BLOCK))  # (G, m, K / 32, 32)
        block = blocks.amin(-1).argmin(-1, keepdim=True)  # (G, m, 1)
        inside = blocks.take_along_dim(block[..., None], 2)[..., 0, :].argmin(-1)
        codes[:, chunk] = block[..., 0] * CODES_PER_BLOCK + inside
    return codes


def draw_badly_served(vectors: torch.Tensor, served: torch.Tensor, count: int) -> torch.Tensor:
    """Vectors drawn with a probability that grows with their distance from what serves them, and levels off.

    New codes come from here. A part of the body that is missing gives the same vector most of the time: drawn evenly,
    most new codes would repeat the one that serves it already. Drawn by the distance or its square, as k-means++ does,
    most would go to the outliers of pose estimators.

    Args:
        vectors (`torch.Tensor` of shape `(G, M, d)`): Candidates.
        served (`torch.Tensor` of shape `(G, M, d)`): The code of each; equal to the vector itself where it must not be
            drawn.
        count (`int`): How many to draw, with repetition.

    Returns:
        `torch.Tensor` of shape `(G, count, d)`; NaN where all are served perfectly.
    """
    distance = (vectors - served).norm(dim=-1).double()  # (G, M)
    edges = (distance / (distance + distance.mean(-1, keepdim=True)).clamp(min=1e-12)).cumsum(-1)
    draws = torch.rand(len(vectors), count, device=vectors.device, dtype=torch.double) * edges[:, -1:]
    rows = torch.searchsorted(edges, draws, right=True).clamp(max=vectors.shape[1] - 1)
    return torch.where(edges[:, -1:, None] > 0, vectors.take_along_dim(rows[..., None], 1), torch.nan)


def kmeans(vectors: torch.Tensor, num_codes: int, num_iterations: int = 10) -> torch.Tensor:
    """Lloyd's algorithm from a random sample; a centre that lost its points moves to a badly served vector.

    Args:
        vectors (`torch.Tensor` of shape `(G, M, d)`): Samples.
        num_codes (`int`): K.
        num_iterations (`int`, *optional*, defaults to 10): Rounds.

    Returns:
        `torch.Tensor` of shape `(G, K, d)`.
    """
    groups, count, _ = vectors.shape
    order = torch.rand(groups, max(count, num_codes), device=vectors.device).argsort(-1)[:, :num_codes] % count
    centres = vectors.take_along_dim(order[..., None], 1)
    for _ in range(num_iterations):
        codes = nearest_code(vectors, centres)
        sizes, sums = code_statistics(vectors, codes, num_codes)
        spares = draw_badly_served(vectors, centres.take_along_dim(codes[..., None], 1), num_codes)
        lost = (sizes == 0)[..., None]
        moved = torch.where(spares.isfinite(), spares, centres)
        centres = torch.where(lost, moved, sums / sizes[..., None].clamp(min=1))
    return centres


def code_statistics(
    vectors: torch.Tensor, codes: torch.Tensor, num_codes: int, weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each code was chosen, and the sum of the vectors that chose it.

    Args:
        vectors (`torch.Tensor` of shape `(G, M, d)`): What was looked up.
        codes (`torch.LongTensor` of shape `(G, M)`): What was found.
        num_codes (`int`): K.
        weight (`torch.Tensor` of shape `(M,)`, *optional*): 1 where the vector counts, 0 elsewhere.

    Returns:
        `(counts (G, K), sums (G, K, d))`.
    """
    groups, count, dim = vectors.shape
    offset = torch.arange(groups, device=codes.device)[:, None] * num_codes
    flat = (codes + offset).reshape(-1)  # (G M,)
    weights = vectors.new_ones(count) if weight is None else weight.to(vectors.dtype)
    counts = vectors.new_zeros(groups * num_codes).index_add_(0, flat, weights.repeat(groups))
    sums = vectors.new_zeros(groups * num_codes, dim)
    sums.index_add_(0, flat, (vectors * weights[:, None]).reshape(-1, dim))
    return counts.view(groups, num_codes), sums.view(groups, num_codes, dim)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class ResidualQuantizer(nn.Module, ABC):
    """What RVQ and FSQ share: the walk over levels, each on what the levels before it left over.

    A subclass says how one level looks up, reads back and learns: `lookup`, `read`, `learn`, `initialize_level`.
    """

    def __init__(self, config: PoseTokenizerConfig):
        super().__init__()
        self.num_groups = len(config.group_names)
        self.num_codes = config.codebook_size
        self.dim = config.codebook_dim
        self.dropout = config.quantizer_dropout
        self.num_levels = config.num_levels
        levels = config.levels_per_group
        # Which groups have a codebook at each level, and where the level's codebooks lie among the Q.
        self.level_groups = [[g for g in range(self.num_groups) if levels[g] > level] for level in range(max(levels))]
        ends = [sum(map(len, self.level_groups[: level + 1])) for level in range(self.num_levels)]
        self.level_codebooks = [
            slice(end - len(groups), end) for end, groups in zip(ends, self.level_groups, strict=True)
        ]
        self.num_codebooks = ends[-1]
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    @abstractmethod
    def lookup(self, residual: torch.Tensor, books: slice) -> torch.Tensor:
        """Codes `(g, M)` of residuals `(g, M, d)` in the level's codebooks."""

    @abstractmethod
    def read(self, codes: torch.Tensor, books: slice) -> torch.Tensor:
        """Vectors `(g, M, d)` of codes `(g, M)`: the inverse of `lookup`."""

    def quantize(self, residual: torch.Tensor, books: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and vectors, with whatever gradient the codebook itself learns from."""
        codes = self.lookup(residual, books)
        return codes, self.read(codes, books)

    @abstractmethod
    def learn(self, residuals: list[torch.Tensor], codes: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
        """Update codebooks from what a training batch looked up; called once per step, all levels together."""

    @abstractmethod
    def initialize_level(self, residual: torch.Tensor, books: slice) -> None:
        """Fit the level's codebooks to residuals `(g, M, d)`."""

    @abstractmethod
    def codebook_usage(self) -> torch.Tensor:
        """Running counts `(Q, K)` of how often each code was chosen in training."""

    def check_levels(self, num_quantizers: int | None) -> int:
        """The number of levels asked for, all of them when `None`.

        Raises:
            ValueError: outside 1..L.
        """
        if num_quantizers is None:
            return self.num_levels
        if not 1 <= num_quantizers <= self.num_levels:
            raise ValueError(f"num_quantizers is {num_quantizers}; this model has 1 to {self.num_levels} levels.")
        return num_quantizers

    @torch.no_grad()
    def initialize(self, latents: torch.Tensor) -> None:
        """Fit every codebook to latents `(M, G, d)`, level by level."""
        residual = latents.float().transpose(0, 1).clone()  # (G, M, d)
        for groups, books in zip(self.level_groups, self.level_codebooks, strict=True):
            self.initialize_level(residual[groups], books)
            residual[groups] -= self.quantize(residual[groups], books)[1]
        self.initialized.fill_(True)

    def forward(
        self,
        latents: torch.Tensor,
        valid: torch.Tensor,
        observed: torch.Tensor | None = None,
        num_quantizers: int | None = None,
    ) -> QuantizerOutput:
        """Quantize, and in training mode learn.

        Args:
            latents (`torch.Tensor` of shape `(B, S, G, d)`): What the encoder says.
            valid (`torch.BoolTensor` of shape `(B, S)`): Steps that are not padding.
            observed (`torch.BoolTensor` of shape `(B, S)`, *optional*):
                Steps with at least one real frame: only these teach the codebooks. Defaults to `valid`.
            num_quantizers (`int`, *optional*): Levels to use; all by default, a random prefix in training.
        """
        num_levels = self.check_levels(num_quantizers)
        batch, steps = valid.shape
        valid_row = valid.reshape(-1)  # (M,)
        observed_row = valid_row if observed is None else observed.reshape(-1)
        # Codes are fp32 whatever the model computes in: a rounded distance is another code.
        with torch.autocast(latents.device.type, enabled=False):
            inputs = latents.float().flatten(0, 1).transpose(0, 1)  # (G, M, d)
            inputs = torch.where(valid_row[:, None], inputs, 0.0)
            kept_levels = self._kept_levels(batch, steps, num_levels, num_quantizers, latents.device)
            residual, quantized = inputs.clone(), torch.zeros_like(inputs)
            commitment, entries = inputs.new_zeros(()), inputs.new_zeros(())
            residuals, all_codes, weights = [], [], []
            for level in range(num_levels):
                groups, books = self.level_groups[level], self.level_codebooks[level]
                here = residual[groups]  # (g, M, d)
                # Detached: the encoder learns through the straight-through sum below, once.
                codes, vectors = self.quantize(here.detach(), books)
                kept = valid_row & (kept_levels > level)
                squared = (here - vectors.detach()).square().mean(-1)  # (g, M)
                commitment = commitment + torch.where(kept, 2 * ((1 + squared).sqrt() - 1), 0.0).sum()
                entries = entries + kept.sum() * len(groups)
                step = torch.where(kept[:, None], vectors, 0.0)
                quantized = quantized.index_add(0, torch.tensor(groups, device=step.device), step)
                residual = residual.index_add(0, torch.tensor(groups, device=step.device), step.detach(), alpha=-1)
                residuals.append(here.detach())
                all_codes.append(torch.where(valid_row, codes, 0))
                weights.append(kept & observed_row)
            if self.training:
                self.learn(residuals, all_codes, weights)
            error = torch.where(valid_row[:, None], (inputs - quantized).detach().square(), 0.0).sum()
            error = error / (valid_row.sum() * self.num_groups * self.dim).clamp(min=1)
            # Straight-through: the decoder sees the codes, the encoder gets the decoder's gradient as if it had not.
            passed = quantized + (inputs - inputs.detach())
        return QuantizerOutput(
            quantized=passed.transpose(0, 1).unflatten(0, (batch, steps)).to(latents.dtype),
            codes=torch.cat(all_codes).unflatten(1, (batch, steps)).transpose(0, 1),  # (B, Q, S)
            commitment_loss=commitment / entries.clamp(min=1),
            quantization_error=error,
        )

    def _kept_levels(
        self, batch: int, steps: int, num_levels: int, num_quantizers: int | None, device: torch.device
    ) -> torch.Tensor:
        """Levels each of the M steps keeps: in training a random prefix for some sequences: prefixes must decode."""
        kept = torch.full((batch,), num_levels, device=device)
        if self.training and num_quantizers is None and self.dropout > 0:
            shortened = torch.randint(1, num_levels + 1, (batch,), device=device)
            kept = torch.where(torch.rand(batch, device=device) < self.dropout, shortened, kept)
        return kept.repeat_interleave(steps)

    @torch.no_grad()
    def encode(self, latents: torch.Tensor, valid: torch.Tensor, num_quantizers: int | None = None) -> torch.Tensor:
        """Latents `(B, S, G, d)` to codes `(B, Q, S)`: `forward` without gradients, losses and learning."""
        batch, steps = valid.shape
        valid_row = valid.reshape(-1)
        with torch.autocast(latents.device.type, enabled=False):
            residual = latents.float().flatten(0, 1).transpose(0, 1)  # (G, M, d)
            residual = torch.where(valid_row[:, None], residual, 0.0)
            codes = []
            num_levels = self.check_levels(num_quantizers)
            for level in range(num_levels):
                groups, books = self.level_groups[level], self.level_codebooks[level]
                here = residual[groups]
                codes.append(self.lookup(here, books))
                if level + 1 < num_levels:
                    residual[groups] = here - self.read(codes[-1], books)
        return torch.where(valid_row, torch.cat(codes), 0).unflatten(1, (batch, steps)).transpose(0, 1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(B, Q, S)` of all levels or a prefix of them to latents `(B, S, G, d)`: the inverse of `encode`.

        Raises:
            ValueError: a number of codebooks that is no prefix of levels.
        """
        batch, num_books, steps = codes.shape
        prefixes = [books.stop for books in self.level_codebooks]
        if num_books not in prefixes:
            raise ValueError(
                f"pose_codes has {num_books} codebooks; this model's levels need {' or '.join(map(str, prefixes))}."
            )
        flat = codes.transpose(0, 1).flatten(1)  # (Q, M)
        latents = torch.zeros(self.num_groups, batch * steps, self.dim, device=codes.device)
        for level in range(prefixes.index(num_books) + 1):
            groups, books = self.level_groups[level], self.level_codebooks[level]
            latents = latents.index_add(0, torch.tensor(groups, device=codes.device), self.read(flat[books], books))
        return latents.transpose(0, 1).unflatten(0, (batch, steps))


class ResidualVectorQuantizer(ResidualQuantizer):
    """Residual vector quantization (SoundStream, arXiv 2107.03312) with codebooks that are running means.

    Buffers:
        initialized: whether k-means has run.
        codebook (Q, K, d): the codes.
        cluster_size (Q, K): running count of each code's vectors.
        embed_sum (Q, K, d): running sum of each code's vectors.
    """

    def __init__(self, config: PoseTokenizerConfig):
        super().__init__(config)
        self.decay = config.ema_decay
        self.threshold = config.threshold_usage_ratio
        shape = (self.num_codebooks, self.num_codes, self.dim)
        # Random codes, so that a model without training still tells its inputs apart; k-means replaces them.
        self.register_buffer("codebook", torch.empty(shape))
        self.register_buffer("cluster_size", torch.ones(shape[:2]))
        self.register_buffer("embed_sum", torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randn(self.codebook.shape, generator=generator, device="cpu") * self.dim**-0.5
        init.zeros_(self.initialized)
        init.copy_(self.codebook, codes)
        init.ones_(self.cluster_size)
        init.copy_(self.embed_sum, codes)

    def lookup(self, residual: torch.Tensor, books: slice) -> torch.Tensor:
        return nearest_code(residual, self.codebook[books].float())

    def read(self, codes: torch.Tensor, books: slice) -> torch.Tensor:
        rows = torch.arange(codes.shape[0], device=codes.device)[:, None]
        return self.codebook[books].float()[rows, codes]

    def codebook_usage(self) -> torch.Tensor:
        return self.cluster_size

    def initialize_level(self, residual: torch.Tensor, books: slice) -> None:
        centres = kmeans(residual, self.num_codes)
        sizes, _ = code_statistics(residual, nearest_code(residual, centres), self.num_codes)
        # A running count starts as if the sample had come in steps of the usual size, K vectors.
        sizes = sizes * (self.num_codes / residual.shape[1])
        self.codebook[books] = centres
        self.cluster_size[books] = sizes
        self.embed_sum[books] = centres * sizes[..., None]

    @torch.no_grad()
    def learn(self, residuals: list[torch.Tensor], codes: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
        """Running means of the vectors that chose each code, Laplace-smoothed; dead codes move elsewhere."""
        levels = zip(residuals, codes, weights, strict=True)
        statistics = [code_statistics(vectors, found, self.num_codes, weight) for vectors, found, weight in levels]
        books = slice(0, sum(len(level) for level in residuals))  # fewer than Q under an explicit prefix
        counts = torch.cat([count for count, _ in statistics])
        sums = torch.cat([total for _, total in statistics])
        served = [
            torch.where(weight[:, None], self.read(found, level), vectors)  # what does not count is not drawn
            for vectors, found, weight, level in zip(residuals, codes, weights, self.level_codebooks, strict=False)
        ]
        drawn = [draw_badly_served(*level, self.num_codes) for level in zip(residuals, served, strict=True)]
        spares = torch.cat(drawn)
        if is_distributed():
            packed = torch.cat([counts[..., None], sums], -1)
            dist.all_reduce(packed)
            counts, sums = packed[..., 0], packed[..., 1:]
            dist.broadcast(spares, src=0)
        fed = (counts.sum(-1, keepdim=True) > 0).to(counts.dtype)  # a level that dropout left empty forgets nothing
        momentum = (1 - self.decay) * fed
        size = self.cluster_size[books].lerp(counts, momentum)
        total = self.embed_sum[books].lerp(sums, momentum[..., None])
        uniform = size.mean(-1, keepdim=True)
        dead = (size < self.threshold * uniform) & (fed > 0) & spares.isfinite().all(-1)
        size = torch.where(dead, uniform, size)
        total = torch.where(dead[..., None], spares * uniform[..., None], total)
        mass, epsilon = size.sum(-1, keepdim=True), 1e-5
        smoothed = (size + epsilon) / (mass + self.num_codes * epsilon) * mass
        self.cluster_size[books] = size
        self.embed_sum[books] = total
        self.codebook[books] = torch.where(fed[..., None] > 0, total / smoothed[..., None], self.codebook[books])


class ResidualFiniteScalarQuantizer(ResidualQuantizer):
    """Finite scalar quantization (arXiv 2309.15505) of each level's residual, in a learned projection of its own.

    A code is a point of a grid: `fsq_levels[i]` values in dimension i. The grid does not learn; the projections do.

    Buffers:
        initialized: whether the projections have been fitted.
        usage (Q, K): running count of each code.
    """

    def __init__(self, config: PoseTokenizerConfig):
        super().__init__(config)
        self.levels = config.fsq_levels
        self.decay = config.ema_decay
        self.project_in = nn.Parameter(torch.zeros(self.num_codebooks, self.dim, len(self.levels)))
        self.project_out = nn.Parameter(torch.zeros(self.num_codebooks, len(self.levels), self.dim))
        self.bias = nn.Parameter(torch.zeros(self.num_codebooks, 1, self.dim))
        self.register_buffer("usage", torch.ones(self.num_codebooks, self.num_codes))

    def reset_parameters(self) -> None:
        init.zeros_(self.initialized)
        init.normal_(self.project_in, std=1.0)
        init.normal_(self.project_out, std=self.dim**-0.5)
        init.zeros_(self.bias)
        init.ones_(self.usage)

    def codebook_usage(self) -> torch.Tensor:
        return self.usage

    def _grid(self, residual: torch.Tensor, books: slice) -> torch.Tensor:
        """Grid coordinates 0..levels-1, rounded straight-through: (g, M, d) -> (g, M, len(levels))."""
        top = torch.tensor(self.levels, device=residual.device, dtype=torch.float32) - 1
        bounded = torch.bmm(residual - self.bias[books].float(), self.project_in[books].float()).sigmoid() * top
        return bounded + (bounded.round() - bounded).detach()

    def _place(self, grid: torch.Tensor, books: slice) -> torch.Tensor:
        """Grid coordinates to vectors, through the symmetric interval [-1, 1]."""
        top = torch.tensor(self.levels, device=grid.device, dtype=torch.float32) - 1
        return torch.bmm(grid / top * 2 - 1, self.project_out[books].float()) + self.bias[books].float()

    def lookup(self, residual: torch.Tensor, books: slice) -> torch.Tensor:
        return self._to_codes(self._grid(residual, books))

    def _to_codes(self, grid: torch.Tensor) -> torch.Tensor:
        """Mixed-radix number of a grid point, the last dimension fastest."""
        codes = torch.zeros(grid.shape[:-1], dtype=torch.long, device=grid.device)
        for index, values in enumerate(self.levels):
            codes = codes * values + grid[..., index].round().long()
        return codes

    def _to_grid(self, codes: torch.Tensor) -> torch.Tensor:
        """The inverse of `_to_codes`."""
        digits = []
        for values in reversed(self.levels):
            digits.append(codes % values)
            codes = codes // values
        return torch.stack(digits[::-1], -1).float()

    def read(self, codes: torch.Tensor, books: slice) -> torch.Tensor:
        return self._place(self._to_grid(codes), books)

    def quantize(self, residual: torch.Tensor, books: slice) -> tuple[torch.Tensor, torch.Tensor]:
        grid = self._grid(residual, books)
        return self._to_codes(grid), self._place(grid, books)

    def initialize_level(self, residual: torch.Tensor, books: slice) -> None:
        """Principal directions, scaled so that two standard deviations fill the grid."""
        mean = residual.mean(1, keepdim=True)
        _, spread, basis = torch.linalg.svd(residual - mean, full_matrices=False)
        used = min(len(self.levels), basis.shape[1])
        deviation = (spread[:, :used, None] / residual.shape[1] ** 0.5).clamp(min=1e-6)  # (g, used, 1)
        self.bias[books] = mean
        self.project_in[books] = 0.0
        self.project_out[books] = 0.0
        self.project_in[books, :, :used] = (basis[:, :used] / deviation).transpose(1, 2)
        # sigmoid(x) * 2 - 1 has slope 1/2 at 0: twice the deviation undoes it there.
        self.project_out[books, :used] = basis[:, :used] * deviation * 2

    @torch.no_grad()
    def learn(self, residuals: list[torch.Tensor], codes: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
        counts = [
            code_statistics(r[..., :1], c, self.num_codes, w)[0]
            for r, c, w in zip(residuals, codes, weights, strict=True)
        ]
        counted = torch.cat(counts)
        if is_distributed():
            dist.all_reduce(counted)
        self.usage[: len(counted)].lerp_(counted, 1 - self.decay)


QUANTIZERS: dict[str, type[ResidualQuantizer]] = {
    "rvq": ResidualVectorQuantizer,
    "fsq": ResidualFiniteScalarQuantizer,
}


def broadcast_module(module: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers; nothing to do alone."""
    if is_distributed():
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, src=0)
