"""Random changes to normalised pose sequences, as other signers, cameras and pose estimators would make them.

Each change is a function of its own, given what was drawn; `PoseAugmentation` draws. Letters: T frames, N keypoints,
D values per keypoint (confidence last). The origin of normalised poses is the midpoint of the shoulders and their
distance is 1; missing keypoints (confidence 0) are all zeros and stay so.
"""

from collections.abc import Sequence

import numpy as np

from .formats import sample_frames
from .skeleton_pose_tokenizer import Skeleton


class PoseAugmentation:
    """Draws and applies changes to one sequence; 0 turns a change off.

    Args:
        skeleton: The layout of the poses.
        flip: Probability of a mirror image, with left and right exchanged.
        rotation: Largest turn in the image plane, in degrees.
        scale: Largest relative change of size: 0.1 gives sizes from 1 / 1.1 to 1.1.
        translation: Largest shift along x and y, in shoulder widths.
        noise: Standard deviation of noise on the coordinates, in shoulder widths.
        missing: Probability, for each hand, to be missing for a while, at most half of the frames. A layout without
            hands loses part nodes instead.
        speed: Largest relative change of speed, as for `scale`. It changes the number of frames.

    Raises:
        ValueError: A value is out of its range.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        flip: float = 0.5,
        rotation: float = 5.0,
        scale: float = 0.1,
        translation: float = 0.05,
        noise: float = 0.0,
        missing: float = 0.02,
        speed: float = 0.1,
    ) -> None:
        amounts = {"rotation": rotation, "scale": scale, "translation": translation, "noise": noise, "speed": speed}
        for name, value in {"flip": flip, "missing": missing, **amounts}.items():
            most = np.inf if name in amounts else 1.0
            if not 0 <= value <= most:
                raise ValueError(f"{name} is {value}, expected 0 to {most}.")
        self.flip = flip
        self.rotation = rotation
        self.scale = scale
        self.translation = translation
        self.noise = noise
        self.missing = missing
        self.speed = speed
        self._permutation = np.array(skeleton.flip_permutation)
        hands = [keypoints for group, keypoints in skeleton.group_keypoints.items() if group.endswith("_hand")]
        self._droppable = hands or list(skeleton.part_keypoints)

    @property
    def max_speed(self) -> float:
        """Frames that the fastest change of speed takes for each frame that it gives."""
        return 1.0 + self.speed

    def __call__(
        self, poses: np.ndarray, mask: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns changed copies of poses (T, N, D) and mask (T,); another speed gives another T."""
        if self.speed:
            poses, mask = change_speed(poses, mask, _draw_factor(self.speed, generator))
        if generator.random() < self.flip:
            poses = mirror(poses, self._permutation)
        degrees, shift = generator.uniform(-1, 1) * self.rotation, generator.uniform(-1, 1, 2) * self.translation
        poses = transform(poses, degrees, _draw_factor(self.scale, generator), shift)
        if self.noise:
            poses = add_noise(poses, self.noise, generator)
        for keypoints in self._droppable:
            if generator.random() < self.missing:
                frames = int(generator.integers(1, max(1, len(poses) // 2), endpoint=True))
                start = int(generator.integers(0, len(poses) - frames, endpoint=True))
                poses = drop(poses, keypoints, start, start + frames)
        return poses, mask


def _draw_factor(largest: float, generator: np.random.Generator) -> float:
    """A factor between 1 / (1 + largest) and 1 + largest, as often below 1 as above."""
    return float((1.0 + largest) ** generator.uniform(-1, 1))


def mirror(poses: np.ndarray, permutation: Sequence[int] | np.ndarray) -> np.ndarray:
    """The mirror image about x = 0; each keypoint takes the place of its partner. It is its own inverse."""
    poses = poses[:, permutation]
    poses[..., 0] *= -1
    return poses


def transform(poses: np.ndarray, degrees: float, scale: float, shift: Sequence[float] | np.ndarray) -> np.ndarray:
    """Turns about the origin in the image plane (x towards y), scales all coordinates, then shifts along x and y."""
    angle = np.deg2rad(degrees)
    points = poses[..., :-1] * np.float32(scale)
    x, y = points[..., 0].copy(), points[..., 1].copy()
    points[..., 0] = x * np.cos(angle) - y * np.sin(angle) + shift[0]
    points[..., 1] = x * np.sin(angle) + y * np.cos(angle) + shift[1]
    return _with_points(poses, points)


def add_noise(poses: np.ndarray, deviation: float, generator: np.random.Generator) -> np.ndarray:
    """Adds normal noise to the coordinates."""
    noise = generator.standard_normal(poses[..., :-1].shape, dtype=np.float32)
    return _with_points(poses, poses[..., :-1] + np.float32(deviation) * noise)


def drop(poses: np.ndarray, keypoints: Sequence[int], start: int, stop: int) -> np.ndarray:
    """Makes keypoints missing in frames `start` to `stop`."""
    poses = poses.copy()
    poses[start:stop, list(keypoints)] = 0
    return poses


def change_speed(poses: np.ndarray, mask: np.ndarray, speed: float) -> tuple[np.ndarray, np.ndarray]:
    """Plays a sequence faster (`speed` > 1, fewer frames) or slower: T' = floor((T - 1) / speed) + 1 frames."""
    return sample_frames(poses, mask, np.arange(int((len(poses) - 1) / speed) + 1) * speed)


def _with_points(poses: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The poses with other coordinates (T, N, D - 1), those of missing keypoints still 0."""
    points = np.where(poses[..., -1:] > 0, points, 0)
    return np.concatenate([points, poses[..., -1:]], -1).astype(poses.dtype)
