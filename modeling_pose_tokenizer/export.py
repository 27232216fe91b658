"""Models for other runtimes: encoder and decoder as ONNX, TorchScript or `torch.export` files, checked before they are
kept.

Letters: B batch, T frames, N keypoints, D values per keypoint, Q codebooks, S code steps, h frames per step.
"""

import json
import logging
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._sympy.value_ranges import ValueRanges

from .extraction import describe_codes, describe_model
from .feature_extraction_pose_tokenizer import PoseFeatureExtractor
from .graph_pose_tokenizer import PoseTokenizerPaddingCache
from .modeling_pose_tokenizer import PoseTokenizerModel
from .residual_pose_tokenizer import ResidualQuantizer
from .runtime import FORMAT_VERSION, run_step
from .walk_pose_tokenizer import QuantizerState, Tensors

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "torch_export": ".pt2"}
# What an export may differ from the model: share of codes, and decoded values in shoulder widths.
MAX_CODES, MAX_VALUES = 1e-3, 1e-4
METADATA = "metadata.json"  # its name inside a TorchScript or torch.export file
CHECK_SEEDS = (0, 1)
CONVOLUTION = "convolution_"  # what a causal convolution saw, among the inputs of a step

Run = Callable[..., list[torch.Tensor]]


class ExportError(ValueError):
    """A model that cannot be exported so; `str` is one sentence."""


