"""Corpora of tokens: a split of pose data -> Parquet shards of codes with a manifest. `decoding.py` is the way back.

Letters: B batch, T frames, N keypoints, D values per keypoint, Q codebooks, S code steps.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from tqdm.auto import tqdm

from .codes_pose_tokenizer import PoseCodeFormatter
from .configuration_pose_tokenizer import PoseTokenizerConfig
from .dataset import PoseDataset
from .feature_extraction_pose_tokenizer import PoseFeatureExtractor
from .formats import FilePath
from .modeling_pose_tokenizer import PoseTokenizerModel

MANIFEST, REJECTED = "manifest.json", "rejected.jsonl"
METADATA_KEY = b"pose_tokenizer"  # of a shard's schema: what the codes are and which model made them
SHARD_FRAMES = 2**18  # frames of a shard: three hours at 25 fps, the most that a killed run does again
# Most frames, padding included, and most sequences of a micro-batch. The quantizer walks over code steps one after
# another, so each must have enough to do: on a CPU 8 clips of 64 frames give a third of the frames per second that 64
# give. More gain nothing, and beyond some ten thousand frames the poses fall out of the cache. A GPU has more to fill.
CPU_BATCH, GPU_BATCH = (2**14, 2**6), (2**17, 2**12)
VERSIONS = ("torch", "transformers", "accelerate", "datasets", "pyarrow", "numpy")
# What follows the split in the name of a shard.
SHARD_NAME = r"-\d{5,}-of-\d{5,}\.parquet"
# What `save_pretrained` and the library's version add to a configuration without changing the codes.
_BOOKKEEPING = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "feature_extractor_type",
    "transformers_version",
)
# Processes that are ready wait for the others, whose shards may be on slower machines.
_PATIENCE = timedelta(days=7)

Argument = TypeVar("Argument")
Result = TypeVar("Result")


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


def hash_data(dataset: PoseDataset) -> str:
    """SHA-256 of the sequences' names, lengths, frame rates and places; poses that differ hardly ever agree in all."""
    digest = hashlib.sha256()
    for id in dataset.ids:
        digest.update(f"{id}\0".encode())
    for column in (dataset.lengths, dataset.num_frames, dataset.fps, dataset._center, dataset._scale):
        digest.update(column.tobytes())
    return digest.hexdigest()


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
        "token_rate": config.token_rate,
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

    The shards are dealt out to the processes of `accelerate launch`, which share the folder. What they hold follows
    from the data, `shard_frames` and `batch_frames` alone, not from the number of processes. A shard appears under its
    name when it is whole, so that a run that was killed continues where it stopped.

    Args:
        model: The tokenizer; encodes in float32.
        dataset: Whole sequences (no `sequence_length`), normalised by the model's feature extractor.
        output_dir: Where the tokens go. Other splits of the same model may lie there already.
        shard_frames: Frames of a shard, at the model's frame rate.
        batch_frames: Most frames of a micro-batch, padding included; None chooses by device. A code in a thousand may
            depend on it at most (a matrix product rounds by its shape), so a split keeps the number it began with.
        progress: Show a progress bar.

    Returns:
        The manifest.

    Raises:
        ValueError: A number of frames below 1, or a dataset of windows.
        TokenFolderError: `output_dir` cannot be written, or holds tokens of another model, of other data or of other
            numbers of frames.
    """
    if shard_frames < 1 or (batch_frames is not None and batch_frames < 1):
        raise ValueError(f"shard_frames is {shard_frames} and batch_frames {batch_frames}; expected at least 1.")
    if dataset.sequence_length is not None:
        raise ValueError(f"the dataset has windows of {dataset.sequence_length} frames; expected whole sequences.")
    state, output, split = process_state(), Path(output_dir), dataset.folder.name
    model = model.float().eval().to(state.device)
    limits = batch_limits(state, batch_frames)
    made_by, codes = describe_model(model, dataset.feature_extractor), describe_codes(model.config)
    shards = plan_shards(dataset.lengths, shard_frames)
    names = [f"{split}-{index:05d}-of-{len(shards):05d}.parquet" for index in range(len(shards))]
    entry = _describe_split(dataset, model, names) | {"shard_frames": shard_frames}
    entry |= dict(zip(("batch_frames", "batch_sequences"), limits, strict=True))
    todo: list[int] = []
    if state.is_main_process:
        # Before the first shard, so that from now on a run of another model is refused.
        _update_manifest(output, model, made_by, codes, {split: entry | {"complete": False}})
        _remove_leftovers(output, split)
        todo = _find_missing(output, names, shards, made_by)
    (todo,) = broadcast_object_list([todo])
    todo = todo[state.process_index :: state.num_processes]
    metadata = {METADATA_KEY: json.dumps({"made_by": made_by, "codes": codes}, sort_keys=True)}
    formatter = PoseCodeFormatter.from_config(model.config)
    with _progress_bar(state, split, sum(int(dataset.lengths[shards[i]].sum()) for i in todo), progress) as bar:
        for index in todo:
            rows = _encode_shard(model, dataset, shards[index], limits, bar)
            with _replacing(output / names[index], f".{uuid.uuid4().hex}") as file:
                pq.write_table(_make_table(rows, formatter, metadata), file, compression="zstd")
    state.wait_for_everyone()
    if state.is_main_process:
        _write_rejected(output, dataset)
        _update_manifest(output, model, made_by, codes, {split: entry | {"complete": True}})
    state.wait_for_everyone()
    return read_manifest(output)


def plan_shards(lengths: np.ndarray, shard_frames: int) -> list[np.ndarray]:
    """Deals sequences out to shards of about `shard_frames` frames, in their order: a function of the data alone."""
    starts = np.cumsum(lengths) - lengths
    _, first = np.unique(starts // shard_frames, return_index=True)
    return np.split(np.arange(len(lengths)), first[1:])


def plan_batches(lengths: np.ndarray, batch_frames: int, batch_sequences: int) -> Iterator[np.ndarray]:
    """Puts sequences of similar length together.

    Args:
        lengths: (M,) frames of the sequences.
        batch_frames: Most frames of a batch, padding included; a longer sequence is a batch of its own.
        batch_sequences: Most sequences of a batch.

    Yields:
        Indices of the sequences of a batch, longest first.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + max(1, min(batch_sequences, batch_frames // int(lengths[order[start]])))
        yield order[start:stop]
        start = stop


def _encode_shard(
    model: PoseTokenizerModel, dataset: PoseDataset, indices: np.ndarray, limits: tuple[int, int], bar: tqdm
) -> list[dict[str, Any]]:
    """The items of a shard with `codes` (Q, S) in place of poses."""
    rows: list[dict[str, Any]] = [{}] * len(indices)

    def read(batch: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]], np.ndarray, np.ndarray]:
        items = [dataset[int(index)] for index in indices[batch]]
        poses = [item.pop("input_values") for item in items]  # (T, N, D) each, the longest first
        values = np.zeros((len(poses), *poses[0].shape), dtype=np.float32)  # (B, T, N, D)
        # A masked frame of the file is one without keypoints here, not padding: it gets its codes like any other.
        lengths = np.array([len(sequence) for sequence in poses])
        mask = (np.arange(len(poses[0])) < lengths[:, None]).astype(np.int64)
        for row, sequence in zip(values, poses, strict=True):
            row[: len(sequence)] = sequence
        return batch, items, values, mask

    for batch, items, values, mask in _ahead(read, plan_batches(dataset.lengths[indices], *limits)):
        lengths = mask.sum(1)
        # Nothing in 32 bits is lost: codes are below codebook_size.
        codes = run_exactly(model.encode, values, mask).astype(np.int32)  # (B, Q, S)
        for number, place in enumerate(batch):
            rows[place] = items[number] | {"codes": codes[number, :, : model.get_encoded_length(int(lengths[number]))]}
        bar.update(int(lengths.sum()))
        bar.set_postfix_str(f"{bar.n / model.config.sampling_rate / 3600:.2f} h of motion", refresh=False)
    return rows


