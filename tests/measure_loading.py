"""How much memory each of torchrun's processes takes to load a model: sharded or whole, its FOLDER, OUT for a file a process,
and another model's folder to begin with, since what a first time takes (libraries, groups) is not the model's.

What is counted is memory of the process's own (RssAnon); pages of the file are the system's, which gives them back.
"""

import json
import os
import sys
import threading
from pathlib import Path

import torch.distributed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prlhf.backbone.loading import load_backbone
from prlhf.backbone.toys import byte_tokenizer
from prlhf.config import load as config
from prlhf.parallel.shard import training_model


def own_bytes() -> int:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """Within the context the most that this process holds is kept in `growth`, less what it held before."""

    def __enter__(self) -> "Peak":
        self.before, self.growth, self.over = own_bytes(), 0, threading.Event()
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.001):
            self.growth = max(self.growth, own_bytes() - self.before)

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.watcher.join()
        self.growth = max(self.growth, own_bytes() - self.before)


def sharded(folder: str) -> object:
    """The model, each process its shards."""
    return training_model(
        config.load_config(None, [f"model.name={folder}", "user_model.tokens=2"]), byte_tokenizer(), 2, "cpu"
    )


def whole(folder: str) -> object:
    """All weights in each process."""
    backbone = load_backbone(config.load_config(None, [f"model.name={folder}"]).model, byte_tokenizer(), 0)
    return [p.detach().clone() for p in backbone.parameters()]


def main() -> None:
    how, folder, out, small = sys.argv[1:]
    load = {"sharded": sharded, "whole": whole}[how]
    torch.distributed.init_process_group("gloo")
    load(small)
    with Peak() as peak:
        model = load(folder)
    del model
    Path(out, f"{how}-{os.environ['RANK']}.json").write_text(json.dumps(peak.growth))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