# ---- what is exported -----------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Poses `(B, T, N, D)` and their mask `(B, T)` to codes `(B, Q, S)`."""

    def __init__(self, model: PoseTokenizerModel, num_quantizers: int) -> None:
        super().__init__()
        self.model, self.num_quantizers = model, num_quantizers

    def forward(self, input_values: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        return self.model.encode(input_values, padding_mask, self.num_quantizers, return_dict=False)[0]


class Decoder(nn.Module):
    """Codes `(B, Q, S)` and the mask of the frames `(B, T)` to poses `(B, T, N, D)`."""

    def __init__(self, model: PoseTokenizerModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pose_codes: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        return self.model.decode(pose_codes, padding_mask, return_dict=False)[0]


class StepEncoder(nn.Module):
    """Frames `(B, h, N, D)` of one code step, their mask `(B, h)` and the state to codes `(B, Q, 1)` and the state.

    The state is: steps so far `()`, decoded latents `(L + 1, G, B, d)`, where keypoints were held `(B, N, D - 1)`, and
    what each causal convolution saw `(B, k - 1, V, C)`. A stream begins with zeros.
    """

    def __init__(self, model: PoseTokenizerModel, num_quantizers: int) -> None:
        super().__init__()
        self.model, self.num_quantizers = model, num_quantizers

    def forward(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor,
        step: torch.Tensor,
        latents: torch.Tensor,
        held: torch.Tensor,
        *convolutions: torch.Tensor,
    ) -> Tensors:
        cache = make_cache(step, latents, convolutions)
        cache.held = torch.where(step == 0, self.model.missing_pose, held)
        codes, cache = self.model.encode(input_values, padding_mask, self.num_quantizers, cache, return_dict=False)
        return codes, cache.quantizer.step, cache.quantizer.latents, cache.held, *cache.states


class StepDecoder(nn.Module):
    """Codes `(B, Q, 1)` and the state to poses `(B, h, N, D)` and the state: that of `StepEncoder`, less `held`."""

    def __init__(self, model: PoseTokenizerModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, pose_codes: torch.Tensor, step: torch.Tensor, latents: torch.Tensor, *convolutions: torch.Tensor
    ) -> Tensors:
        cache = make_cache(step, latents, convolutions)
        values, cache = self.model.decode(pose_codes, padding_cache=cache, return_dict=False)
        return values, cache.quantizer.step, cache.quantizer.latents, *cache.states


def make_cache(step: torch.Tensor, latents: torch.Tensor, convolutions: Sequence[torch.Tensor]) -> Any:
    cache = PoseTokenizerPaddingCache(0)
    cache.states, cache.quantizer = list(convolutions), QuantizerState(step, latents)
    return cache


@dataclass
class Part:
    """One file of an export.

    Attributes:
        name: Its name, without the suffix.
        module: What is traced.
        inputs: Name -> example, all batches of 2.
        outputs: Names of the results.
        axes: Name of an input -> its dynamic axes and their names.
    """

    name: str
    module: nn.Module
    inputs: dict[str, torch.Tensor]
    outputs: list[str]
    axes: dict[str, dict[int, str]]


def make_parts(model: PoseTokenizerModel, poses: torch.Tensor, levels: int, streaming: bool) -> list[Part]:
    """The files to write, with examples made of poses `(2, T, N, D)`."""
    mask = torch.ones(poses.shape[:2], dtype=torch.long)
    codes = model.encode(poses, mask, levels).pose_codes
    assert codes is not None
    frames = {"padding_mask": {0: "batch", 1: "frames"}}
    parts = [
        Part(
            "encoder",
            Encoder(model, levels),
            {"input_values": poses, "padding_mask": mask},
            ["pose_codes"],
            {"input_values": {0: "batch", 1: "frames"}, **frames},
        ),
        Part(
            "decoder",
            Decoder(model),
            {"pose_codes": codes, "padding_mask": mask},
            ["pose_values"],
            {"pose_codes": {0: "batch", 2: "steps"}, **frames},
        ),
    ]
    if not streaming:
        return parts
    hop = model.config.hop_length
    step = {"input_values": poses[:, :hop], "padding_mask": mask[:, :hop]}
    encoded = model.encode(step["input_values"], step["padding_mask"], levels, use_streaming=True).padding_cache
    decoded = model.decode(codes[:, :, :1], use_streaming=True, return_dict=True).padding_cache
    assert encoded is not None and decoded is not None and encoded.held is not None
    held = {"held": encoded.held}
    parts.append(step_part("step_encoder", StepEncoder(model, levels), step, "pose_codes", encoded, held))
    given = {"pose_codes": codes[:, :, :1]}
    parts.append(step_part("step_decoder", StepDecoder(model), given, "pose_values", decoded, {}))
    return parts


def step_part(
    name: str,
    module: nn.Module,
    given: dict[str, torch.Tensor],
    result: str,
    cache: PoseTokenizerPaddingCache,
    held: dict[str, torch.Tensor],
) -> Part:
    state = {"step": torch.tensor(cache.quantizer.step), "latents": cache.quantizer.latents, **held}
    state |= {f"{CONVOLUTION}{number}": each for number, each in enumerate(cache.states) if each is not None}
    axes: dict[str, dict[int, str]] = {each: {0: "batch"} for each in (*given, *state)}
    axes |= {"step": {}, "latents": {2: "batch"}}
    return Part(name, module, {**given, **state}, [result, *(f"next_{each}" for each in state)], axes)


# ---- the three formats ----------------------------------------------------------------------------------------------


def write_onnx(part: Part, path: Path, metadata: dict[str, str]) -> None:
    for noisy in ("_registration", "_core"):  # of operators of torchvision, which nobody asked for
        logging.getLogger(f"torch.onnx._internal.exporter.{noisy}").setLevel(logging.ERROR)
    shapes = [each for name, each in part.axes.items() if not name.startswith(CONVOLUTION)]
    convolutions = tuple(each for name, each in part.axes.items() if name.startswith(CONVOLUTION))
    program = torch.onnx.export(
        part.module,
        tuple(part.inputs.values()),
        dynamo=True,
        dynamic_shapes=(*shapes, convolutions) if convolutions else tuple(shapes),  # `*convolutions` are one argument
        input_names=list(part.inputs),
        output_names=part.outputs,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path)


def run_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        feed = dict(zip(names, (each.numpy() for each in inputs), strict=True))
        return [torch.from_numpy(each) for each in session.run(None, feed)]

    return run


def write_torch_export(part: Part, path: Path, metadata: dict[str, str]) -> None:
    dynamic = tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) for axes in part.axes.values())
    program = torch.export.export(part.module, tuple(part.inputs.values()), dynamic_shapes=dynamic)
    # What marks the places without autocast cannot be saved; without decompositions it is only taken out.
    program = program.run_decompositions({})
    # Tracing asks how tensors lie in memory and takes the example's answers for conditions on sizes, such as two code
    # steps at least, which no operator here needs. What stays is that sizes belong together; the check runs the rest.
    for size, found in program.range_constraints.items():
        program.range_constraints[size] = ValueRanges(1, found.upper)
    program._guards_code = [guard for guard in program._guards_code if " == " in guard]
    torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})


