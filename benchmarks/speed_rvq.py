"""Residual vector quantization alone: ours beside `vector-quantize-pytorch`, with the same codebooks.

Letters: M vectors, d dimensions, L levels, K codes per codebook.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from speed_tools import best_size, gemm_rate, gemm_work, measure, try_sizes
from torch import nn
from vector_quantize_pytorch import ResidualVQ

from modeling_pose_tokenizer import PoseTokenizerConfig, PoseTokenizerModel
from modeling_pose_tokenizer.codebook_pose_tokenizer import nearest_code
from modeling_pose_tokenizer.prediction_pose_tokenizer import PoseTokenizerPredictor

LEVELS, CODES = 8, 1024
DIMENSIONS = (32, 128, 512)
SIZES = (256, 1024, 4096)
# Two codes this near to a vector, relative to their distance, are a tie that rounding decides.
TIE = 1e-5


class NoPrediction(PoseTokenizerPredictor):
    """A level expects what the levels before it say: plain residual quantization, the library's job."""

    def from_present(self, inputs: torch.Tensor, books: slice, key: Any) -> torch.Tensor:
        return inputs

    def carry(self, latents: torch.Tensor, slope: torch.Tensor, *_: Any) -> torch.Tensor:
        return slope.new_zeros(())


def our_quantizer(levels: int, codes: int, dim: int, prediction: bool = True) -> nn.Module:
    """Ours, for one token group, without quantizer dropout."""
    config = PoseTokenizerConfig(
        token_groups="whole", num_quantizers=levels, codebook_size=codes, codebook_dim=dim, quantizer_dropout=0.0
    )
    quantizer = PoseTokenizerModel(config).quantizer.train()
    if not prediction:
        quantizer.key_interval = 1  # nor from the step before
        quantizer.predictor = NoPrediction(quantizer.predictor.owners, dim)
    return quantizer


def library_quantizer(codebooks: torch.Tensor, threshold: float = 2) -> ResidualVQ:
    """The library's, with the gradient, the running means and the dead-code replacement that ours has too."""
    levels, codes, dim = codebooks.shape
    quantizer = ResidualVQ(
        dim=dim,
        num_quantizers=levels,
        codebook_size=codes,
        decay=0.99,
        threshold_ema_dead_code=threshold,
        rotation_trick=False,
    )
    for layer, book in zip(quantizer.layers, codebooks, strict=True):
        layer.codebook = book
    return quantizer


def residual_codes(vectors: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Codes `(M, L)` of vectors `(M, d)` in codebooks `(L, K, d)`, by our lookup."""
    residual, codes = vectors, []
    for book in codebooks:
        codes.append(nearest_code(residual[None], book[None])[0])
        residual = residual - book[codes[-1]]
    return torch.stack(codes, 1)


def check_identical(ours: torch.Tensor, theirs: torch.Tensor, vectors: torch.Tensor, codebooks: torch.Tensor) -> int:
    """Vectors whose codes `(M, L)` differ, all of them at a tie.

    Raises:
        AssertionError: two codes differ where one is nearer.
    """
    rows = (ours != theirs).any(1).nonzero()[:, 0]
    for row in rows:
        residual = vectors[row].double()
        for mine, other, book in zip(ours[row], theirs[row], codebooks.double(), strict=True):
            if mine != other:
                first, second = (float((residual - book[code]).norm()) for code in (mine, other))
                assert abs(first - second) <= TIE * (first + second), f"codes {mine} and {other} at {first}, {second}"
                break
            residual = residual - book[mine]
    return len(rows)


def lookup_works(size: int, dim: int) -> dict[str, Callable[[], object]]:
    """Encoding `size` vectors: ours, the library's, and the bare matrix products of the same shape."""
    torch.manual_seed(0)
    codebooks = torch.randn(LEVELS, CODES, dim) * torch.arange(LEVELS, 0, -1)[:, None, None] / LEVELS
    vectors = torch.randn(size, dim) * LEVELS**0.5
    library = library_quantizer(codebooks).eval()
    transposed = codebooks.transpose(1, 2).contiguous()
    with torch.inference_mode():
        theirs = library(vectors[None])[1][0]
        check_identical(residual_codes(vectors, codebooks), theirs, vectors, codebooks)
    return {
        "ours": torch.inference_mode()(lambda: residual_codes(vectors, codebooks)),
        "library": torch.inference_mode()(lambda: library(vectors[None])),
        "product": torch.inference_mode()(lambda: [vectors @ book for book in transposed]),
    }


def training_works(size: int, dim: int, levels: int = LEVELS, codes: int = CODES) -> dict[str, Callable[[], object]]:
    """A training step of the quantizer alone: forward, codebook update, gradients of the latents and of prediction.

    Both replace codes that are used less than a tenth as often as in even use. `plain` is ours without prediction,
    which the library has not.
    """
    torch.manual_seed(0)
    latents = torch.randn(1, size, dim, requires_grad=True)
    # Sequences of one step: nothing is predicted from the step before.
    valid = torch.ones(size, 1, dtype=torch.bool)
    library = library_quantizer(torch.randn(levels, codes, dim) * dim**-0.5, 0.1 * size / codes).train()

    def train_ours(quantizer: nn.Module) -> None:
        quantizer.zero_grad()
        latents.grad = None
        output = quantizer(latents[0, :, None, None], valid)
        (output.quantized.square().mean() + output.commitment_loss).backward()

    def train_library() -> None:
        latents.grad = None
        quantized, _, losses = library(latents)
        (quantized.square().mean() + losses.mean()).backward()

    kinds = {"ours": our_quantizer(levels, codes, dim), "plain": our_quantizer(levels, codes, dim, prediction=False)}
    return {**{name: partial(train_ours, each) for name, each in kinds.items()}, "library": train_library}


def one_work(make: Callable[[int, int], dict[str, Callable[[], object]]], name: str, dim: int, size: int) -> Any:
    """One of the works that `make` makes."""
    return make(size, dim)[name]


def compare_rvq(rounds: int) -> dict[str, Any]:
    """Vectors per second in eval and training, each at its best micro-batch, and what the lookup makes of the GEMM."""
    result: dict[str, Any] = {"levels": LEVELS, "codes": CODES, "dimensions": {}}
    for dim in DIMENSIONS:
        works: dict[str, Callable[[], object]] = {"gemm": gemm_work()}
        sizes = {}
        for kind, make in (("eval", lookup_works), ("training", training_works)):
            for name in make(SIZES[0], dim):
                sized = partial(one_work, make, name, dim)
                sizes[f"{kind} {name}"] = best_size(try_sizes(sized, SIZES))
                works[f"{kind} {name}"] = sized(sizes[f"{kind} {name}"])
        seconds = measure(works, rounds)
        gemm = gemm_rate(seconds.pop("gemm"))
        rates = {name: sizes[name] / value for name, value in seconds.items()}
        operations = 2 * LEVELS * CODES * dim
        result["dimensions"][dim] = {
            "micro_batch": sizes,
            "vectors_per_second": {name: round(rate) for name, rate in rates.items()},
            "gemm_share": {
                name: round(rates[f"eval {name}"] * operations / gemm, 3) for name in ("ours", "library", "product")
            },
        }
    return result
