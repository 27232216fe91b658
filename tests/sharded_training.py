"""training/train.py with FSDP on a CPU, for tests/test_ranks.py.

accelerate 1.15 shards models on accelerators alone, and takes ranks on a CPU for DDP, whatever its configuration says.
Here it takes them for ranks on GPUs.
"""

import runpy
import sys
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from runs import TRAIN

start = PartialState.__init__


def start_as_on_gpus(self: PartialState, *arguments: Any, **options: Any) -> None:
    start(self, *arguments, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = start_as_on_gpus
    sys.exit(runpy.run_path(str(TRAIN))["main"](sys.argv[1:]))