def _ahead(function: Callable[[Argument], Result], arguments: Iterable[Argument]) -> Iterator[Result]:
    """`function` of each argument in turn; while one result is in use, a thread makes the next."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for argument in arguments:
            ready, coming = coming, pool.submit(function, argument)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


def run_exactly(method: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """Calls `encode` or `decode` in true float32: TF32, which a GPU's convolutions use by default, flips codes."""
    device = method.__self__.device  # type: ignore[attr-defined]
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), exact:
        result, *_ = method(*(torch.from_numpy(array).to(device) for array in arrays), return_dict=False)
    return result.cpu().numpy()


def process_state() -> PartialState:
    """This process among those of `accelerate launch`."""
    # Unless it is told, PartialState takes processes without an accelerator for strangers who each do everything.
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=bool(use_cpu), timeout=_PATIENCE)


def batch_limits(state: PartialState, batch_frames: int | None) -> tuple[int, int]:
    """Most frames and most sequences of a micro-batch on this device."""
    frames, sequences = CPU_BATCH if state.device.type == "cpu" else GPU_BATCH
    return batch_frames or frames, sequences


def _progress_bar(state: PartialState, split: str, frames: int, progress: bool) -> tqdm:
    """Frames per second and time left of the first process, whose share is like the others'."""
    share = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    show = progress and state.is_main_process
    return tqdm(total=frames, unit=" frames", unit_scale=True, desc=f"encode {split}{share}", disable=not show)


