"""What a folder made for others may consist of, by name: all else is a stranger, and is never published unread."""

from __future__ import annotations

import re
from pathlib import Path

from lorafocal.card import CARD_FILE
from lorafocal.errors import InputError
from lorafocal.lineage import LINEAGE_FILE
from lorafocal.release import verify
from lorafocal.release.verify import PAIRS

_WEIGHTS = re.compile(
    r"(model|adapter_model)\.safetensors|model-\d{5}-of-\d{5}\.safetensors|[\w-][\w.-]*\.gguf"  # gguf: the user's name
)
_PAPERS = f"{CARD_FILE} {LINEAGE_FILE} merge.json gate.json manifest.json quantize.json".split()
_MODEL = (
    "config.json generation_config.json adapter_config.json model.safetensors.index.json chat_template.jinja"
    " tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model vocab.json"
    " merges.txt preprocessor_config.json processor_config.json video_preprocessor_config.json"
).split()
_NAMES = frozenset((*_PAPERS, *_MODEL))
_PARTS = ("adapter", "merged")  # the folders of a bundle
_TEMPLATES = "additional_chat_templates"  # of a tokenizer that has several
_FOLDERS = (*_PARTS, _TEMPLATES, *(f"{part}/{_TEMPLATES}" for part in _PARTS))
_SCRIPT = "verify.py"


def published_files(folder: Path, *, with_pairs: bool = False) -> tuple[dict[str, Path], list[str]]:
    """The files of `folder` to publish, by their path in it, and the pairs that stay here unless `with_pairs`.

    Raises InputError where the folder holds anything else (hidden files, links, state, data, other code), no weights,
    or both an adapter's and a model's configuration beside each other (row 52).
    """
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(f"{folder} is no folder; name what `lorafocal export` wrote")
    if strange := strangers(folder):
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        raise InputError(
            f"{folder} holds {', '.join(strange[:5])}{more}, which no export writes, and nothing is pushed unread:"
            " move these away, or export into a new folder and push that"
        )
    files = files_in(folder)
    if not any(_WEIGHTS.fullmatch(path.name) for path in files.values()):
        raise InputError(f"{folder} holds no weights; name a folder that `lorafocal export` or `merge` wrote")
    if {"config.json", "adapter_config.json"} <= files.keys():
        raise InputError(
            f"{folder} has config.json and adapter_config.json in one folder, which loaders take for one or the other:"
            " publish the adapter and the model apart, or as a bundle"
        )
    kept = [PAIRS] if PAIRS in files and not with_pairs else []
    return {name: path for name, path in files.items() if name not in kept}, kept


def strangers(folder: Path) -> list[str]:
    """What lies under `folder` and is nothing that an export or a merge writes."""
    return [name for name, path in _places(folder).items() if not _belongs(name, path)]


def files_in(folder: Path) -> dict[str, Path]:
    """Every file under `folder`, by its path in it."""
    return {name: path for name, path in _places(folder).items() if path.is_file()}


def _places(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}


def _belongs(name: str, path: Path) -> bool:
    """Whether an export may have written it. A link never belongs: what it leads to is not in the folder."""
    parent, _, leaf = name.rpartition("/")
    if path.is_symlink():
        return False
    if path.is_dir():
        return name in _FOLDERS
    if name == _SCRIPT:  # strangers are told to run it
        return path.read_bytes() == Path(verify.__file__).read_bytes()
    if parent.endswith(_TEMPLATES):
        return path.is_file() and parent in _FOLDERS and leaf.endswith(".jinja")
    known = leaf in _NAMES or _WEIGHTS.fullmatch(leaf) is not None
    return path.is_file() and (name == PAIRS or (parent in ("", *_PARTS) and known))
