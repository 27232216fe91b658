"""Generated clips as pose files, and beside the recorded ones as a picture and as a page that moves.

Letters: Q codebooks, S code steps, T frames, N keypoints, D values per keypoint (confidence last).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from fingerspelling import Row
from PIL import Image

from modeling_pose_tokenizer import PoseFeatureExtractor, PoseTokenizerModel
from modeling_pose_tokenizer.formats import PoseSequence, read_npz, write_npz
from modeling_pose_tokenizer.skeleton_pose_tokenizer import Skeleton
from modeling_pose_tokenizer.visualization import PosePair, figure_to_array, reconstruction_figure, write_report

SHOWN = 3  # prompts in the picture: the first that were held out, so that nobody chose them


@torch.inference_mode()
def decode(
    codec: PoseTokenizerModel, feature_extractor: PoseFeatureExtractor, codes: np.ndarray, row: Row
) -> np.ndarray:
    """Codes (Q, S) -> poses (T, N, D), where the signer of a recorded clip stands."""
    if not codes.size:  # nothing was said: the prediction stands
        codes = np.zeros((codec.config.num_codebooks, 1), dtype=np.int64)
    values = codec.decode(torch.from_numpy(codes)[None].to(codec.device)).pose_values  # (1, T, N, D)
    place = {"center": [row["center"]], "scale": [row["scale"]], "num_frames": [values.shape[1]]}
    place = {key: np.array(value) for key, value in place.items()} | {"fps": np.array([codec.config.sampling_rate])}
    return feature_extractor.postprocess(values, place)[0]


def draw(pairs: Sequence[tuple[PosePair, PosePair]], skeleton: Skeleton, path: Path) -> None:
    """A row for each prompt: the recorded clip to the left, the generated one to the right."""
    rows = []
    for pair in pairs:
        pictures = []
        for clip in pair:
            nothing = np.zeros_like(clip.reference)  # of no confidence: the clip is drawn alone
            figure = reconstruction_figure(clip.reference, nothing, skeleton, clip.label)
            figure.legends.clear()
            pictures.append(figure_to_array(figure, dpi=60))
        rows.append(stack(pictures, axis=1))
    Image.fromarray(stack(rows, axis=0)).save(path)


def stack(pictures: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Pictures (height, width, 3) beside each other (axis 1) or below (axis 0), the smaller ones filled with white."""
    size = max(picture.shape[1 - axis] for picture in pictures)
    filled = []
    for picture in pictures:
        margin = [(0, 0), (0, 0), (0, 0)]
        margin[1 - axis] = (0, size - picture.shape[1 - axis])
        filled.append(np.pad(picture, margin, constant_values=255))
    return np.concatenate(filled, axis)


def save_generated(
    codec: PoseTokenizerModel,
    feature_extractor: PoseFeatureExtractor,
    rows: Sequence[Row],
    generated: Sequence[np.ndarray],
    recordings: Path,
    output: Path,
) -> None:
    """Writes generated clips as pose files, and the recorded clips beside them as a picture and as a page."""
    (output / "generated").mkdir(exist_ok=True)
    pairs = []
    for row, codes in zip(rows, generated, strict=True):
        label, fps = f"{row['language']}: {row['letter']}", codec.config.sampling_rate
        poses = decode(codec, feature_extractor, codes, row)
        write_npz(
            output / "generated" / f"{row['id']}.npz", PoseSequence(row["id"], poses, np.ones(len(poses), bool), fps)
        )
        (recorded,) = read_npz(recordings / f"{row['id']}.npz")
        pairs.append(
            (
                PosePair(row["id"], recorded.poses, fps=recorded.fps or fps, label=f"{label}, recorded"),
                PosePair(row["id"], poses, fps=fps, label=f"{label}, generated"),
            )
        )
    skeleton = codec.config.layout
    draw(pairs[:SHOWN], skeleton, output / "generated.png")
    clips = [clip for pair in pairs for clip in pair]
    write_report(output / "generated.html", clips, skeleton, title="Recorded and generated letters")
