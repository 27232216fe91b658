"""An exported ONNX model at work, with numpy and onnxruntime alone: neither torch nor transformers is imported.

Letters: B batch, T frames, N keypoints, D values per keypoint (confidence last), Q codebooks, S code steps.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .normalization_pose_tokenizer import PoseNormalizer

# How an ONNX file of this package says what it holds; another number is another set of inputs or metadata.
FORMAT_VERSION = "1"
FILES = {name: f"{name}.onnx" for name in ("encoder", "decoder", "step_encoder", "step_decoder")}


class RuntimeFolderError(ValueError):
    """A folder that cannot be run; `str` is one sentence with the file, what is wrong and what is expected."""


class PoseRuntime(PoseNormalizer):
    """Encodes and decodes pose sequences with the files that `scripts/export.py --format onnx` wrote.

    Args:
        folder: Where `encoder.onnx` and `decoder.onnx` lie, and for streams `step_encoder.onnx`, `step_decoder.onnx`.
        num_threads (`int`, *optional*): Threads of an operator; all cores by default.
        providers (*optional*, defaults to the CPU): Execution providers of onnxruntime.

    Attributes:
        metadata (`dict`): What the files say of the model: `config`, `feature_extractor`, `layout`, `codebooks`,
            `codebook_size`, `num_quantizers`, `hop_length`, `sampling_rate`, `frame_rate`, ...

    Raises:
        RuntimeFolderError: a file is missing, is no model of this package, or is of another model than its neighbour.

    Example:

    ```python
    >>> runtime = PoseRuntime("exported")
    >>> inputs = runtime(poses, fps=25)
    >>> codes = runtime.encode(inputs["input_values"], inputs["padding_mask"])
    >>> values = runtime.decode(codes, inputs["padding_mask"])
    >>> reconstruction = runtime.postprocess(values, inputs)[0]
    ```
    """

    def __init__(
        self,
        folder: str | Path,
        num_threads: int | None = None,
        providers: tuple[Any, ...] = ("CPUExecutionProvider",),
    ) -> None:
        self.folder, self.num_threads, self.providers = Path(folder), num_threads, providers
        self._encoder, self.metadata = self._load("encoder")
        features = self.metadata["feature_extractor"]
        self.skeleton: str | None = features["skeleton"]
        self.num_keypoints: int = features["num_keypoints"]
        self.keypoint_dim: int = features["keypoint_dim"]
        self.scale_pair: list[int] | None = features["scale_pair"]
        self.sampling_rate: float = features["sampling_rate"]
        self.confidence_threshold: float = features["confidence_threshold"]
        self.coordinate_bound: float = features["coordinate_bound"]
        self.mean: list[list[float | None]] | None = features["mean"]
        self.padding_value: float = features["padding_value"]
        self.hop_length: int = self.metadata["hop_length"]
        self.num_codebooks = len(self.metadata["codebooks"])

    def __call__(self, poses: Any, fps: Any = None) -> dict[str, np.ndarray]:
        """Normalises one sequence `(T, N, D)` or a list of them, as `PoseFeatureExtractor` does.

        Args:
            poses: Raw coordinates.
            fps: Frames per second of the input, one for all or one each; None: already the model's.

        Returns:
            `input_values` (B, T, N, D), `padding_mask` (B, T), and for `postprocess`: `center`, `scale`, `fps`,
            `num_frames`.

        Raises:
            ValueError: a sequence has another N or D, no frame or no numbers, or fps is not positive.
        """
        return self.stack(self.features(poses, fps))

    def encode(self, input_values: np.ndarray, padding_mask: np.ndarray | None = None) -> np.ndarray:
        """Normalised poses `(B, T, N, D)`, real frames `(B, T)`, to codes `(B, Q, S)` int64.

        Raises:
            ValueError: arrays of another shape.
        """
        values, mask = self.check_values(input_values, padding_mask)
        return self._encoder.run(["pose_codes"], {"input_values": values, "padding_mask": mask})[0]

    def decode(self, pose_codes: np.ndarray, padding_mask: np.ndarray | None = None) -> np.ndarray:
        """Codes `(B, Q, S)` to normalised poses `(B, T, N, D)`; without a mask `(B, T)` T is S * hop_length.

        Raises:
            ValueError: arrays of another shape, or a code outside 0..K-1.
        """
        codes = self.check_codes(pose_codes)
        batch, _, steps = codes.shape
        if padding_mask is None:
            padding_mask = np.ones((batch, steps * self.hop_length))
        mask = np.asarray(padding_mask).astype(np.int64)
        if mask.ndim != 2 or len(mask) != batch or -(-mask.shape[1] // self.hop_length) != steps:
            raise ValueError(
                f"padding_mask has shape {mask.shape}; expected {batch} sequences of frames that make {steps} code "
                f"steps of {self.hop_length}, the mask that was given to encode."
            )
        return self._decoder.run(["pose_values"], {"pose_codes": codes, "padding_mask": mask})[0]

    def stream(self) -> "PoseRuntimeStream":
        """A stream, of poses, of codes or of both; any number may run beside each other.

        Raises:
            RuntimeFolderError: the folder was exported without `--streaming`.
        """
        return PoseRuntimeStream(self)

    def check_values(self, input_values: np.ndarray, padding_mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Poses as float32 and their mask as int64, of fitting shapes."""
        values = np.asarray(input_values).astype(np.float32, copy=False)
        expected = (self.num_keypoints, self.keypoint_dim)
        if values.ndim != 4 or values.shape[2:] != expected or values.shape[1] < 1:
            raise ValueError(
                f"input_values has shape {values.shape}; expected (batch, frames, {expected[0]}, {expected[1]}) with "
                "at least one frame, as the runtime makes it from your poses."
            )
        mask = np.ones(values.shape[:2]) if padding_mask is None else np.asarray(padding_mask)
        if mask.shape != values.shape[:2]:
            raise ValueError(f"padding_mask has shape {mask.shape}; expected {values.shape[:2]}, a value each frame.")
        return values, mask.astype(np.int64)

    def check_codes(self, pose_codes: np.ndarray) -> np.ndarray:
        """Codes as int64, of a fitting shape and range."""
        codes = np.asarray(pose_codes)
        if codes.ndim != 3 or codes.shape[1] != self.num_codebooks or codes.shape[2] < 1:
            raise ValueError(
                f"pose_codes has shape {codes.shape}; expected (batch, {self.num_codebooks}, steps) with at least one "
                f"step: the files were exported for {self.metadata['num_quantizers']} levels."
            )
        if codes.size and not (codes.min() >= 0 and codes.max() < self.metadata["codebook_size"]):
            raise ValueError(
                f"pose_codes holds codes from {codes.min()} to {codes.max()}; expected 0 to "
                f"{self.metadata['codebook_size'] - 1}."
            )
        return codes.astype(np.int64)

    @cached_property
    def _decoder(self) -> Any:
        return self._load("decoder")[0]

    @cached_property
    def step_sessions(self) -> tuple[Any, Any]:
        """Of one code step: encoder and decoder."""
        return self._load("step_encoder")[0], self._load("step_decoder")[0]

    def _load(self, name: str) -> tuple[Any, dict[str, Any]]:
        """A session and its metadata."""
        import onnxruntime

        path = self.folder / FILES[name]
        if not path.is_file():
            streaming = " --streaming, which needs a causal model" if name.startswith("step") else ""
            raise RuntimeFolderError(f"{path} is missing; write it with scripts/export.py --format onnx{streaming}.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.num_threads or 0
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=list(self.providers))
        except Exception as error:  # onnxruntime's errors have no common class of their own
            reason = " ".join(str(error).split())[:300]
            raise RuntimeFolderError(f"{path}: onnxruntime cannot load it ({reason}).") from error
        metadata = read_metadata(session.get_modelmeta().custom_metadata_map)
        if metadata.get("part") != name or metadata["format_version"] != FORMAT_VERSION:
            raise RuntimeFolderError(
                f"{path}: holds {metadata.get('part', 'a model of another origin')}, format "
                f"{metadata.get('format_version')}; expected {name}, format {FORMAT_VERSION}, of scripts/export.py."
            )
        if name != "encoder" and metadata["export_id"] != self.metadata["export_id"]:
            raise RuntimeFolderError(
                f"{path}: is of another export than {FILES['encoder']} beside it; export both anew into one folder."
            )
        return session, metadata


