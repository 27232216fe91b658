"""Corpora of tokens: a split of pose data -> Parquet shards of codes with a manifest, and back to pose files.

Letters: B batch, T frames, N keypoints, D values per keypoint, Q codebooks, S code steps.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm

from .codes_pose_tokenizer import PoseCodeFormatter
from .configuration_pose_tokenizer import PoseTokenizerConfig
from .dataset import PoseDataset
from .feature_extraction_pose_tokenizer import PoseFeatureExtractor
from .formats import FilePath, PoseSequence, write_npz, write_rejected
from .modeling_pose_tokenizer import PoseTokenizerModel

MANIFEST = "manifest.json"
METADATA_KEY = b"pose_tokenizer"  # of a shard's schema: what the codes are and which model made them
SHARD_FRAMES = 2**18  # frames of a shard: three hours at 25 fps, the most that a killed run does again
# Frames of a micro-batch, padding included. On a CPU about 8 x 64 stay in the cache; a GPU wants more.
CPU_BATCH_FRAMES, GPU_BATCH_FRAMES = 2**9, 2**15
DECODE_COLUMNS = ("id", "codes", "num_frames", "fps", "center", "scale")
VERSIONS = ("torch", "transformers", "accelerate", "datasets", "pyarrow", "numpy")
_ROWS_IN_MEMORY = 1024  # sequences that are decoded at a time
# What `save_pretrained` and the library's version add to a configuration without changing the codes.
_BOOKKEEPING = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "feature_extractor_type",
    "transformers_version",
)


class TokenFolderError(ValueError):
    """Tokens that cannot be written or read; `str` is one sentence with the path."""


# ---- who made the codes ---------------------------------------------------------------------------------------------


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256 of all parameters and buffers: the same for the same model, wherever it lies."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_settings(settings: Any) -> str:
    """SHA-256 of a configuration or feature extractor, without bookkeeping."""
    values = {key: value for key, value in settings.to_dict().items() if key not in _BOOKKEEPING}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def describe_model(model: PoseTokenizerModel, feature_extractor: PoseFeatureExtractor) -> dict[str, Any]:
    """What decides about the codes: tokens of two different descriptions must not be mixed."""
    return {
        "weights_sha256": hash_weights(model),
        "configuration_sha256": hash_settings(model.config),
        "feature_extractor_sha256": hash_settings(feature_extractor),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def describe_codes(config: PoseTokenizerConfig) -> dict[str, Any]:
    """What the rows of the codes mean and how fast they come."""
    return {
        "group_names": list(config.group_names),
        "levels_per_group": list(config.levels_per_group),
        "codebooks": [list(entry) for entry in config.codebook_index],
        "codebook_size": config.codebook_size,
        "hop_length": config.hop_length,
        "sampling_rate": config.sampling_rate,
        "bits_per_frame": config.bits_per_frame,
    }


# ---- poses -> tokens ------------------------------------------------------------------------------------------------


def extract_tokens(
    model: PoseTokenizerModel,
    dataset: PoseDataset,
    output_dir: FilePath,
    *,
    shard_frames: int = SHARD_FRAMES,
    batch_frames: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Encodes a split and writes `{split}-00000-of-0000n.parquet` shards, `manifest.json` and `rejected.jsonl`.

    The shards are dealt out to the processes of `accelerate launch`; what they hold does not depend on their number.
    A shard appears under its name when it is whole, so that a run that was killed continues where it stopped.

    Args:
        model: The tokenizer; encodes in float32.
        dataset: Whole sequences (no `sequence_length`), normalised by the model's feature extractor.
        output_dir: Where the tokens go. Other splits of the same model may lie there already.
        shard_frames: Frames of a shard, at the model's frame rate.
        batch_frames: Frames of a micro-batch; None chooses by device.
        progress: Show a progress bar.

    Returns:
        The manifest.

    Raises:
        TokenFolderError: `output_dir` cannot be written, or holds tokens of another model or of other data.
    """
    if shard_frames < 1 or (batch_frames is not None and batch_frames < 1):
        raise ValueError(f"shard_frames is {shard_frames} and batch_frames {batch_frames}; expected at least 1.")
    if dataset.sequence_length is not None:
        raise ValueError(f"the dataset has windows of {dataset.sequence_length} frames; expected whole sequences.")
    state, output, split = _process_state(), Path(output_dir), dataset.folder.name
    model = model.float().eval().to(state.device)
    batch_frames = batch_frames or _default_batch_frames(state)
    made_by, codes = describe_model(model, dataset.feature_extractor), describe_codes(model.config)
    shards = plan_shards(dataset.lengths, shard_frames)
    names = [f"{split}-{index:05d}-of-{len(shards):05d}.parquet" for index in range(len(shards))]
    manifest = _open_manifest(output, made_by) or {
        "made_by": made_by,
        # Not a part of `made_by`: a model of the Hub and its copy in a folder make the same codes.
        "model_revision": getattr(model.config, "_commit_hash", None),
        "codes": codes,
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "splits": {},
    }
    entry = _describe_split(dataset, model, names)
    _check_continues(output, manifest["splits"].get(split), entry)
    manifest["splits"][split] = entry | {"complete": False}
    if state.is_main_process:  # before the first shard: from now on a run of another model is refused
        _write_manifest(output, manifest)
    state.wait_for_everyone()

    own = range(state.process_index, len(shards), state.num_processes)
    todo = [index for index in own if not (output / names[index]).exists()]
    frames = sum(int(dataset.lengths[shards[index]].sum()) for index in todo)
    show = progress and state.is_local_main_process
    with tqdm(total=frames, unit=" frames", unit_scale=True, desc=f"encode {split}", disable=not show) as bar:
        for index in todo:
            rows = _encode_shard(model, dataset, shards[index], batch_frames, bar)
            with _replacing(output / names[index]) as file:
                pq.write_table(
                    _make_table(rows, model.config, {"made_by": made_by, "codes": codes}), file, compression="zstd"
                )
    state.wait_for_everyone()
    manifest["splits"][split]["complete"] = True
    if state.is_main_process:
        _write_rejected(output, dataset)
        _write_manifest(output, manifest)
    return manifest


