"""Run train.py for each line of arguments in a file, one after the other, in this process (one of those of torchrun)."""

import json
import os
import sys
from pathlib import Path

import torch.distributed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prlhf.errors import run_command
from prlhf.parallel import tensors
from prlhf.train import __main__ as train

tensors.FILE_BYTES = 50_000  # so that checkpoints have several files a process


def main() -> None:
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = ["train.py", *arguments]
        train.main()
    if torch.distributed.is_initialized():  # left to the interpreter's end, gloo's threads abort it now and then
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
