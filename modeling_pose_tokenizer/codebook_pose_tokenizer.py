"""Codebooks: the nearest code, k-means, and what their statistics are made of.

Letters: G token groups, M vectors, d dimensions of a latent, K codes per codebook.
"""

import torch

# Scores computed at a time on a CPU: fewer would stay in a core's own cache, but make the product, most of the work,
# slower.
SCORES_PER_CHUNK = 2**20
# Codes per block of the two-level search: the minimum of a block is vectorised, torch.argmin is not.
CODES_PER_BLOCK = 32
# Below so many scores one pass of torch.argmin is over before the operations of two levels have begun.
FEW_SCORES = 2**16


def nearest_code(
    vectors: torch.Tensor, codebook: torch.Tensor, square_norms: torch.Tensor | None = None
) -> torch.Tensor:
    """Index of the nearest code in Euclidean distance, the lowest one where several are equally near.

    |x - c|^2 = |x|^2 - 2 x.c + |c|^2, and |x|^2 is the same for all codes: one matrix product ranks them.

    Args:
        vectors (`torch.Tensor` of shape `(G, M, d)`): What to look up.
        codebook (`torch.Tensor` of shape `(G, K, d)`): The codes of each group.
        square_norms (`torch.Tensor` of shape `(G, K)`, *optional*): |c|^2, for who looks up again and again.

    Returns:
        `torch.LongTensor` of shape `(G, M)`.
    """
    square_norms = (codebook.square().sum(-1) if square_norms is None else square_norms)[:, None]  # (G, 1, K)
    transposed = codebook.transpose(1, 2)
    groups, count, num_codes = *vectors.shape[:2], codebook.shape[1]
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # a chunk loop would freeze M
    few = traced or vectors.device.type != "cpu" or groups * count * num_codes <= FEW_SCORES
    if few or num_codes % CODES_PER_BLOCK:
        return torch.baddbmm(square_norms, vectors, transposed, alpha=-2).argmin(-1)
    codes = torch.empty(vectors.shape[:2], dtype=torch.long)
    rows = max(1, SCORES_PER_CHUNK // (groups * num_codes))
    for start in range(0, count, rows):
        chunk = slice(start, start + rows)
        scores = torch.baddbmm(square_norms, vectors[:, chunk], transposed, alpha=-2)
        blocks = scores.view(-1, num_codes // CODES_PER_BLOCK, CODES_PER_BLOCK)  # (G m, K / 32, 32)
        block = blocks.amin(-1).argmin(-1)  # (G m,)
        places = torch.arange(len(blocks)) * blocks.shape[1] + block
        inside = blocks.flatten(0, 1).index_select(0, places).argmin(-1)
        codes[:, chunk] = (block * CODES_PER_BLOCK + inside).view(groups, -1)
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


def kmeans(
    vectors: torch.Tensor, num_codes: int, num_iterations: int = 10, start: torch.Tensor | None = None
) -> torch.Tensor:
    """Lloyd's algorithm from a random sample; a centre that lost its points moves to a badly served vector.

    Args:
        vectors (`torch.Tensor` of shape `(G, M, d)`): Samples.
        num_codes (`int`): K.
        num_iterations (`int`, *optional*, defaults to 10): Rounds.
        start (`torch.Tensor` of shape `(G, K, d)`, *optional*): Centres to go on from, instead of a random sample.

    Returns:
        `torch.Tensor` of shape `(G, K, d)`.
    """
    groups, count, _ = vectors.shape
    centres = start
    if centres is None:
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
        weight (`torch.BoolTensor` of shape `(G, M)`, *optional*): Where the vector counts.

    Returns:
        `(counts (G, K), sums (G, K, d))`.
    """
    groups, count, dim = vectors.shape
    last = groups * num_codes  # what does not count, which may be no number, goes to a row behind those of the codes
    flat = codes + torch.arange(groups, device=codes.device)[:, None] * num_codes  # (G, M)
    flat = (flat if weight is None else torch.where(weight, flat, last)).reshape(-1)
    counts = vectors.new_zeros(last + 1).index_add_(0, flat, vectors.new_ones(1).expand(groups * count))
    sums = vectors.new_zeros(last + 1, dim).index_add_(0, flat, vectors.reshape(-1, dim))
    return counts[:last].view(groups, num_codes), sums[:last].view(groups, num_codes, dim)


def robust_sum(difference: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of 2 (sqrt(1 + s) - 1) of the mean square s over the last dimension, where `weight` is True, and its
    derivative with respect to `difference`.

    It is s where it is small, and no outlier rules the gradient.
    """
    root = (1 + difference.square().mean(-1)).sqrt()
    total = torch.where(weight, 2 * (root - 1), 0.0).sum()
    return total, difference * torch.where(weight, 2 / (difference.shape[-1] * root), 0.0)[..., None]


def carry(slope: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """0, with the gradient `slope` with respect to `tensor`."""
    value = slope.reshape(-1) @ tensor.float().reshape(-1)
    return value - value.detach()


def repeat_what_counts(vectors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The vectors `(g, M, d)` that count, each group's repeated until there are M; all of them where none counts."""
    rows = []
    for weight in weights:
        chosen = weight.nonzero()[:, 0] if weight.any() else torch.arange(len(weight), device=weight.device)
        rows.append(chosen[torch.arange(len(weight), device=weight.device) % len(chosen)])
    return vectors.take_along_dim(torch.stack(rows)[..., None], 1)