class PoseRuntimeStream:
    """Frames in, codes out, and codes in, frames out, with bounded state: `PoseTokenizerStream` without torch.

    The two directions do not touch each other. Streams that keep step go in one object as the rows of a batch.

    Args:
        runtime (`PoseRuntime`): Of a folder that was exported with `--streaming`.

    Raises:
        RuntimeFolderError: the files for it are missing.
    """

    def __init__(self, runtime: PoseRuntime) -> None:
        self.runtime = runtime
        self._encoder, self._decoder = runtime.step_sessions
        self.reset()

    def reset(self) -> None:
        """Forget both directions; the next frame and the next code are the first of another stream."""
        self._encoder_state: dict[str, np.ndarray] | None = None
        self._decoder_state: dict[str, np.ndarray] | None = None
        self._frames: np.ndarray | None = None

    def push(self, frames: np.ndarray) -> np.ndarray | None:
        """Take new frames.

        Args:
            frames: (B, T, N, D) normalised poses, any T; B as in the pushes before.

        Returns:
            Codes (B, Q, S) of the steps now complete, or None.

        Raises:
            ValueError: frames of another shape.
        """
        frames, _ = self.runtime.check_values(frames, None)
        if self._frames is not None:
            if len(frames) != len(self._frames):
                raise ValueError(f"frames has {len(frames)} rows; expected {len(self._frames)}, as the pushes before.")
            frames = np.concatenate([self._frames, frames], 1)
        hop = self.runtime.hop_length
        whole = frames.shape[1] - frames.shape[1] % hop
        self._frames = frames[:, whole:]
        steps = [self._encode(frames[:, start : start + hop]) for start in range(0, whole, hop)]
        return np.concatenate(steps, 2) if steps else None

    def flush(self) -> np.ndarray | None:
        """End the stream: the codes (B, Q, 1) of the unfinished step, or None. The next push starts afresh."""
        codes = None if self._frames is None or not self._frames.shape[1] else self._encode(self._frames)
        self._encoder_state = self._frames = None
        return codes

    def decode(self, pose_codes: np.ndarray) -> np.ndarray:
        """Take new codes (B, Q, S), any S; B as before. Returns their poses (B, S * hop_length, N, D).

        Raises:
            ValueError: codes of another shape or outside 0..K-1.
        """
        codes = self.runtime.check_codes(pose_codes)
        poses = []
        for step in range(codes.shape[2]):
            feed = {"pose_codes": codes[:, :, step : step + 1]}
            values, self._decoder_state = run_step(self._decoder, feed, self._decoder_state)
            poses.append(values)
        return np.concatenate(poses, 1)

    def _encode(self, frames: np.ndarray) -> np.ndarray:
        """Codes of one step, of which the last frames may be missing."""
        missing = self.runtime.hop_length - frames.shape[1]
        feed = {
            "input_values": np.pad(frames, ((0, 0), (0, missing), (0, 0), (0, 0))),
            "padding_mask": np.pad(np.ones(frames.shape[:2], np.int64), ((0, 0), (0, missing))),
        }
        codes, self._encoder_state = run_step(self._encoder, feed, self._encoder_state)
        return codes


def run_step(
    session: Any, feed: dict[str, np.ndarray], state: dict[str, np.ndarray] | None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One step of a stream: the session's first output, and the state for the next step. A stream begins at zeros.

    Every input that is not in `feed` is state, and `next_NAME` among the outputs is what follows it.
    """
    batch = len(next(iter(feed.values())))
    if state is None:
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        state = {
            each.name: np.zeros([batch if isinstance(size, str) else size for size in each.shape], kinds[each.type])
            for each in session.get_inputs()
            if each.name not in feed
        }
    result, *following = session.run(None, {**feed, **state})
    names = [each.name.removeprefix("next_") for each in session.get_outputs()[1:]]
    return result, dict(zip(names, following, strict=True))


def read_metadata(properties: dict[str, str]) -> dict[str, Any]:
    """An exported file's properties: `part`, `format_version` and `export_id` are text, the others JSON."""
    plain = ("part", "format_version", "export_id")
    if "part" not in properties:  # a stranger's file
        return {}
    return {key: text if key in plain else json.loads(text) for key, text in properties.items()}


__all__ = ["PoseRuntime", "PoseRuntimeStream", "RuntimeFolderError"]