# ---- the files of a token folder ------------------------------------------------------------------------------------


def _make_table(rows: list[dict[str, Any]], formatter: PoseCodeFormatter, metadata: dict[bytes, str]) -> pa.Table:
    codes = [row["codes"] for row in rows]
    values = pa.array(np.concatenate([array.reshape(-1) for array in codes]))
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
    return pa.table(columns, metadata=metadata)


@contextmanager
def _replacing(path: Path, unique: str = "") -> Iterator[BinaryIO]:
    """A file that becomes `path` once it is complete and on the disk: there whole or not at all.

    `unique` goes into the temporary name of what two processes may write at once: one that outlived its launcher, and
    one of the run that continues.
    """
    temporary = path.with_name(f".{path.name}{unique}.tmp")
    with refusing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def refusing(output: Path) -> Iterator[None]:
    """Turns what the operating system says about writing into one sentence."""
    try:
        yield
    except OSError as error:
        raise TokenFolderError(f"{output}: cannot be written ({error.strerror or error}).") from None


def _remove_leftovers(output: Path, split: str) -> None:
    """Removes shards that a killed run did not finish."""
    leftover = re.compile(rf"\.{re.escape(split)}{SHARD_NAME}\.[0-9a-f]+\.tmp")
    with refusing(output):
        for path in output.iterdir():
            if leftover.fullmatch(path.name):
                path.unlink(missing_ok=True)


def _find_missing(output: Path, names: list[str], shards: list[np.ndarray], made_by: dict[str, Any]) -> list[int]:
    """Numbers of the shards that are still to be written.

    Raises:
        TokenFolderError: One that is there is damaged, or of another model: then the manifest was lost.
    """
    missing = []
    for index, name in enumerate(names):
        if not (output / name).exists():
            missing.append(index)
            continue
        try:
            footer = pq.read_metadata(output / name)
            found = json.loads(footer.metadata[METADATA_KEY])["made_by"]
        except (OSError, pa.ArrowException, LookupError, TypeError, ValueError):
            found = None
        if found != made_by or footer.num_rows != len(shards[index]):
            raise TokenFolderError(
                f"{output / name}: is damaged or not from this model and data; remove it, or choose another folder."
            )
    return missing


def _write_rejected(output: Path, dataset: PoseDataset) -> None:
    """Lists what was left out of this split, beside what was left out of others, by the path below the data folder."""
    path, root = output / REJECTED, dataset.folder.parent
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    others = [row for row in map(json.loads, lines) if not row["path"].startswith(f"{dataset.folder.name}/")]
    own = [row | {"path": Path(row["path"]).relative_to(root).as_posix()} for row in dataset.rejected]
    with _replacing(path) as file:
        for row in others + own:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


