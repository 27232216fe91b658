"""Rows for pose tokens in the embeddings of a language model, begun from the codebooks.

Letters: Q codebooks, K codes of a codebook, d dimensions of a code, V rows of the embeddings, h their size.
"""

from collections.abc import Sequence
from typing import Any

import torch

Codebooks = torch.Tensor | Sequence[torch.Tensor]


def check_codebooks(codebooks: Codebooks, sizes: Sequence[int]) -> None:
    """Raises a `ValueError` unless the codebooks are finite and of the sizes (Q)."""
    shapes = [tuple(book.shape) for book in codebooks]
    if [shape[:1] for shape in shapes] != [(size,) for size in sizes] or any(len(shape) != 2 for shape in shapes):
        found = tuple(codebooks.shape) if isinstance(codebooks, torch.Tensor) else shapes
        raise ValueError(f"codebooks have shape {found}; expected {len(sizes)} of (K, d) with K = {list(sizes)}.")
    if not all(book.isfinite().all() for book in codebooks):
        raise ValueError("codebooks have values that are not finite; expected those of a trained model.")


def project_codebooks(codebooks: Codebooks, size: int, seed: int = 0) -> torch.Tensor:
    """Brings code vectors to the size of embeddings: similar codes begin as similar tokens.

    The vectors of a codebook are centred and divided by their standard deviation, then multiplied by a random matrix
    (d, h) of the codebook's own, of independent normal entries with variance 1 / d. Such a matrix keeps the distances
    within a codebook up to a common factor and a small error (Johnson and Lindenstrauss, "Extensions of Lipschitz
    mappings into a Hilbert space", 1984), and two of them send two codebooks in directions of their own.

    Args:
        codebooks: (Q, K, d), or Q times (K, d).
        size: h.
        seed: Of the random matrices.

    Returns:
        (Q * K, h) in fp32, each entry with mean 0 and variance 1 over the random matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for book in codebooks:
        vectors = book.detach().to("cpu", torch.float32)
        vectors = vectors - vectors.mean(0)
        vectors = vectors / vectors.square().mean().sqrt().clamp(min=1e-12)
        matrix = torch.randn(vectors.shape[1], size, generator=generator) / vectors.shape[1] ** 0.5
        rows.append(vectors @ matrix)
    return torch.cat(rows)


@torch.no_grad()
def grow_embeddings(
    model: Any, num_tokens: int, first: int, num_special: int, codebooks: Codebooks | None, new: bool
) -> None:
    """Makes room for pose tokens in the input and output embeddings of a `transformers` model.

    Without codebooks the new rows are those of `resize_token_embeddings`. With codebooks the rows of codes are
    `project_codebooks`, scaled so that each of the h dimensions has the mean and the standard deviation of the rows
    of the tokens before them; special tokens, and what else is new, begin as that mean.

    Args:
        model: Its embeddings grow to `num_tokens` rows; they never shrink.
        num_tokens: Tokens of the tokenizer.
        first: Id of the first pose token, a special one.
        num_special: Pose tokens that are no codes.
        codebooks: (Q, K, d), or Q times (K, d); None for no initialisation.
        new: Whether the tokenizer has just got the pose tokens.

    Raises:
        ValueError: Codebooks for a model that has rows for these pose tokens already.
    """
    before = model.get_input_embeddings().weight.shape[0]
    if codebooks is not None and not new and before >= num_tokens:
        raise ValueError(
            "tokenizer and model have the pose tokens already, and codebooks would undo what the model has learned of"
            " them; call add_to without codebooks."
        )
    if before < num_tokens:
        # The default draws new rows from a covariance (h, h), which is slow, and not needed where they are replaced.
        model.resize_token_embeddings(num_tokens, mean_resizing=codebooks is None)
    if codebooks is None:
        return
    tables = [model.get_input_embeddings()]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not tables[0].weight:
        tables.append(output)
    end = first + num_special
    for table in tables:
        rows = project_codebooks(codebooks, table.weight.shape[1]).to(table.weight.device)
        rows = (rows - rows.mean(0)) / rows.std(0, correction=0).clamp(min=1e-12)
        known = table.weight[: min(before, first) or before].float()
        mean, deviation = known.mean(0), known.std(0, correction=0)
        table.weight[before:] = mean
        table.weight[first:end] = mean
        table.weight[end : end + len(rows)] = rows * deviation + mean
        bias = getattr(table, "bias", None)
        if bias is not None:
            mean = bias[: min(before, first) or before].mean()
            bias[before:] = mean
            bias[first : end + len(rows)] = mean
