"""The door to the alpaca-eval package: quiet, leaving the process as it was, and its arithmetic for our rows.

Importing the package sets the root logger's level and reads a `.env` file into the environment; using it logs what
the judge wrote, switches scikit-learn's metadata routing on for good, and looks for a file on the hub.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lorafocal.errors import InputError

if TYPE_CHECKING:
    import pandas

HUB_DATASET = "tatsu-lab/alpaca_eval"
GLM = "length_controlled_v1"  # the regression of the leaderboard
GAMED_FILE, REFERENCE_FILE = "df_gamed.csv", "alpaca_eval_gpt4_baseline.json"
_NUMBERS, _FLAGS, _ANY = "iuf", "b", ""  # numpy's kinds
_GAMED_COLUMNS = {
    "model": _ANY,
    "index": _NUMBERS,
    "preference": _NUMBERS,
    "std_delta_len": _NUMBERS,
    "instruction_difficulty": _NUMBERS,
    "not_gamed_baseline": _FLAGS,
}


@contextmanager
def alpaca_eval() -> Iterator[ModuleType]:
    """The package, silent while the block lasts; logging and warnings are as before when it ends."""
    root = logging.getLogger()
    level, handlers, disabled = root.level, root.handlers[:], root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield _package()
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers


def _package() -> ModuleType:
    environment = set(os.environ)
    try:
        import alpaca_eval.annotators
        import alpaca_eval.metrics
    except ImportError as error:
        raise InputError(
            f"AlpacaEval is computed by the alpaca-eval package, which cannot be imported ({error}):"
            " pip install 'lorafocal[eval]'"
        ) from error
    finally:
        for name in set(os.environ) - environment:
            del os.environ[name]
    return alpaca_eval


def hub_file(name: str) -> Path | None:
    """A file of AlpacaEval's data set, where the hub's cache on this machine has it; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(HUB_DATASET, name, repo_type="dataset")
    return Path(found) if isinstance(found, str) else None


def how_to_fetch(name: str) -> str:
    """The command that brings such a file into the hub's cache."""
    return f"`hf download {HUB_DATASET} {name} --repo-type dataset`"


def win_rates(frame: pandas.DataFrame) -> Mapping[str, float]:
    """The package's `get_winrate`: `win_rate`, `standard_error` and `discrete_win_rate` in percent, `n_wins`...

    `frame` has a column `preference`: 1 (the reference is better) to 2 (the model is), NaN where nothing was judged.
    """
    with alpaca_eval() as package:
        found = package.metrics.get_winrate(frame)
    return {name: float(value) for name, value in found.items()}


def length_controlled(frame: pandas.DataFrame, gamed: Path) -> float:
    """The package's `get_length_controlled_winrate`, in percent, with the file `gamed` instead of the hub's.

    The regression looks up a prompt's difficulty by the row's index, which has to be the prompt's position in
    AlpacaEval's own order: rows that are merely there in another order would get other prompts' difficulties. `gamed`
    has passed `check_gamed`.
    """
    with alpaca_eval() as package, _given(gamed), _sklearn_config():
        found = package.metrics.get_length_controlled_winrate(
            frame, glm_name=GLM, save_weights_dir=None, is_add_glm_preference_inplace=False
        )
    return float(found["length_controlled_winrate"])


@contextmanager
def _given(gamed: Path) -> Iterator[None]:
    """The package asks the hub for `df_gamed.csv` and takes no path: for one call, its question has our answer."""
    from alpaca_eval.metrics import glm_winrate

    original = glm_winrate.hf_hub_download
    glm_winrate.hf_hub_download = lambda **_: str(gamed)
    try:
        yield
    finally:
        glm_winrate.hf_hub_download = original


@contextmanager
def _sklearn_config() -> Iterator[None]:
    from sklearn import config_context

    with config_context():
        yield


def check_gamed(path: Path, prompts: int) -> None:
    """Raises InputError where `path` is no df_gamed.csv, or one of another number of prompts."""
    import pandas

    try:
        table: Any = pandas.read_csv(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): {how_to_fetch(GAMED_FILE)} brings it into the hub's cache,"
            " where it is found without --gamed"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} cannot be read as {GAMED_FILE} ({error})") from error
    wanted = f"{HUB_DATASET}'s {GAMED_FILE} on the hub has it"
    for name, kinds in _GAMED_COLUMNS.items():
        if name not in table:
            raise InputError(f"{path} has no column {name}: {wanted}")
        if kinds and table[name].dtype.kind not in kinds:
            raise InputError(f"{path}: column {name} holds values of another kind: {wanted}")
    known = table.drop_duplicates("index")["instruction_difficulty"].dropna().index  # as the regression looks it up
    if [*known] != [*range(prompts)]:
        raise InputError(
            f"{path.name} has the difficulties of {len(known)} prompts by their position, and there are {prompts}"
            " prompts here: give a --reference that holds all of its prompts, in its order"
        )
