"""What tests of pages with players read in them, and poses to put there."""

import base64
import json
import re
import zlib

import numpy as np

from modeling_pose_tokenizer.skeleton_pose_tokenizer import get_skeleton

WHOLEBODY = get_skeleton("coco_wholebody_133")


def random_poses(frames, skeleton=WHOLEBODY, dims=3, seed=0):
    """Poses (T, N, D) that wander, a tenth of the keypoints missing and some of those not even numbers."""
    rng = np.random.default_rng(seed)
    poses = rng.normal(size=(1, skeleton.num_keypoints, dims)) + 0.05 * rng.normal(size=(frames, 1, dims)).cumsum(0)
    poses[..., -1] = rng.choice([0.0, 0.8, 1.0], p=[0.1, 0.4, 0.5], size=poses.shape[:-1])
    poses[(poses[..., -1] == 0) & (rng.random(poses.shape[:-1]) < 0.5), :-1] = np.nan
    return poses.astype(np.float32)


def page_data(page, name):
    """What the page's script holds under a name; the values stand on one line, `a = {...}, b = {...}, c = [...];`."""
    (line,) = re.findall(r"^const skeleton = .*;$", page, re.MULTILINE)
    text = line[line.index(f"{name} = ") + len(name) + 3 :]
    return json.JSONDecoder().raw_decode(text)[0]


def unpack_poses(text, frames, keypoints=133):
    """Positions (T, N, 2) in steps and confidences (T, N), 0 where a keypoint is absent."""
    planes = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    count = keypoints * 2 * frames
    differences = np.stack([planes[:count], planes[count : 2 * count]], -1).copy().view("<i2")
    points = differences.reshape(keypoints, 2, frames).cumsum(-1, dtype=np.int16).transpose(2, 0, 1)
    return points, planes[2 * count :].reshape(keypoints, frames).T
