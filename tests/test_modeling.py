"""The model's pieces against naive loops, its configuration, and its start from data."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modeling_pose_tokenizer import PoseTokenizerConfig, PoseTokenizerLoss, PoseTokenizerModel
from modeling_pose_tokenizer.graph_pose_tokenizer import (
    CodecGraph,
    PoseTokenizerGraphConv,
    PoseTokenizerHead,
    PoseTokenizerPooling,
    PoseTokenizerUnpooling,
)
from modeling_pose_tokenizer.loss_pose_tokenizer import SMOOTH_L1_BETA, LossInputs
from models import VARIANTS, random_poses, small_config, trained_model

variants = pytest.mark.parametrize("variant", VARIANTS)
sizes = st.lists(st.integers(1, 5), min_size=1, max_size=5)


def perturb(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@given(sizes=sizes, features=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=st.integers(0, 2**16))
def test_pooling_and_unpooling_equal_loops(sizes: list[int], features: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    fan_in, fan_out = features
    pooling = perturb(PoseTokenizerPooling(sizes, fan_in, fan_out))
    unpooling = perturb(PoseTokenizerUnpooling(sizes, fan_in, fan_out))
    fine, coarse = torch.randn(2, 3, sum(sizes), fan_in), torch.randn(2, 3, len(sizes), fan_in)
    pooled = pooling.bias.expand(2, 3, -1, -1).clone()
    written = unpooling.bias.expand(2, 3, -1, -1).clone()
    node = 0
    for part, size in enumerate(sizes):
        for _ in range(size):
            read = pooling.weight[:, node * fan_in : (node + 1) * fan_in]
            write = unpooling.weight[node * fan_out : (node + 1) * fan_out]
            pooled[:, :, part] += fine[:, :, node] @ read.T
            written[:, :, node] += coarse[:, :, part] @ write.T
            node += 1
    torch.testing.assert_close(pooling(fine), pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unpooling(coarse), written, rtol=1e-4, atol=1e-5)


def test_a_head_reads_its_own_keypoint_alone() -> None:
    torch.manual_seed(0)
    head = perturb(PoseTokenizerHead(5, 3, 4))
    hidden = torch.randn(2, 6, 5, 3)
    for keypoint in range(5):
        expected = hidden[:, :, keypoint] @ head.weight[keypoint] + head.bias[keypoint]
        torch.testing.assert_close(head(hidden)[:, :, keypoint], expected)


@pytest.mark.parametrize("features", [(2, 6), (6, 2), (4, 4)])
def test_graph_convolution_equals_the_formula(features: tuple[int, int]) -> None:
    torch.manual_seed(0)
    edges = [(0, 1), (1, 2), (1, 3)]
    conv = perturb(PoseTokenizerGraphConv(4, edges, *features))
    hidden = torch.randn(1, 2, 4, features[0])
    adjacency = conv.adjacency * conv.importance
    if conv.gather_first:
        weights = conv.projection.weight.split(features[0], 1)
        bias = [conv.projection.bias / 3] * 3  # once per node, whatever its neighbours
        gathered_bias = sum(bias)
    else:
        weights = conv.projection.weight.split(features[1])
        bias = conv.projection.bias.split(features[1])
        gathered_bias = None
    for node in range(4):
        expected = torch.zeros(1, 2, features[1])
        for partition in range(3):
            for other in range(4):
                message = hidden[:, :, other] @ weights[partition].T
                if gathered_bias is None:
                    message = message + bias[partition]
                expected += adjacency[partition, node, other] * message
        if gathered_bias is not None:
            expected += gathered_bias
        torch.testing.assert_close(conv(hidden)[:, :, node], expected, rtol=1e-4, atol=1e-5)


@variants
def test_the_network_sees_keypoints_part_by_part(variant: str) -> None:
    config = small_config(variant)
    graph, layout = CodecGraph.from_config(config), config.layout
    assert sorted(graph.order) == list(range(config.num_keypoints))
    names = [layout.part_of_keypoint[keypoint] for keypoint in graph.order]
    assert names == sorted(names)
    assert sum(graph.group_keypoints) == sum(graph.part_sizes) == config.num_keypoints
    assert sum(graph.group_nodes) == layout.num_parts
    assert {(graph.order[a], graph.order[b]) for a, b in graph.edges} == set(layout.edges)


@variants
def test_a_smooth_linear_model_is_nearly_exact_from_the_start(variant: str) -> None:
    """PCA and k-means alone reconstruct motion of few dimensions: nothing is left to the network."""
    torch.manual_seed(0)
    config = small_config(variant)
    shape = (config.num_keypoints, config.keypoint_dim)
    basis, mean = torch.randn(2, *shape), torch.randn(shape)
    amplitudes = torch.randn(16, 1, 2)  # two numbers say everything of a sequence
    poses = mean + torch.einsum("btk,knd->btnd", amplitudes.expand(16, 12, 2), basis)
    poses[..., -1] = 1.0
    model = PoseTokenizerModel(config)
    model.initialize_from_data([{"input_values": poses, "padding_mask": torch.ones(16, 12)}])
    with torch.inference_mode():
        error = (model.eval()(poses).pose_values - poses)[..., :-1].norm(dim=-1).mean()
    assert error < 0.1 * (poses - poses.mean((0, 1)))[..., :-1].norm(dim=-1).mean()


def test_training_lowers_the_loss_and_starts_the_codebooks_itself() -> None:
    torch.manual_seed(0)
    config = small_config("parts", quantizer_dropout=0.0)
    model = PoseTokenizerModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    poses = random_poses(config, 8, 16, seed=0)
    losses = []
    assert not model.quantizer.initialized
    for _ in range(40):
        output = model(poses)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert model.quantizer.initialized
    assert losses[-1] < 0.75 * losses[0]


@variants
def test_every_parameter_learns(variant: str) -> None:
    torch.manual_seed(0)
    model = PoseTokenizerModel(small_config(variant, quantizer_dropout=0.0)).train()
    poses = random_poses(model.config, 4, 24, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):  # what starts at zero passes its first gradient on only then
        optimizer.zero_grad()
        model(poses).loss.backward()
        optimizer.step()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    fitted = {name for name, _ in model.named_parameters()} - set(trained)
    assert fitted == {"missing_pose", "encoder.linear_path.weight", "encoder.linear_path.bias"}


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = PoseTokenizerModel(small_config("joint")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        output = model(random_poses(model.config, 4, 13, seed=0))
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        runs.append({"loss": output.loss.detach(), **gradients, **dict(model.named_buffers())})
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name], msg=name)


class Exported(torch.nn.Module):
    """One method of a model, as `torch.export` takes it."""

    def __init__(self, model: PoseTokenizerModel, method: str):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return getattr(self.model, self.method)(*inputs)[0]


def test_encoder_and_decoder_export_for_any_batch_and_length() -> None:
    model, dynamic = trained_model("parts"), torch.export.Dim.DYNAMIC
    poses, others = random_poses(model.config, 5, 50, seed=0), random_poses(model.config, 3, 37, seed=1)
    frames, codes = torch.ones(5, 50, dtype=torch.long), model.encode(others).pose_codes
    with torch.no_grad():
        shapes = (({0: dynamic, 1: dynamic}, {0: dynamic, 1: dynamic}),)
        encoder = torch.export.export(Exported(model, "encode"), (poses, frames), dynamic_shapes=shapes)
        assert torch.equal(encoder.module()(others, torch.ones(3, 37, dtype=torch.long)), codes)
        example = (model.encode(poses).pose_codes,)
        decoder = torch.export.export(
            Exported(model, "decode"), example, dynamic_shapes=(({0: dynamic, 2: dynamic},),)
        )
        torch.testing.assert_close(decoder.module()(codes), model.decode(codes).pose_values)


def test_bfloat16_autocast_keeps_codes_in_fp32() -> None:
    model = trained_model("parts")
    poses = random_poses(model.config, 2, 20, seed=0)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        codes = model.encode(poses).pose_codes
        values = model.decode(codes).pose_values
    with torch.inference_mode():
        exact = model.encode(poses).pose_codes
    assert (codes != exact).float().mean() < 0.2
    assert values.isfinite().all()
    assert model.quantizer.codebook.dtype == torch.float32


# --- the loss -------------------------------------------------------------------------------------------------------


def loss_inputs(config: PoseTokenizerConfig, seed: int) -> LossInputs:
    target = random_poses(config, 2, 5, seed)
    prediction = target + 0.05 * torch.randn(target.shape, generator=torch.Generator().manual_seed(seed))
    prediction[..., -1] = prediction[..., -1].clamp(0.01, 0.99)
    frames = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 1, 1]]).bool()
    valid = (target[..., -1] >= config.confidence_threshold) & frames[..., None]
    target = torch.where(valid[..., None], target, float("nan"))  # what is not there must not count
    return LossInputs(prediction, target, valid, frames, torch.tensor(0.5))


def smooth_l1(value: float) -> float:
    value = abs(value)
    return value**2 / (2 * SMOOTH_L1_BETA) if value < SMOOTH_L1_BETA else value - SMOOTH_L1_BETA / 2


@given(seed=st.integers(0, 2**16))
def test_loss_terms_equal_loops(seed: int) -> None:
    config = small_config("custom")
    loss = PoseTokenizerLoss(config)
    inputs = loss_inputs(config, seed)
    hands = config.layout.group_keypoints["left_hand"]
    weight = [config.hand_weight if keypoint in hands else 1.0 for keypoint in range(config.num_keypoints)]
    sums = {
        name: [0.0, 0.0] for name in ("position", "velocity", "acceleration", "bone", "bone_direction", "confidence")
    }

    def add(name: str, value: float, amount: float) -> None:
        sums[name][0] += value * amount
        sums[name][1] += amount

    error = (inputs.prediction - inputs.target)[..., :-1]
    for b in range(2):
        for t in range(5):
            for n in range(config.num_keypoints):
                if inputs.frames[b, t]:
                    truth = float(inputs.target[b, t, n, -1].nan_to_num(0.0))
                    p = inputs.prediction[b, t, n, -1].double()
                    add("confidence", float(-(truth * p.log() + (1 - truth) * (1 - p).log())), 1)
                for axis in range(config.keypoint_dim - 1):
                    stencils = {"position": [1], "velocity": [-1, 1], "acceleration": [1, -2, 1]}
                    for name, stencil in stencils.items():
                        if t + len(stencil) <= 5 and all(inputs.valid[b, t + o, n] for o in range(len(stencil))):
                            value = sum(c * float(error[b, t + o, n, axis]) for o, c in enumerate(stencil))
                            add(name, smooth_l1(value), weight[n])
            for parent, child in config.layout.edges:
                if inputs.valid[b, t, parent] and inputs.valid[b, t, child]:
                    bones = [
                        poses[b, t, child, :-1] - poses[b, t, parent, :-1]
                        for poses in (inputs.prediction, inputs.target)
                    ]
                    for difference in (bones[0] - bones[1]).tolist():
                        add("bone", smooth_l1(difference), weight[child])
                    cosine = float(bones[0] @ bones[1] / (bones[0].norm() * bones[1].norm()))
                    add("bone_direction", 1 - cosine, 1.0)
    losses = loss(inputs)
    for name, (total, amount) in sums.items():
        assert float(losses[name]) == pytest.approx(total / max(amount, 1), rel=2e-3, abs=1e-5), name
    expected = sum(loss.weights[name] * float(value) for name, value in losses.items())
    assert float(loss.total(losses)) == pytest.approx(expected, rel=1e-5)


def test_a_loss_without_valid_entries_is_zero_and_finite() -> None:
    config = small_config("custom")
    inputs = loss_inputs(config, 0)
    inputs.valid[:], inputs.frames[:] = False, False
    prediction = inputs.prediction.requires_grad_()
    loss = PoseTokenizerLoss(config)
    total = loss.total(loss(inputs))
    total.backward()
    assert total.item() == pytest.approx(config.quantization_weight * 0.5)
    assert prediction.grad is not None and prediction.grad.isfinite().all()


def test_a_user_adds_a_term_by_adding_a_method() -> None:
    class WithSize(PoseTokenizerLoss):
        def __init__(self, config: PoseTokenizerConfig):
            super().__init__(config)
            self.weights["size"] = 2.0

        def loss_size(self, inputs: LossInputs) -> torch.Tensor:
            return inputs.prediction.abs().mean()

    torch.manual_seed(0)
    model = PoseTokenizerModel(small_config("parts")).train()
    model.loss_function = WithSize(model.config)
    output = model(random_poses(model.config, 2, 8, seed=0))
    assert "size" in output.losses
    with pytest.raises(TypeError, match="loss_function"):
        model.loss_function = lambda inputs: None


# --- the configuration ----------------------------------------------------------------------------------------------


def test_rates_follow_from_the_configuration() -> None:
    config = PoseTokenizerConfig(num_quantizers=[3, 1, 2, 2], sampling_rate=25, downsampling_ratio=4)
    assert config.num_codebooks == 8
    assert config.frame_rate == 6.25
    assert config.token_rate == 50
    assert config.bits_per_frame == 20
    assert config.bitrate == 500
    assert config.codebook_index[:5] == (
        ("body", 0),
        ("face", 0),
        ("left_hand", 0),
        ("right_hand", 0),
        ("body", 1),
    )
    assert PoseTokenizerConfig(hidden_dim=48).hidden_size == 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_keypoints": 50}, "num_keypoints is 50, but the skeleton coco_wholebody_133 has 133"),
        ({"keypoint_dim": 2}, "keypoint_dim is 2; expected 3"),
        ({"token_groups": "limbs"}, "token_groups is 'limbs'; expected one of parts, whole"),
        ({"quantizer": "vq"}, "quantizer is 'vq'; expected one of rvq, fsq"),
        ({"kernel_size": 4}, "kernel_size is 4; expected an odd"),
        ({"hidden_size": 0}, "hidden_size is 0; expected at least 1"),
        ({"beam_size": 0}, "beam_size is 0; expected at least 1"),
        ({"num_quantizers": [1, 2]}, "num_quantizers has 2 entries; expected one per token group .body, face"),
        ({"num_quantizers": [1, 2, 0, 1]}, "expected at least one level"),
        ({"quantizer": "fsq", "codebook_size": 1000}, "codebook_size is 1000; quantizer 'fsq' knows 64"),
        ({"ema_decay": 1.5}, "ema_decay is 1.5; expected a number from 0 to 1"),
        ({"sampling_rate": -1}, "sampling_rate is -1"),
        ({"skeleton": None}, "skeleton is null and no custom skeleton is given"),
        ({"edges": [[0, 1]]}, "a custom skeleton is given too"),
        ({"skeleton": "coco_wholebody_13"}, "coco_wholebody_133"),
        ({"hidden_size": "many"}, "hidden_size"),
    ],
)
def test_impossible_configurations_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        PoseTokenizerConfig(**changes)


@variants
def test_a_configuration_survives_json(variant: str, tmp_path: Any) -> None:
    config = small_config(variant)
    config.save_pretrained(tmp_path)
    loaded = PoseTokenizerConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.layout == config.layout
    assert loaded.codebook_index == config.codebook_index


def test_wrong_shapes_are_refused_by_name() -> None:
    model = trained_model("parts")
    with pytest.raises(ValueError, match=r"input_values has shape \(1, 4, 17, 3\); expected \(batch, frames, 69, 3\)"):
        model.encode(torch.zeros(1, 4, 17, 3))
    with pytest.raises(ValueError, match="at least one frame"):
        model.encode(torch.zeros(1, 0, 69, 3))
    with pytest.raises(ValueError, match=r"padding_mask has shape \(1, 3\); expected \(1, 4\)"):
        model.encode(torch.zeros(1, 4, 69, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="expected the mask that was given to encode"):
        model.decode(torch.zeros(1, 8, 2, dtype=torch.long), torch.ones(1, 9))
    with pytest.raises(ValueError, match="no real frame"):
        model.initialize_from_data([{"input_values": torch.zeros(1, 4, 69, 3), "padding_mask": torch.zeros(1, 4)}])


@variants
@given(frames=st.integers(1, 9), share=st.floats(0.0, 1.0), seed=st.integers(0, 2**16))
def test_missing_keypoints_are_held_as_a_loop_over_frames_does(
    variant: str, frames: int, share: float, seed: int
) -> None:
    """Where it was seen last, relative to its anchor; before that where it comes first, or at the learned place."""
    model = trained_model(variant)
    order, anchors = model.keypoint_order.tolist(), model.anchors.tolist()
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, frames, len(order), model.config.keypoint_dim, generator=generator)
    observed = torch.rand(1, frames, len(order), generator=generator) < share
    found = model._complete(values, observed)[0]
    points, there = values[0][:, order, :-1], observed[0][:, order]

    def hold(row: torch.Tensor, place: int) -> torch.Tensor:
        seen = [frame for frame in range(frames) if there[frame, place]]
        start = row[seen[0]] if seen and not model.config.use_causal_conv else model.missing_pose[place]
        last = [max((frame for frame in seen if frame <= now), default=None) for now in range(frames)]
        return torch.stack([start if frame is None else row[frame] for frame in last])

    for place, anchor in enumerate(anchors):
        origin = torch.zeros(frames, points.shape[2]) if anchor < 0 else hold(points[:, anchor], anchor)
        expected = origin + hold(points[:, place] - origin, place)
        torch.testing.assert_close(found[:, place, :-1], expected)
        assert torch.equal(found[:, place, -1], values[0][:, order[place], -1])


@given(
    st.lists(st.sampled_from([0.0, -1.5, 3e38, -3e38, 1e-45, float("nan"), float("inf"), -float("inf")]), min_size=1)
)
def test_a_keypoint_is_there_where_all_its_values_are_finite(numbers: list[float]) -> None:
    model = trained_model("whole")
    keypoints, dim = len(model.keypoint_order), model.config.keypoint_dim
    poses = torch.ones(1, 3, keypoints * dim)
    poses[..., : len(numbers)] = torch.tensor(numbers[: keypoints * dim])
    poses = poses.unflatten(-1, (keypoints, dim))
    values, observed = model._clean(poses, None)
    finite = poses.isfinite().all(-1)
    assert torch.equal(observed, finite & (poses[..., -1] >= model.config.confidence_threshold))
    assert torch.equal(values, torch.where(finite[..., None], poses, 0.0))
