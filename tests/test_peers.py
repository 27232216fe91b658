"""The learned peers of the benchmark: what goes in comes back, whoever made it, and it learns."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_pose_tokenizer.skeleton_pose_tokenizer import Skeleton, build_skeleton, get_skeleton

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # as python does for a script there

from peer_base import Peer, ResidualCodebooks
from peers import ConvRVQ, FrameTransformerFSQ, JointSTGCN, SeparateConvVQ
from speed_rvq import check_identical, library_quantizer, residual_codes

PARTS = {"body": [0, 1, 2], "left_hand": [3, 5], "right_hand": [4, 6]}
NAMES = ("neck", "left_arm", "right_arm", "left_palm", "right_palm", "left_tip", "right_tip")
LAYOUT = build_skeleton(NAMES, [(0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)], PARTS)
SMALL: dict[str, Callable[..., Peer]] = {
    "ConvRVQ": lambda layout, dim: ConvRVQ(layout, dim, width=8, levels=3, codebook_size=16, dropout=0.0),
    "SeparateConvVQ": lambda layout, dim: SeparateConvVQ(
        layout, dim, width=8, part_levels=(2, 1, 1), codebook_size=16
    ),
    "FrameTransformerFSQ": lambda layout, dim: FrameTransformerFSQ(
        layout, dim, width=16, heads=2, layers=1, dropout=0.0, input_dropout=0.0
    ),
    "JointSTGCN": lambda layout, dim: JointSTGCN(
        layout, dim, width=8, blocks=2, levels=3, codebook_size=16, decoder_width=16
    ),
}
every_peer = pytest.mark.parametrize("name", SMALL)


def some_poses(batch: int, frames: int, layout: Skeleton = LAYOUT, dim: int = 3) -> torch.Tensor:
    """Smooth random poses far from the origin, an eighth of the keypoints missing."""
    poses = torch.randn(batch, frames, layout.num_keypoints, dim).cumsum(1) * 0.1 + 5.0
    poses[..., -1] = (torch.rand(poses.shape[:-1]) > 0.125) * 0.9
    return torch.where(poses[..., -1:] > 0, poses, 0.0)


def make_peer(name: str, layout: Skeleton = LAYOUT, dim: int = 3) -> Peer:
    """A small peer whose codebooks know the latents of some poses."""
    torch.manual_seed(0)
    peer = SMALL[name](layout, dim)
    poses = some_poses(16, 32, layout, dim)
    peer.fit_statistics(list(poses.numpy()))
    peer.initialize([{"input_values": poses, "padding_mask": torch.ones(16, 32)}])
    return peer


@every_peer
@pytest.mark.parametrize("layout, dim", [(LAYOUT, 3), (LAYOUT, 4), (get_skeleton("coco_17"), 3)])
def test_poses_come_back_as_long_as_they_were(name: str, layout: Skeleton, dim: int) -> None:
    peer = make_peer(name, layout, dim).eval()
    for frames in (1, 3, 4, 13):
        poses = some_poses(2, frames, layout, dim)
        steps = -(-frames // peer.hop_length)
        with torch.no_grad():
            output = peer(poses)
            codes = peer.encode(poses)
            decoded = peer.decode(codes)
        assert output.pose_values.shape == poses.shape
        assert codes.shape == (2, len(peer.codebook_sizes), steps)
        assert codes.dtype == torch.long and (codes >= 0).all()
        assert (codes < torch.tensor(peer.codebook_sizes)[:, None]).all()
        assert torch.equal(codes, output.pose_codes)
        assert decoded.shape == (2, steps * peer.hop_length, *poses.shape[2:])
        torch.testing.assert_close(decoded[:, :frames], output.pose_values)
        assert ((decoded[..., -1] >= 0) & (decoded[..., -1] <= 1)).all()


@every_peer
def test_padding_repeats_the_last_frame(name: str) -> None:
    peer = make_peer(name).eval()
    poses = some_poses(1, 12)
    still = torch.cat([poses[:, :6], poses[:, 5:6].expand(-1, 6, -1, -1)], 1)
    mask = (torch.arange(12) < 6)[None].long()
    with torch.no_grad():
        assert torch.equal(peer.encode(poses, mask), peer.encode(still))


@every_peer
def test_missing_keypoints_carry_nothing(name: str) -> None:
    peer = make_peer(name).eval()
    poses = some_poses(2, 8)
    poses[:, :, 3, -1] = 0.0
    other = poses.clone()
    other[:, :, 3, :-1] = torch.nan
    with torch.no_grad():
        torch.testing.assert_close(peer(poses).pose_values, peer(other).pose_values)
        assert peer(torch.full_like(poses, torch.nan)).pose_values.isfinite().all()


@pytest.mark.parametrize("name", ["ConvRVQ", "JointSTGCN"])
def test_a_prefix_of_the_levels_decodes(name: str) -> None:
    peer = make_peer(name).eval()
    poses = some_poses(2, 12)
    with torch.no_grad():
        codes = peer.encode(poses)
        for levels in range(1, peer.levels + 1):
            prefix = peer.encode(poses, num_quantizers=levels)
            assert torch.equal(prefix, codes[:, :levels])
            assert peer.decode(prefix).shape == poses.shape
        first = peer.quantizers[0].read(codes[:, :1])
    assert peer.levels == 3
    assert torch.equal(first, peer.quantizers[0].rvq.codebooks[0][codes[:, 0]])


def test_parts_do_not_see_each_other() -> None:
    peer = make_peer("SeparateConvVQ").eval()
    assert isinstance(peer, SeparateConvVQ) and peer.parts == [[0, 1, 2], [3, 5], [4, 6]] and peer.levels == 1
    poses = some_poses(1, 16)
    moved = poses.clone()
    moved[:, :, [4, 6], 0] += 1.0
    with torch.no_grad():
        codes, others = peer.encode(poses), peer.encode(moved)
        before, after = peer(poses).pose_values, peer(moved).pose_values
    assert torch.equal(codes[:, :3], others[:, :3]) and not torch.equal(codes[:, 3], others[:, 3])
    assert torch.equal(before[:, :, [0, 1, 2, 3, 5]], after[:, :, [0, 1, 2, 3, 5]])


@every_peer
def test_statistics_are_those_of_observed_values(name: str) -> None:
    peer = SMALL[name](LAYOUT, 3)
    clips = [clip.numpy() for clip in some_poses(3, 20)]
    clips[0][:, 6] = 0.0
    clips[1][:, 6] = 0.0
    clips[2][:, 6] = 0.0  # never seen
    peer.fit_statistics(clips)
    frames = np.concatenate(clips)
    values = frames[frames[:, 0, -1] > 0.3, 0, :-1]
    np.testing.assert_allclose(peer.mean[0], values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(peer.deviation[0], values.std(0), rtol=1e-3)
    assert (peer.mean[6] == 0).all() and (peer.deviation[6] == 1).all()


@every_peer
def test_training_lowers_the_loss_and_reaches_the_encoder(name: str) -> None:
    peer = make_peer(name).train()
    poses = some_poses(8, 16)
    seen = poses[..., -1:] > 0
    optimizer = torch.optim.Adam(peer.parameters(), 1e-2)
    losses = []
    for step in range(30):
        output = peer(poses)
        loss = (output.pose_values - poses)[seen.expand_as(poses)].square().mean() + 0.02 * output.commitment_loss
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            without = [key for key, parameter in peer.named_parameters() if parameter.grad is None]
            assert not without
            reached = [p.grad.abs().sum() > 0 for key, p in peer.named_parameters() if "encoder" in key]
            assert reached and all(reached)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_codebooks_drop_levels_in_training_alone() -> None:
    torch.manual_seed(0)
    books = ResidualCodebooks(4, levels=4, codebook_size=16, dropout=0.5)
    latents = torch.randn(8, 16, 4)
    books.fit(latents)
    assert books.training
    used = {int((books(latents)[1][0, :, 0] >= 0).sum()) for _ in range(50)}
    assert used == {1, 2, 3, 4}
    books.eval()
    quantized, codes, _ = books(latents)
    torch.testing.assert_close(books.read(codes), quantized)
    assert (quantized - latents).square().mean() < 0.1 * latents.square().mean()


def test_codebooks_stay_in_use_where_a_step_brings_few_vectors() -> None:
    """256 vectors a step for 1,024 codes: the thresholds that suit large batches would keep none of them."""
    torch.manual_seed(0)
    books = ResidualCodebooks(8, levels=1, codebook_size=1024)
    books.fit(torch.randn(16, 256, 8))
    before = books.rvq.codebooks[0].clone()
    for _ in range(20):
        books(torch.randn(1, 256, 8))
    moved = (books.rvq.codebooks[0] - before).norm(dim=-1) > 1.0
    assert moved.float().mean() < 0.1


def test_our_lookup_finds_the_library_s_codes() -> None:
    torch.manual_seed(0)
    codebooks = torch.randn(3, 64, 8)
    vectors = torch.randn(500, 8)
    with torch.no_grad():
        theirs = library_quantizer(codebooks).eval()(vectors[None])[1][0]
    ours = residual_codes(vectors, codebooks)
    assert check_identical(ours, theirs, vectors, codebooks) == 0
    wrong = theirs.clone()
    wrong[7, 1] = (wrong[7, 1] + 1) % 64
    with pytest.raises(AssertionError, match="codes"):
        check_identical(ours, wrong, vectors, codebooks)
    twice = codebooks.clone()
    twice[0, 1] = twice[0, 0]
    tied = torch.zeros(1, 3, dtype=torch.long)
    assert check_identical(tied, tied + torch.tensor([1, 0, 0]), twice[0, :1], twice) == 1