def run_torch_export(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda *inputs: [module(*inputs)]


class Step(nn.Module):
    """One turn of the quantizer's loop, to be traced."""

    def __init__(self, quantizer: ResidualQuantizer, some_steps: Callable[..., Tensors]) -> None:
        super().__init__()
        self.quantizer, self.some_steps = quantizer, some_steps

    def forward(self, before: torch.Tensor, number: torch.Tensor, *now: torch.Tensor) -> Tensors:
        return tuple(each[0] for each in self.some_steps(before, number, *(each[None] for each in now)))


class EncoderLoop(nn.Module):
    """The loop over code steps, which tracing cannot follow, to be compiled by `torch.jit.script`."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, latents: torch.Tensor, goals: torch.Tensor, there: torch.Tensor):  # type: ignore[no-untyped-def]
        codes = []
        for number in range(goals.size(0)):
            latents, now, _, _ = self.step(latents, torch.tensor(number), goals[number], there[number])
            codes.append(now)
        return torch.stack(codes)


class DecoderLoop(nn.Module):
    """As `EncoderLoop`."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, latents: torch.Tensor, codes: torch.Tensor, vectors: torch.Tensor):  # type: ignore[no-untyped-def]
        decoded = []
        for number in range(vectors.size(0)):
            (latents,) = self.step(latents, torch.tensor(number), codes[number], vectors[number])
            decoded.append(latents)
        return torch.stack(decoded)


class Scripted(nn.Module):
    """A part whose loop over code steps is a script, so that a trace holds for any length."""

    def __init__(self, part: Part, quantizer: ResidualQuantizer) -> None:
        super().__init__()
        self.part, self.quantizer, self.is_encoder = part.module, quantizer, part.name == "encoder"
        examples: list[Any] = []

        def watch(some_steps: Callable[..., Tensors], state: QuantizerState, *sequences: torch.Tensor) -> Tensors:
            number = torch.tensor(0)
            examples.append((some_steps, (state.latents.clone(), number, *(each[0] for each in sequences))))
            return in_pieces(some_steps, state, *sequences)

        in_pieces = quantizer._in_pieces
        with self.replaced(watch):
            part.module(*part.inputs.values())
        some_steps, example = examples[0]
        step = torch.jit.trace(Step(quantizer, some_steps), example, check_trace=False)
        self.loop: nn.Module = torch.jit.script((EncoderLoop if self.is_encoder else DecoderLoop)(step))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        def run(_: Callable[..., Tensors], state: QuantizerState, *sequences: torch.Tensor) -> Tensors:
            found: torch.Tensor = self.loop(state.latents, *sequences)
            # The encoder's latents, residuals and scales are only learned from.
            return (state.latents[None], found, found, found) if self.is_encoder else (found,)

        with self.replaced(run):
            return self.part(*inputs)

    @contextmanager
    def replaced(self, in_pieces: Callable[..., Any]) -> Iterator[None]:
        """The quantizer with another loop."""
        object.__setattr__(self.quantizer, "_in_pieces", in_pieces)
        try:
            yield
        finally:
            object.__delattr__(self.quantizer, "_in_pieces")


def write_torchscript(part: Part, path: Path, metadata: dict[str, str]) -> None:
    module = part.module
    assert isinstance(module, Encoder | Decoder)
    traced = torch.jit.trace(Scripted(part, module.model.quantizer), tuple(part.inputs.values()), check_trace=False)
    torch.jit.save(traced, path, _extra_files={METADATA: json.dumps(metadata)})


def run_torchscript(path: Path) -> Run:
    module = torch.jit.load(path)
    return lambda *inputs: [module(*inputs)]


WRITERS = {"onnx": write_onnx, "torchscript": write_torchscript, "torch_export": write_torch_export}
RUNNERS = {"onnx": run_onnx, "torchscript": run_torchscript, "torch_export": run_torch_export}


# ---- the check ------------------------------------------------------------------------------------------------------


@dataclass
class Difference:
    """What an export does otherwise than the model.

    Attributes:
        codes: How many codes were compared.
        flipped: How many of them differ.
        values: Largest difference of decoded values, in shoulder widths.
    """

    codes: int = 0
    flipped: int = 0
    values: float = 0.0

    @property
    def flip_rate(self) -> float:
        return self.flipped / max(1, self.codes)

    def add_codes(self, codes: torch.Tensor, expected: torch.Tensor) -> None:
        same_shape = codes.shape == expected.shape
        self.codes += expected.numel()
        self.flipped += int((codes != expected).sum()) if same_shape else expected.numel()

    def add_values(self, values: torch.Tensor, expected: torch.Tensor) -> None:
        distance = (values - expected).abs() if values.shape == expected.shape else torch.tensor(torch.inf)
        distance = distance.nan_to_num(nan=torch.inf, posinf=torch.inf)  # NaN is no small difference
        self.values = max(self.values, float(distance.max()))

    def check(self, name: str) -> None:
        if self.flip_rate > MAX_CODES or not self.values <= MAX_VALUES:
            raise ExportError(
                f"{name}: the export differs from the model in {self.flip_rate:.2%} of {self.codes} codes and by up "
                f"to {self.values:.2g} in decoded values; expected at most {MAX_CODES:.2%} and {MAX_VALUES:.0e}, so "
                "it was not kept."
            )


def sample_poses(model: PoseTokenizerModel, mean: Any, lengths: Sequence[int], seed: int) -> Tensors:
    """Sequences of smooth motion around the mean pose `(N, D - 1)`, or `None`, and their mask.

    Keypoints flicker, one group at a time goes missing for a while, one keypoint is never there; in the padding stands
    what must not matter.
    """
    config, generator = model.config, np.random.default_rng(seed)
    shape = (len(lengths), max(lengths), config.layout.num_keypoints)
    pose = (
        np.nan_to_num(np.array(mean, dtype=np.float32)) if mean is not None else generator.normal(size=(*shape[2:], 1))
    )
    motion = generator.normal(0, 0.02, (*shape, config.keypoint_dim - 1)).cumsum(1)
    motion -= motion * np.linspace(0, 0.9, shape[1])[:, None, None]  # it comes back
    missing = generator.random(shape) < 0.05
    missing[:, :, generator.integers(shape[2])] = True
    for group in config.layout.group_keypoints.values():
        first, last = sorted(generator.integers(0, shape[1] + 1, 2))
        missing[:, first:last, list(group)] = True
    confidence = np.where(missing, 0.0, generator.uniform(config.confidence_threshold, 1.0, shape))
    poses = np.concatenate([pose + motion, confidence[..., None]], -1).astype(np.float32)
    poses[missing] = 0.0
    mask = np.arange(shape[1]) < np.array(lengths)[:, None]
    poses[~mask] = 1e3
    return torch.from_numpy(poses), torch.from_numpy(mask.astype(np.int64))


def check_lengths(model: PoseTokenizerModel) -> list[list[int]]:
    """Batches of sequence lengths: one frame, an unfinished step, more than a key interval, padding."""
    hop = model.config.hop_length
    interval = model.config.key_interval or 32
    return [[1], [3 * hop + 1, 3 * hop + 1], [interval * hop + hop + 1], [9 * hop, 4 * hop + 1, 1]]


@torch.inference_mode()
def compare_whole(model: PoseTokenizerModel, mean: Any, levels: int, encode: Run, decode: Run) -> Difference:
    """Encoder and decoder against the model, over several shapes and seeds."""
    difference = Difference()
    for seed in CHECK_SEEDS:
        for lengths in check_lengths(model):
            poses, mask = sample_poses(model, mean, lengths, seed)
            codes = model.encode(poses, mask, levels).pose_codes
            assert codes is not None
            values = model.decode(codes, mask).pose_values
            assert values is not None
            difference.add_codes(encode(poses, mask)[0], codes)
            difference.add_values(decode(codes, mask)[0], values)
    return difference


@torch.inference_mode()
def compare_steps(model: PoseTokenizerModel, mean: Any, levels: int, encoder: Path, decoder: Path) -> Difference:
    """The steps of a stream, one after the other, against the model's whole sequences."""
    import onnxruntime

    sessions = [
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]) for path in (encoder, decoder)
    ]
    difference, hop = Difference(), model.config.hop_length
    for seed in CHECK_SEEDS:
        for length in (1, ((model.config.key_interval or 32) + 2) * hop - 1):
            poses, mask = sample_poses(model, mean, [length, length], seed)
            codes = model.encode(poses, mask, levels).pose_codes
            assert codes is not None
            values = model.decode(codes).pose_values
            assert values is not None
            padding = codes.shape[2] * hop - length
            frames, real = (
                F.pad(each, (0, 0) * (each.ndim - 2) + (0, padding)).split(hop, 1) for each in (poses, mask)
            )
            states: list[Any] = [None, None]
            streamed = []
            for step in range(codes.shape[2]):
                feed = {"input_values": frames[step].numpy(), "padding_mask": real[step].numpy()}
                found, states[0] = run_step(sessions[0], feed, states[0])
                difference.add_codes(torch.from_numpy(found), codes[:, :, step : step + 1])
                said = {"pose_codes": codes[:, :, step : step + 1].numpy()}
                decoded, states[1] = run_step(sessions[1], said, states[1])
                streamed.append(torch.from_numpy(decoded))
            difference.add_values(torch.cat(streamed, 1), values)
    return difference


