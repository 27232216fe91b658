"""Beam search over the residual levels of a code step.

Letters: B batch, G token groups, L residual levels, M beams, Q codebooks, K codes per codebook, d dimensions of a
latent.
"""

from typing import TYPE_CHECKING

import torch

from .prediction_pose_tokenizer import put_rows, take_rows

if TYPE_CHECKING:
    from .residual_pose_tokenizer import ResidualQuantizer


def pick(paths: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Of paths `(g, M, B, ...)` those that are chosen `(g, m, B)`: `(g, m, B, ...)`."""
    index = chosen.reshape(chosen.shape + (1,) * (paths.dim() - chosen.dim()))
    return paths.gather(1, index.expand(chosen.shape + paths.shape[3:]))


@torch.no_grad()
def search_codes(
    quantizer: "ResidualQuantizer",
    before: torch.Tensor,
    key: bool,
    goals: torch.Tensor,
    there: torch.Tensor,
    num_levels: int,
    beam_size: int,
    vectors: torch.Tensor,
    norms: torch.Tensor,
) -> torch.Tensor:
    """Codes `(q, B)` of one step that leave less of the latents than the nearest code at each level does.

    Levels follow one another as in `ResidualQuantizer`, and what a level expects, and at which scale, depends on the
    codes before it. Of all continuations of the M best paths of a group, the M are kept that leave the least; the last
    level's best wins. The first group is decided before the others, which hang on it.

    Args:
        quantizer: Whose codebooks, prediction and scales.
        before (`torch.Tensor` of shape `(L + 1, G, B, d)`): The step before, entry l decoded up to level l - 1.
        key (`bool`): Whether this is a key step.
        goals (`torch.Tensor` of shape `(G, B, d)`): What the encoder says.
        there (`torch.BoolTensor` of shape `(G, B)`): Where there is something to say.
        num_levels (`int`): Levels to use.
        beam_size (`int`): M.
        vectors (`torch.Tensor` of shape `(Q, K, d)`): Those of all codes.
        norms (`torch.Tensor` of shape `(Q, K)`): Their squared norms.
    """
    predictor, stages = quantizer.predictor, quantizer.stages_of(num_levels)
    known = slice(0, quantizer.count_codebooks(num_levels))
    past = None if key else predictor.from_past(predictor.past_inputs(before, known), known)[:, None]  # (q, 1, B, d)
    scales = quantizer.gain.start(before[1], key)
    codes = torch.zeros(known.stop, goals.shape[1], dtype=torch.long, device=goals.device)
    num_paths = min(beam_size, quantizer.num_codes)
    trunk: list[torch.Tensor] = []  # the first group's latents (B, d), entry l up to level l - 1
    for members in filter(None, ([0], list(range(1, quantizer.num_groups)))):
        latents = [torch.zeros_like(goals[members])[:, None]]  # (g, M, B, d), entry l up to level l - 1
        scale = scales[members][:, None]  # (g, M, B)
        left = torch.zeros_like(scale)
        said: list[torch.Tensor] = []  # codes (g, M, B) of each level
        own_stages = [stage for stage in stages if stage[1][0] in members]
        for level, groups, books in own_stages:
            rows = [members.index(group) for group in groups]
            inputs, size = take_rows(latents[level], rows), take_rows(scale, rows)
            if trunk:
                body = torch.cat([trunk[level + 1], trunk[level]], -1).expand(*inputs.shape[:2], -1, -1)
                inputs = torch.cat([inputs, body], -1)
            expected = predictor.from_present(inputs.flatten(1, 2), books, key).unflatten(1, size.shape[1:])
            expected = expected if past is None else expected + past[books]
            heard = there[groups][:, None]
            residual = torch.where(heard[..., None], goals[groups][:, None] - expected, 0.0)
            product = torch.bmm(residual.flatten(1, 2), vectors[books].mT).unflatten(1, size.shape[1:])
            # |r - s v|^2. Where nothing is to say, what each level says nevertheless adds up.
            missed = residual.square().sum(-1) + torch.where(heard, 0.0, take_rows(left, rows))
            missed = missed[..., None] + size[..., None] * (size[..., None] * norms[books, None, None] - 2 * product)
            best, place = missed.transpose(1, 2).flatten(2).topk(num_paths, largest=False)  # of (g, B, M K)
            path, code = (place.mT // quantizer.num_codes), (place.mT % quantizer.num_codes)
            size = pick(size, path)
            vector = quantizer.read(code.flatten(1), books).unflatten(1, code.shape[1:])
            reached = pick(expected, path) + size[..., None] * vector
            latents, said = (
                [put_rows(each, rows, pick(take_rows(each, rows), path)) for each in kept] for kept in (latents, said)
            )
            latents.append(put_rows(latents[level], rows, reached))
            said.append(put_rows(said[-1] if said else code, rows, code))
            follow = quantizer.gain.follow(code.flatten(1), books).unflatten(1, code.shape[1:])
            scale, left = put_rows(scale, rows, size * follow), put_rows(left, rows, best.mT)
        for level, groups, books in own_stages:
            codes[books] = take_rows(said[level], [members.index(group) for group in groups])[:, 0]
        trunk = [each[0, 0] for each in latents]
        trunk += trunk[-1:] * (num_levels + 1 - len(trunk))
    return codes