def plan_shards(lengths: np.ndarray, shard_frames: int) -> list[np.ndarray]:
    """Deals sequences out to shards of about `shard_frames` frames, in their order: a function of the data alone."""
    starts = np.cumsum(lengths) - lengths
    _, first = np.unique(starts // shard_frames, return_index=True)
    return np.split(np.arange(len(lengths)), first[1:])


def plan_batches(lengths: np.ndarray, batch_frames: int) -> Iterator[np.ndarray]:
    """Puts sequences of similar length together.

    Args:
        lengths: (M,) frames of the sequences.
        batch_frames: Frames of a batch, padding included; a longer sequence is a batch of its own.

    Yields:
        Indices of the sequences of a batch, longest first.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + max(1, batch_frames // int(lengths[order[start]]))
        yield order[start:stop]
        start = stop


def _encode_shard(
    model: PoseTokenizerModel, dataset: PoseDataset, indices: np.ndarray, batch_frames: int, bar: tqdm
) -> list[dict[str, Any]]:
    """The items of a shard with `codes` (Q, S) in place of poses."""
    rows: list[dict[str, Any]] = [{}] * len(indices)
    for batch in plan_batches(dataset.lengths[indices], batch_frames):
        items = [dataset[int(index)] for index in indices[batch]]
        poses = [item.pop("input_values") for item in items]  # (T, N, D) each, the longest first
        values = np.zeros((len(poses), *poses[0].shape), dtype=np.float32)  # (B, T, N, D)
        # A masked frame of the file is one without keypoints here, not padding: it gets its codes like any other.
        mask = np.zeros(values.shape[:2], dtype=np.int64)
        for number, sequence in enumerate(poses):
            values[number, : len(sequence)] = sequence
            mask[number, : len(sequence)] = 1
        codes = _run(model.encode, values, mask)  # (B, Q, S)
        for number, place in enumerate(batch):
            rows[place] = items[number] | {"codes": codes[number, :, : model.get_encoded_length(len(poses[number]))]}
        bar.update(int(mask.sum()))
        bar.set_postfix_str(f"{bar.n / model.config.sampling_rate / 3600:.2f} h of motion", refresh=False)
    return rows


def _run(method: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """Calls `encode` or `decode` in true float32: TF32, which a GPU's convolutions use by default, flips codes."""
    device = method.__self__.device  # type: ignore[attr-defined]
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), exact:
        result, *_ = method(*(torch.from_numpy(array).to(device) for array in arrays), return_dict=False)
    return result.cpu().numpy()


# ---- the files of a token folder ------------------------------------------------------------------------------------