# ---- the command ----------------------------------------------------------------------------------------------------


def export_model(
    model: PoseTokenizerModel,
    feature_extractor: PoseFeatureExtractor,
    output_dir: str | Path,
    format: str = "onnx",
    num_quantizers: int | None = None,
    streaming: bool = False,
) -> dict[str, Difference]:
    """Writes encoder and decoder, for any batch and length; each is loaded and compared before any is kept.

    Args:
        model: A model on the CPU.
        feature_extractor: Its feature extractor, which goes into the metadata.
        output_dir: Folder for `encoder` and `decoder`, with the suffix of the format; older ones are replaced.
        format: `onnx`, `torchscript` or `torch_export`.
        num_quantizers: Residual levels; all of them by default.
        streaming: Whether to write also `step_encoder` and `step_decoder`, of one code step; ONNX of a causal model.

    Returns:
        `"whole"`, and where they are written `"steps"` -> what the files do otherwise than the model.

    Raises:
        ExportError: what is asked for cannot be, or the files differ from the model; the folder then is as before.
    """
    levels = check_request(model, format, num_quantizers, streaming)
    output_dir, fresh = Path(output_dir), Path(output_dir) / ".export"
    try:
        shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed
        fresh.mkdir(parents=True)
        differences = _write(model.eval(), feature_extractor, fresh, format, levels, streaming)
        for path in fresh.iterdir():
            os.replace(path, output_dir / path.name)
    except OSError as error:
        raise ExportError(f"{output_dir}: cannot be written ({error.strerror}).") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return differences