# ---- the manifest ---------------------------------------------------------------------------------------------------


def read_manifest(output: FilePath) -> dict[str, Any]:
    """What `extract_tokens` says of a folder.

    Returns:
        `made_by`: hashes, dtype and device, which all tokens of a folder share. `model`, `model_revision`: name and
        commit of a model from the Hub, or None. `codes`: what their rows mean. `versions`: of libraries. `splits`:
        name -> shards, counts, `shard_frames`, `batch_frames`, `batch_sequences`, `complete`.

    Raises:
        TokenFolderError: There is none, or it is damaged.
    """
    path = Path(output, MANIFEST)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for key in ("made_by", "codes", "splits"):
            manifest[key].get("")
    except FileNotFoundError:
        raise TokenFolderError(f"{output}: has no {MANIFEST}; expected what extract_tokens.py writes.") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise TokenFolderError(f"{path}: is not a manifest of tokens ({type(error).__name__}: {error}).") from None
    return manifest


def _update_manifest(
    output: Path,
    model: PoseTokenizerModel,
    made_by: dict[str, Any],
    codes: dict[str, Any],
    splits: dict[str, dict[str, Any]],
) -> None:
    """Enters splits into a new manifest or that of the same model.

    It is read anew each time: another split of the folder may be on its way at the same time.
    """
    revision = getattr(model.config, "_commit_hash", None)
    manifest: dict[str, Any] = {
        "made_by": made_by,
        # Not a part of `made_by`: a model of the Hub and its copy in a folder make the same codes.
        "model": model.config._name_or_path if revision else None,
        "model_revision": revision,
        "codes": codes,
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "splits": {},
    }
    if (output / MANIFEST).exists():
        manifest = read_manifest(output)
        _check_same_model(output, manifest["made_by"], made_by)
    for split, entry in splits.items():
        _check_continues(output, split, manifest["splits"].get(split), entry)
    manifest["splits"] |= splits
    with _replacing(output / MANIFEST) as file:
        file.write((json.dumps(manifest, indent=2) + "\n").encode())


def _check_same_model(output: Path, found: dict[str, Any], made_by: dict[str, Any]) -> None:
    for key, value in made_by.items():
        if found.get(key) != value:
            raise TokenFolderError(
                f"{output}: holds tokens made with another {key} ({found.get(key)}, now {value});"
                " choose another output folder."
            )


def _check_continues(output: Path, split: str, found: dict[str, Any] | None, entry: dict[str, Any]) -> None:
    """Refuses to continue a split whose data, shards or micro-batches are others now: old and new rows would mix."""
    if found is None:
        return
    if found.get("data_sha256") != entry["data_sha256"]:
        raise TokenFolderError(f"{output}: holds shards of other data as {split}; choose another output folder.")
    for key in ("shard_frames", "batch_frames", "batch_sequences"):
        if found.get(key) != entry[key]:
            raise TokenFolderError(
                f"{output}: {split} was begun with {key} {found.get(key)}, now it is {entry[key]};"
                f" give {found.get(key)}, or choose another output folder."
            )


def _describe_split(dataset: PoseDataset, model: PoseTokenizerModel, shards: list[str]) -> dict[str, Any]:
    steps = int(model.get_encoded_length(torch.from_numpy(dataset.lengths)).sum())
    return {
        "shards": shards,
        "data_sha256": hash_data(dataset),
        "sequences": len(dataset.ids),
        "frames": int(dataset.num_frames.sum()),
        "frames_encoded": int(dataset.lengths.sum()),  # at the model's frame rate
        "code_steps": steps,
        "tokens": steps * model.config.num_codebooks,
        "rejected_files": len(dataset.rejected),  # listed in rejected.jsonl
    }


__all__ = ["TokenFolderError", "extract_tokens", "read_manifest"]