def _make_table(rows: list[dict[str, Any]], config: PoseTokenizerConfig, metadata: dict[str, Any]) -> pa.Table:
    formatter = PoseCodeFormatter.from_config(config)
    codes = [row["codes"] for row in rows]
    values = pa.array(np.concatenate([array.reshape(-1) for array in codes]).astype(np.int32))
    ends = np.cumsum([0] + [array.shape[1] for array in codes for _ in array], dtype=np.int32)
    sequence_ends = np.cumsum([0] + [len(array) for array in codes], dtype=np.int32)
    columns = {
        "id": pa.array([row["id"] for row in rows], pa.string()),
        "codes": pa.ListArray.from_arrays(sequence_ends, pa.ListArray.from_arrays(ends, values)),  # (Q, S)
        # Of the input: what brings a reconstruction back to its length, frame rate and coordinates.
        "num_frames": pa.array([row["num_frames"] for row in rows], pa.int64()),
        "fps": pa.array([row["fps"] for row in rows], pa.float32()),
        "center": pa.array([row["center"] for row in rows], pa.list_(pa.float32())),
        "scale": pa.array([row["scale"] for row in rows], pa.float32()),
        "text": pa.array([formatter.codes_to_text(array) for array in codes], pa.string()),
    }
    return pa.table(columns, metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def _write_manifest(output: Path, manifest: dict[str, Any]) -> None:
    with _replacing(output / MANIFEST) as file:
        file.write((json.dumps(manifest, indent=2) + "\n").encode())


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path` once it is complete and on the disk: there whole or not at all."""
    # No process number in the name: what a killed run left is overwritten by the next.
    temporary = path.with_name(f".{path.name}.tmp")
    with _refusing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def _refusing(output: Path) -> Iterator[None]:
    """Turns what the operating system says about writing into one sentence."""
    try:
        yield
    except OSError as error:
        raise TokenFolderError(f"{output}: cannot be written ({error.strerror or error}).") from None


def _open_manifest(output: Path, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a token folder that the same model made, or None where there is none yet."""
    path = output / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        other = {key: value for key, value in made_by.items() if manifest["made_by"][key] != value}
        manifest["splits"].get("")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise TokenFolderError(f"{path}: is not a manifest of tokens ({type(error).__name__}: {error}).") from None
    if other:
        key, value = other.popitem()
        raise TokenFolderError(
            f"{output}: holds tokens made with another {key} ({manifest['made_by'][key]}, now {value});"
            " choose another output folder."
        )
    return manifest


def _describe_split(dataset: PoseDataset, model: PoseTokenizerModel, shards: list[str]) -> dict[str, Any]:
    steps = int(sum(model.get_encoded_length(int(length)) for length in dataset.lengths))
    contents = json.dumps([dataset.ids, dataset.lengths.tolist()])
    return {
        "shards": shards,
        "data_sha256": hashlib.sha256(contents.encode()).hexdigest(),
        "sequences": len(dataset.ids),
        "frames": int(dataset.num_frames.sum()),
        "frames_encoded": int(dataset.lengths.sum()),  # at the model's frame rate
        "code_steps": steps,
        "tokens": steps * model.config.num_codebooks,
        "rejected_files": len(dataset.rejected),
    }


def _check_continues(output: Path, found: dict[str, Any] | None, entry: dict[str, Any]) -> None:
    """Refuses to continue a split whose data or shards are others now: old and new rows would mix."""
    if found is not None:
        different = [key for key in ("data_sha256", "shards") if found.get(key) != entry[key]]
        if different:
            raise TokenFolderError(
                f"{output}: holds shards of other data or of another size ({different[0]} differs);"
                " choose another output folder."
            )


def _write_rejected(output: Path, dataset: PoseDataset) -> None:
    """Lists what was left out of this split, beside what was left out of others."""
    path, folder = output / "rejected.jsonl", os.fspath(dataset.folder)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    others = [row for row in map(json.loads, lines) if not row["path"].startswith(folder + os.sep)]
    write_rejected(output, others + dataset.rejected)


# ---- tokens -> poses ------------------------------------------------------------------------------------------------


def decode_tokens(
    model: PoseTokenizerModel,
    feature_extractor: PoseFeatureExtractor,
    tokens: FilePath,
    output_dir: FilePath,
    *,
    batch_frames: int | None = None,
    progress: bool = True,
) -> int:
    """Decodes token shards to one `{id}.npz` per sequence, in the coordinates, frame rate and length of its input.

    The shards are dealt out to the processes of `accelerate launch`.

    Args:
        model: The tokenizer that made the tokens.
        feature_extractor: Its feature extractor.
        tokens: A shard, or a folder of shards.
        output_dir: Where the npz files go.
        batch_frames: Frames of a micro-batch; None chooses by device.
        progress: Show a progress bar.

    Returns:
        Number of sequences.

    Raises:
        TokenFolderError: There are no tokens, they are of another model, or `output_dir` cannot be written.
    """
    state, output = _process_state(), Path(output_dir)
    model = model.float().eval().to(state.device)
    shards = _find_shards(Path(tokens))
    _check_made_by(shards, hash_weights(model))
    with _refusing(output):
        output.mkdir(parents=True, exist_ok=True)
    own = list(shards.items())[state.process_index :: state.num_processes]
    total = sum(footer.num_rows for _, footer in own)
    show = progress and state.is_local_main_process
    with tqdm(total=total, unit=" sequences", desc="decode", disable=not show) as bar:
        for path, _ in own:
            for piece in pq.ParquetFile(path).iter_batches(_ROWS_IN_MEMORY, columns=list(DECODE_COLUMNS)):
                rows = [_check_row(path, row, model, feature_extractor) for row in piece.to_pylist()]
                lengths = np.array([row["length"] for row in rows])
                for batch in plan_batches(lengths, batch_frames or _default_batch_frames(state)):
                    _decode_batch(model, feature_extractor, [rows[place] for place in batch], output)
                    bar.update(len(batch))
    state.wait_for_everyone()
    return sum(footer.num_rows for footer in shards.values())


def _decode_batch(
    model: PoseTokenizerModel, feature_extractor: PoseFeatureExtractor, rows: list[dict[str, Any]], output: Path
) -> None:
    """Decodes rows, the longest first, and writes their files."""
    frames = rows[0]["length"]
    codes = np.zeros((len(rows), *rows[0]["codes"].shape), dtype=np.int64)  # (B, Q, S)
    mask = np.zeros((len(rows), frames), dtype=np.int64)  # (B, T)
    for number, row in enumerate(rows):
        codes[number, :, : row["codes"].shape[1]] = row["codes"]
        mask[number, : row["length"]] = 1
    values = _run(model.decode, codes, mask)  # (B, T, N, D)
    placement = {key: np.array([row[key] for row in rows]) for key in ("center", "scale", "fps", "num_frames")}
    for row, poses in zip(rows, feature_extractor.postprocess(values, placement), strict=True):
        path = output / f"{row['id']}.npz"
        with _refusing(output):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_npz(path, PoseSequence(row["id"], poses, np.ones(len(poses), dtype=bool), row["fps"]))


def _find_shards(tokens: Path) -> dict[Path, pq.FileMetaData]:
    """The Parquet files of a path with their footers."""
    if not tokens.exists():
        raise TokenFolderError(f"{tokens}: no such file or folder; expected what extract_tokens.py writes.")
    paths = sorted(tokens.glob("*.parquet")) if tokens.is_dir() else [tokens]
    if not paths:
        raise TokenFolderError(f"{tokens}: holds no .parquet file; expected what extract_tokens.py writes.")
    shards = {}
    for path in paths:
        try:
            shards[path] = pq.read_metadata(path)
        except (OSError, pa.ArrowException) as error:
            raise TokenFolderError(f"{path}: is not a Parquet file ({str(error).splitlines()[0]}).") from None
        missing = set(DECODE_COLUMNS) - set(shards[path].schema.to_arrow_schema().names)
        if missing:
            raise TokenFolderError(f"{path}: has no column {', '.join(sorted(missing))}; expected tokens.")
    return shards


def _check_made_by(shards: dict[Path, pq.FileMetaData], weights: str) -> None:
    for path, footer in shards.items():
        # Other programs may have written the rows anew and dropped this; then the codes' shape is all there is.
        if METADATA_KEY in (footer.metadata or {}):
            other = json.loads(footer.metadata[METADATA_KEY])["made_by"]["weights_sha256"]
            if other != weights:
                raise TokenFolderError(
                    f"{path}: was made by another model (weights {other[:12]}, given {weights[:12]});"
                    " decode with the model that made the tokens."
                )


def _check_row(
    path: Path, row: dict[str, Any], model: PoseTokenizerModel, feature_extractor: PoseFeatureExtractor
) -> dict[str, Any]:
    """A row with `codes` (Q, S) as an array and its `length` in frames at the model's frame rate."""
    name = Path(row["id"])
    if name.is_absolute() or ".." in name.parts:
        raise TokenFolderError(f"{path}: id {row['id']!r} leads out of the output folder; expected a plain name.")
    codes = {len(codes) for codes in row["codes"]}
    length = feature_extractor.resampled_length(row["num_frames"], row["fps"])
    steps, expected = model.get_encoded_length(length), model.config.num_codebooks
    if codes != {steps} or len(row["codes"]) != expected:
        raise TokenFolderError(
            f"{path}: {row['id']} has {len(row['codes'])} rows of {sorted(codes)} codes;"
            f" expected {expected} rows of {steps}, for {row['num_frames']} frames at {row['fps']:g} fps."
        )
    return row | {"codes": np.array(row["codes"]), "length": length}


def _process_state() -> PartialState:
    # Unless it is told, PartialState takes processes without an accelerator for strangers who each do everything.
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=bool(use_cpu))


def _default_batch_frames(state: PartialState) -> int:
    return CPU_BATCH_FRAMES if state.device.type == "cpu" else GPU_BATCH_FRAMES


__all__ = ["TokenFolderError", "decode_tokens", "extract_tokens"]