def _write(
    model: PoseTokenizerModel,
    feature_extractor: PoseFeatureExtractor,
    folder: Path,
    format: str,
    levels: int,
    streaming: bool,
) -> dict[str, Difference]:
    poses, _ = sample_poses(model, feature_extractor.mean, [5 * model.config.hop_length - 1] * 2, seed=2)
    metadata = describe(model, feature_extractor, levels)
    paths: dict[str, Path] = {}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporters, about their own insides
        for part in make_parts(model, poses, levels, streaming):
            part.module.eval()
            path = paths[part.name] = folder / (part.name + SUFFIXES[format])
            try:
                WRITERS[format](part, path, {"part": part.name, **metadata})
            except OSError:
                raise
            except Exception as error:  # whatever goes wrong inside torch
                reason = " ".join(str(error).split())[:300]
                raise ExportError(f"torch cannot write {part.name} of this model as {format} ({reason}).") from error
        encode, decode = (RUNNERS[format](paths[name]) for name in ("encoder", "decoder"))
        differences = {"whole": compare_whole(model, feature_extractor.mean, levels, encode, decode)}
        if streaming:
            steps = paths["step_encoder"], paths["step_decoder"]
            differences["steps"] = compare_steps(model, feature_extractor.mean, levels, *steps)
    for name, difference in differences.items():
        difference.check(f"{format}, {name}")
    return differences


