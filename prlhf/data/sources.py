"""The raw files of the papers' data sets: origin, licence, and their folder on this machine."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from prlhf.errors import UserError, did_you_mean, expanded

TLDR_FILES = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons"


class Source(NamedTuple):
    """The origin of a data set: either `urls`, or those files of a Hub data set `repository` that match a pattern.

    All files lie side by side in one folder, under their own names, without the folders they have at their origin.
    """

    title: str
    page: str  # for people
    licence: str
    needs: str = ""  # what a gated data set asks of its user before a download
    urls: Mapping[str, str] = {}  # by the file's name here
    repository: str = ""
    patterns: tuple[str, ...] = ()
    unpack: tuple[str, ...] = ()  # which members of the zip archives among `urls` (PurePath.match)


SOURCES: dict[str, Source] = {
    "tldr": Source(
        title="TL;DR comparisons of summaries (openai/summarize_from_feedback)",
        page="https://github.com/openai/summarize-from-feedback",
        licence="modified MIT",
        urls={f"batch{n}.json": f"{TLDR_FILES}/batch{n}.json" for n in (*range(3, 21), 22)},
    ),
    "prism": Source(
        title="The PRISM Alignment Dataset (HannahRoseKirk/prism-alignment)",
        page="https://huggingface.co/datasets/HannahRoseKirk/prism-alignment",
        licence="text by people CC BY 4.0, model responses CC BY-NC 4.0",
        repository="HannahRoseKirk/prism-alignment",
        patterns=("survey.jsonl", "conversations.jsonl"),
    ),
    "psoups": Source(
        title="Personalized Soups (joeljang/RLPHF)",
        page="https://github.com/joeljang/RLPHF",
        licence="none stated; ask the authors before you share it",
        urls={"data.zip": "https://storage.googleapis.com/personalized-soups/data.zip"},
        unpack=("rm_training/*.json", "koala_eval_50*.json"),
    ),
    "persona": Source(
        title="PERSONA (SynthLabsAI/PERSONA)",
        page="https://huggingface.co/datasets/SynthLabsAI/PERSONA",
        licence="CC BY-NC-SA 4.0",
        needs="accept its terms on https://huggingface.co/datasets/SynthLabsAI/PERSONA, logged in; then `hf auth login` "
        "with the same account, or HF_TOKEN set to a token of it that may read gated repositories",
        repository="SynthLabsAI/PERSONA",
        patterns=("*.parquet",),
    ),
    "multipref": Source(
        title="MultiPref (allenai/multipref)",
        page="https://huggingface.co/datasets/allenai/multipref",
        licence="ODC-By",
        repository="allenai/multipref",
        patterns=("MultiPref-Train.jsonl",),  # its parquet files hold the same rows again, and derived sets
    ),
}
MADE_OF = {"tldr_length": "tldr"}  # data sets that are made of another one's raw files
DATA_SETS = (*SOURCES, *MADE_OF)


def source_name(name: str) -> str:
    """The source of a data set's raw files. UserError, with a near match and all names, for an unknown data set."""
    source = MADE_OF.get(name, name)
    if source not in SOURCES:
        hint = did_you_mean(name, DATA_SETS)
        raise UserError(f"found {name!r}{hint}, expected the name of a data set: {', '.join(DATA_SETS)}")
    return source


def cache_dir() -> Path:
    """$PRLHF_CACHE, or ~/.cache/prlhf. UserError where neither it nor HOME is set."""
    return expanded(os.environ.get("PRLHF_CACHE") or "~/.cache/prlhf", instead="PRLHF_CACHE")


def raw_folder(name: str) -> Path:
    """The default folder of a data set's raw files, for `fetch` and for the reader."""
    return cache_dir() / "data" / name
