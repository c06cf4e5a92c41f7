"""Train, resume, evaluate and generate on a pretended GPU; what happened, as JSON on the last line.

    python tests/gpu/pretended_run.py OUT [--stop-at=N] [--plant=FAULT] [key=value ...]

In a process of its own, since it changes torch. With a planted fault it ends with that fault's message.
"""

import contextlib
import json
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import pretend
import torch

import prlhf.backbone.attention as attention
import prlhf.evaluate.__main__ as evaluate
import prlhf.evaluate.held_out as held_out
import prlhf.generate.__main__ as generate
import prlhf.generate.decode as decode
import prlhf.method.models as models
import prlhf.score.agreement as agreement
import prlhf.store.final as final
import prlhf.train.__main__ as train
import prlhf.train.loop as loop
import prlhf.train.row_adamw as row_adamw
import prlhf.train.step as step
from prlhf.batch.trees import ReadingBatch

SMALL = (
    "train.log_every=1", "train.save_every=1", "data.limit=12", "data.valid_limit=4", "optim.batch_size=6", "optim.micro_batch_size=3",
    "model.width=32", "model.heads=2", "optim.max_steps=3", "device=cuda",
)  # fmt: skip


def positions_stay(batch, device):
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    own = ("positions_RT",)
    return replace(
        batch, **{n: t.to(device) for n, t in tensors.items() if isinstance(t, torch.Tensor) and n not in own}
    )


def vectors_not_cast(model, batch, at_N, mask=None):
    embeddings_RTD = model.backbone.get_input_embeddings()(batch.input_ids_RT)
    vectors_ND = model.user_model(batch.users_S).flatten(0, 1)
    flat_ND = embeddings_RTD.flatten(0, 1).index_copy(0, batch.vectors_at_SU.flatten(), vectors_ND)
    return model.states(flat_ND.view_as(embeddings_RTD), model.compute.attention_mask(batch), batch.positions_RT)


# Faults that a GPU would show and a CPU does not, but the fourth: where, what, in place of what.
FAULTS = {
    "reference": (step, "moved", lambda tensors, device: list(tensors)),
    "rows": (row_adamw, "flat", lambda table: table.view(len(table), -1).cpu()),
    "positions": (ReadingBatch, "to", positions_stay),
    "types": (models.PersonalizedModel, "states_at", vectors_not_cast),
    "mask": (
        models,
        "attention_mask",
        lambda batch: attention.tree_mask(batch.seen_until_RT.cpu()),
    ),
}


@contextlib.contextmanager
def as_it_is(model):
    """In place of `in_float32`, which sets `.data`: a wrapper does not survive that."""
    dtype = model.backbone.get_input_embeddings().weight.dtype
    yield agreement.AGREEMENT if dtype.itemsize > 2 else agreement.HALF_AGREEMENT * torch.finfo(dtype).eps


def command(main, *arguments) -> None:
    sys.argv = ["command", *map(str, arguments)]
    main()


def main() -> None:
    out, *keys = sys.argv[1:]
    options = dict(key[2:].split("=", 1) for key in keys if key.startswith("--"))
    keys = [key for key in keys if not key.startswith("--")]
    torch.set_num_threads(1)
    os.chdir(ROOT)
    for module in (train, held_out, generate, final):
        if hasattr(module, "choose_device"):
            module.choose_device = lambda name: "cuda" if name in ("auto", "cuda") else "cpu"
    agreement.in_float32 = decode.in_float32 = as_it_is
    if options.get("plant") == "mask":
        models.PersonalizedModel.__init__.__globals__["Computation"].__new__.__defaults__ = (FAULTS["mask"][2], None)
    elif "plant" in options:
        setattr(*FAULTS[options["plant"]])
    take_step, found = loop.take_step, {}
    with pretend.pretended_gpu() as counts:

        def counted(*arguments):
            if arguments[3] == int(options.get("stop-at", -1)):
                raise KeyboardInterrupt
            counts.clear()
            taken = take_step(*arguments)
            for name in ("blocking", "flowing", "waits"):
                found[name] = dict(+getattr(counts, name))
            found["ops"] = sorted(counts.ops)
            return taken

        loop.take_step = counted
        arguments = ("--config", "configs/tiny.yaml", "--set", f"run_dir={out}", *SMALL, *keys)
        if "stop-at" in options:
            try:
                command(train.main, *arguments)
            except KeyboardInterrupt:
                options.pop("stop-at")
        command(train.main, *arguments)
        command(evaluate.main, "--checkpoint", out)
        if not any(key in ("method=prm", "method=pairwise") for key in keys):
            prompts = Path(out) / "prompts.jsonl"
            prompts.write_text('{"prompt": "what is rain?"}\n{"prompt": "hello"}\n')
            for name in ("generate", "check_decoding"):  # inference mode allows no wrappers' views
                if hasattr(generate, name):
                    setattr(generate, name, torch.no_grad()(getattr(generate, name).__wrapped__))
            more = ("--max-new-tokens", 6, "--temperature", 0.7, "--top-p", 0.9)
            command(
                generate.main,
                "--checkpoint",
                out,
                "--prompts",
                prompts,
                "--users",
                "@all",
                "--out",
                Path(out) / "r.jsonl",
                *more,
            )
    rows = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
    print(json.dumps({"losses": [row["loss"] for row in rows], **found}))


if __name__ == "__main__":
    main()