def check_request(model: PoseTokenizerModel, format: str, num_quantizers: int | None, streaming: bool) -> int:
    """The levels to export.

    Raises:
        ExportError: what is asked for cannot be.
    """
    if format not in SUFFIXES:
        raise ExportError(f"format is {format}; expected one of {', '.join(SUFFIXES)}.")
    if format != "onnx" and streaming:
        raise ExportError(f"--streaming needs --format onnx; {format} holds whole sequences.")
    if streaming and not model.config.use_causal_conv:
        raise ExportError("--streaming needs a causal model; train one with use_causal_conv: true.")
    if model.config.beam_size > 1:
        raise ExportError(
            f"beam_size is {model.config.beam_size}, but an exported graph takes the nearest code at each level; set "
            "beam_size to 1 in the configuration. Codes of either kind are decoded alike."
        )
    if format == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ExportError(f"--format onnx needs {error.name}; pip install 'pose-tokenizer[export]'.") from error
    try:
        return model.quantizer.check_levels(num_quantizers)
    except ValueError as error:
        raise ExportError(str(error)) from error


def describe(model: PoseTokenizerModel, feature_extractor: PoseFeatureExtractor, levels: int) -> dict[str, str]:
    """What a runtime, or a stranger with the file alone, needs to know: JSON but for `format_version`, `export_id`."""
    config, layout = model.config, model.config.layout
    books = model.quantizer.count_codebooks(levels)
    extractor = ["skeleton", "num_keypoints", "keypoint_dim", "scale_pair", "sampling_rate", "confidence_threshold"]
    extractor += ["coordinate_bound", "mean", "padding_value"]
    codes = describe_codes(config)
    values = {
        **codes,
        "codebooks": codes["codebooks"][:books],
        "num_quantizers": levels,
        "frame_rate": config.frame_rate,
        "feature_extractor": {name: getattr(feature_extractor, name) for name in extractor},
        "layout": {
            "keypoint_names": layout.keypoint_names,
            "edges": layout.edges,
            "groups": layout.group_keypoints,
            "flip_pairs": layout.flip_pairs,
        },
        "config": {key: value for key, value in config.to_dict().items() if key != "auto_map"},
        "model": describe_model(model, feature_extractor),
        "torch": torch.__version__,
    }
    properties = {name: json.dumps(value) for name, value in values.items()}
    return {"format_version": FORMAT_VERSION, "export_id": uuid.uuid4().hex, **properties}
