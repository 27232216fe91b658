"""Residual quantizers: codebooks learned by k-means and running means (RVQ), or a fixed grid (FSQ), behind one
interface.

Letters: M vectors, d dimensions of a latent, Q codebooks, K codes per codebook.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .codebook_pose_tokenizer import code_statistics, draw_badly_served, kmeans, nearest_code
from .configuration_pose_tokenizer import PoseTokenizerConfig
from .residual_pose_tokenizer import ResidualQuantizer


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class ResidualVectorQuantizer(ResidualQuantizer):
    """Residual vector quantization (SoundStream, arXiv 2107.03312) with codebooks that are running means.

    Code 0 of every codebook is the zero vector: it says that the prediction stands, as where a hand is not seen.

    Buffers:
        initialized: whether k-means has run.
        codebook (Q, K, d): the codes.
        cluster_size (Q, K): running count of each code's vectors.
    """

    def __init__(self, config: PoseTokenizerConfig):
        super().__init__(config)
        self.decay = config.ema_decay
        self.threshold = config.threshold_usage_ratio
        shape = (self.num_codebooks, self.num_codes, self.dim)
        # Random codes, so that a model without training still tells its inputs apart; k-means replaces them.
        self.register_buffer("codebook", torch.empty(shape, dtype=torch.float32))
        self.register_buffer("cluster_size", torch.ones(shape[:2], dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randn(self.codebook.shape, generator=generator, device="cpu") * self.dim**-0.5
        codes[:, 0] = 0.0
        init.zeros_(self.initialized)
        init.copy_(self.codebook, codes)
        init.ones_(self.cluster_size)

    def tables(self) -> torch.Tensor:
        """Squared norms of the codes `(Q, K)`."""
        return self.codebook.float().square().sum(-1)

    def lookup(self, residual: torch.Tensor, books: slice, tables: torch.Tensor | None = None) -> torch.Tensor:
        return nearest_code(residual, self.codebook[books].float(), None if tables is None else tables[books])

    def read(self, codes: torch.Tensor, books: slice) -> torch.Tensor:
        if len(codes) == 1:
            return self.codebook[books.start].float().index_select(0, codes[0])[None]
        first = torch.arange(codes.shape[0], device=codes.device)[:, None] * self.num_codes
        rows = (first + codes).flatten()  # index_select copies rows, which indexing does value by value
        return self.codebook[books].float().flatten(0, 1).index_select(0, rows).unflatten(0, codes.shape)

    def codebook_usage(self) -> torch.Tensor:
        return self.cluster_size

    def initialize_level(self, residual: torch.Tensor, books: slice, again: bool) -> None:
        start = self.codebook[books, 1:] if again else None
        centres = F.pad(kmeans(residual, self.num_codes - 1, 3 if again else 10, start), (0, 0, 1, 0))
        sizes, _ = code_statistics(residual, nearest_code(residual, centres), self.num_codes)
        self.codebook[books] = centres
        # A running count starts as if the sample had come in steps of the usual size, K vectors.
        self.cluster_size[books] = sizes * (self.num_codes / residual.shape[1])

    def _smoothed(self, size: torch.Tensor) -> torch.Tensor:
        """Laplace-smoothed counts `(q, K)`."""
        mass, epsilon = size.sum(-1, keepdim=True), 1e-5
        return (size + epsilon) / (mass + self.num_codes * epsilon) * mass

    @torch.no_grad()
    def learn(self, residuals: torch.Tensor, codes: torch.Tensor, weights: torch.Tensor) -> None:
        """Running means of the vectors that chose each code, Laplace-smoothed; dead codes move elsewhere."""
        books = slice(0, len(codes))  # fewer than Q under an explicit prefix
        counts, sums = code_statistics(residuals, codes, self.num_codes, weights)
        if is_distributed():
            packed = torch.cat([counts[..., None], sums], -1)
            dist.all_reduce(packed)
            counts, sums = packed[..., 0], packed[..., 1:]
        fed = counts.sum(-1, keepdim=True) > 0  # a level that dropout left empty forgets nothing
        momentum = (1 - self.decay) * fed
        before, codebook = self.cluster_size[books], self.codebook[books]
        size = before.lerp(counts, momentum)
        uniform = size.mean(-1, keepdim=True)
        dead = (size < self.threshold * uniform) & fed
        dead[:, 0] = False
        spares = None
        # Counts are sums over ranks, so all of them ask for spares or none. A GPU would make the program wait for the
        # answer: there spares are always drawn.
        if torch.compiler.is_compiling() or dead.device.type != "cpu" or dead.any():
            spares = self._draw_spares(residuals, codes, weights)
            dead &= spares.isfinite().all(-1)
            size = torch.where(dead, uniform, size)
        # The running sum is the code times its smoothed count.
        mass = self._smoothed(size)
        codebook.mul_((self._smoothed(before) * (1 - momentum) / mass)[..., None])
        codebook.addcmul_(sums, (momentum / mass)[..., None])
        if spares is not None:
            codebook.copy_(torch.where(dead[..., None], spares * (uniform / mass)[..., None], codebook))
        codebook[:, 0] = 0.0
        self.cluster_size[books] = size

    def _draw_spares(self, residuals: torch.Tensor, codes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Vectors `(q, K, d)` for dead codes to move to, rank 0's on all ranks."""
        # What does not count is not drawn: it is served by itself. It may be no number.
        residuals = torch.where(weights[..., None], residuals, 0.0)
        served = torch.where(weights[..., None], self.read(codes, slice(0, len(codes))), residuals)
        spares = draw_badly_served(residuals, served, self.num_codes)
        if is_distributed():
            dist.broadcast(spares, src=0)
        return spares


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
        books, fp32 = self.num_codebooks, torch.float32  # whatever the dtype that the model is made in
        self.project_in = nn.Parameter(torch.zeros(books, self.dim, len(self.levels), dtype=fp32))
        self.project_out = nn.Parameter(torch.zeros(books, len(self.levels), self.dim, dtype=fp32))
        self.bias = nn.Parameter(torch.zeros(books, 1, self.dim, dtype=fp32))
        self.register_buffer("usage", torch.ones(books, self.num_codes, dtype=fp32))
        for name, value in self.constants().items():
            self.register_buffer(name, value, persistent=False)

    def constants(self) -> dict[str, torch.Tensor]:
        """The grid's last coordinate in each dimension: a loop in an exported graph makes no tensors of numbers."""
        return {"top": torch.tensor(self.levels, dtype=torch.float32) - 1}

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
        bounded = torch.bmm(residual - self.bias[books].float(), self.project_in[books].float()).sigmoid() * self.top
        return bounded + (bounded.round() - bounded).detach()

    def _place(self, grid: torch.Tensor, books: slice) -> torch.Tensor:
        """Grid coordinates to vectors, through the symmetric interval [-1, 1]."""
        return torch.bmm(grid / self.top * 2 - 1, self.project_out[books].float()) + self.bias[books].float()

    def lookup(self, residual: torch.Tensor, books: slice, tables: torch.Tensor | None = None) -> torch.Tensor:
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

    def read_learned(self, residual: torch.Tensor, books: slice) -> torch.Tensor:
        return self._place(self._grid(residual, books), books)

    def initialize_level(self, residual: torch.Tensor, books: slice, again: bool) -> None:
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
    def learn(self, residuals: torch.Tensor, codes: torch.Tensor, weights: torch.Tensor) -> None:
        counts, _ = code_statistics(residuals[..., :1], codes, self.num_codes, weights)
        if is_distributed():
            dist.all_reduce(counts)
        self.usage[: len(counts)].lerp_(counts, 1 - self.decay)


QUANTIZERS: dict[str, type[ResidualQuantizer]] = {
    "rvq": ResidualVectorQuantizer,
    "fsq": ResidualFiniteScalarQuantizer,
}


def broadcast_module(module: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers; nothing to do alone."""
    if is_distributed():
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, src=0)
