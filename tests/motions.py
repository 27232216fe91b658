"""Small motion capture files for tests: a hip, an arm and a hand in BVH, a hip, a leg and a foot in ASF and AMC."""

from pathlib import Path

import numpy as np

BVH = """HIERARCHY
ROOT hips
{
  OFFSET 0 0 0
  CHANNELS 6 Xposition Yposition Zposition Zrotation Yrotation Xrotation
  JOINT arm
  {
    OFFSET 0 2 0
    CHANNELS 3 Yrotation Xrotation Zrotation
    JOINT hand
    {
      OFFSET 1 0 0.5
      CHANNELS 3 Zrotation Yrotation Xrotation
      End Site
      {
        OFFSET 0 1 0
      }
    }
  }
}
MOTION
Frames: 3
Frame Time: 0.04
"""

ASF = """# a skeleton
:version 1.10
:name body
:units
  mass 1.0
  length 0.45
  angle deg
:documentation
   made up
:root
   order TX TY TZ RX RY RZ
   axis XYZ
   position 0 0 0
   orientation 0 0 0
:bonedata
  begin
     id 1
     name hip
     direction 0.6 -0.8 0
     length 2.5
     axis 0 0 20 XYZ
  end
  begin
     id 2
     name leg
     direction 0 -1 0
     length 7
     axis 10 20 30 XYZ
    dof rx ry rz
    limits (-160.0 20.0)
           (-70.0 70.0)
           (-60.0 70.0)
  end
  begin
     id 3
     name foot
     direction 0 0 1
     length 3
     axis -40 5 60 ZYX
    dof rx rz
    limits (-45.0 90.0)
           (-45.0 90.0)
  end
:hierarchy
  begin
    root hip
    hip leg
    leg foot
  end
"""


def write_bvh(path: Path, values: np.ndarray) -> None:
    """A BVH file of frames of 12 numbers."""
    path.write_text(BVH + "\n".join(" ".join(map(str, row)) for row in values.tolist()) + "\n")


def write_amc(folder: Path, values: np.ndarray) -> Path:
    """An AMC file of frames of 11 numbers, and its skeleton."""
    (folder / "01.asf").write_text(ASF)
    lines = ["#!OML:ASF x", ":FULLY-SPECIFIED", ":DEGREES"]
    for number, row in enumerate(values.tolist(), 1):
        parts = {"root": row[:6], "leg": row[6:9], "foot": row[9:]}
        lines += [str(number), *(f"{name} {' '.join(map(str, own))}" for name, own in parts.items())]
    (folder / "01_02.amc").write_text("\n".join(lines) + "\n")
    return folder / "01_02.amc"
