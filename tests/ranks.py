"""What every rank of tests/test_ranks.py runs, started by torchrun; rank 0 prints the results as JSON."""

import gc
import hashlib
import json
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from modeling_pose_tokenizer import PoseTokenizerConfig, PoseTokenizerModel
from models import random_poses, small_config

STEPS, FRAMES = 20, 24
# Name -> variant of the codec, wrapper, micro-batches of an optimizer's step, autocast to bf16.
CASES: dict[str, tuple[str, str, int, bool]] = {
    "rvq": ("parts", "ddp", 1, False),
    "rvq, accumulated in bf16": ("parts", "ddp", 2, True),
    "rvq, sharded": ("parts", "fsdp", 1, False),
    "fsq": ("fsq", "ddp", 1, False),
}


def wrap(kind: str, model: PoseTokenizerModel) -> Any:
    """As accelerate wraps it, by the configurations in training/accelerate."""
    if kind == "ddp" and dist.is_initialized():
        return DistributedDataParallel(model, broadcast_buffers=False)
    if kind == "fsdp":
        for block in model.modules():
            if type(block).__name__ == "PoseTokenizerBlock":
                fully_shard(block)
        fully_shard(model)
    return model


def train(
    kind: str,
    config: PoseTokenizerConfig,
    first: torch.Tensor,
    poses: torch.Tensor,
    micro: int = 1,
    bf16: bool = False,
) -> tuple[list[float], PoseTokenizerModel]:
    """Losses, means over ranks, of a step on each of `poses` (steps, B, T, N, D), and the model after the last."""
    torch.manual_seed(0)
    model = PoseTokenizerModel(config)
    model.initialize_from_data(
        [{"input_values": first, "padding_mask": torch.ones(first.shape[:2], dtype=torch.long)}]
    )
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # ranks drop other levels, draw other spares
    wrapped = wrap(kind, model.train())
    optimizer, losses = torch.optim.AdamW(wrapped.parameters(), 1e-3), []
    for step, batch in enumerate(poses):
        steps = (step + 1) % micro == 0
        with nullcontext() if steps else wrapped.no_sync():
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = wrapped(batch).loss
            (loss / micro).backward()
        if steps:
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    return losses, model


def digest(model: PoseTokenizerModel) -> str:
    """Hash of weights, codebooks and statistics; of sharded ones all shards."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found.update(name.encode() + whole.detach().numpy().tobytes())
    return found.hexdigest()


def equal_hashes(case: str) -> dict[str, Any]:
    """Hashes of every rank after steps on different data, and whether codes were replaced."""
    variant, kind, micro, bf16 = CASES[case]
    rank = dist.get_rank()
    changes: dict[str, Any] = {} if variant == "fsq" else {"threshold_usage_ratio": 0.9}
    config = small_config(variant, **changes)
    poses = torch.stack([random_poses(config, 2, FRAMES, seed=100 * rank + step) for step in range(STEPS)])
    _, model = train(kind, config, poses[0], poses, micro, bf16)
    hashes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, digest(model))
    result: dict[str, Any] = {"hashes": hashes}
    if changes:
        _, other = train(kind, small_config(variant, threshold_usage_ratio=0.0), poses[0], poses, micro, bf16)
        result["replaced"] = not torch.equal(model.quantizer.codebook, other.quantizer.codebook)
    return result


def whole_batches() -> tuple[PoseTokenizerConfig, torch.Tensor]:
    """Four batches again and again; every keypoint seen, as losses are means over what is; nothing random."""
    config = small_config("parts", quantizer_dropout=0.0, threshold_usage_ratio=0.0)
    poses = torch.stack([random_poses(config, 8, FRAMES, seed=step) for step in range(4)]).repeat(
        STEPS // 4, 1, 1, 1, 1
    )
    poses[..., -1] = 1.0
    return config, poses


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results: dict[str, Any] = {case: equal_hashes(case) for case in CASES}
    config, poses = whole_batches()
    mine = poses[:, rank::ranks]
    curves = {kind: train(kind, config, poses[0], mine)[0] for kind in ("ddp", "fsdp")}
    dist.barrier()  # nobody goes while another still talks to it
    gc.collect()  # the models, whose reducers must not be the last to hold the group
    dist.destroy_process_group()
    if rank == 0:
        curves["whole"] = train("ddp", config, poses[0], poses)[0]
        print(json.dumps(results | {"curves": curves}))


if __name__ == "__main__":
    main()
