"""Which line of defence each test stands for: the guards, and how to take one away.

A guard is the code that keeps a known trap shut (a row of the pitfalls or feasibility tables). `make guards`
takes the guards away one by one and sees the named test fail; a test that still passes proves nothing.

To add one, append a line to `GUARDS`:

    Guard("11", "lorafocal.objectives.focal:focalpo", lambda original: naive, "tests/test_x.py::test_y"),

- rows: the rows it belongs to, separated by spaces; the test carries the same rows in its `row` marker.
- target: `module:attribute`, the attribute may be dotted (`Class.method`).
- replacement: gets the original, returns what stands in its place: what a careless author would have written.
- test: a pytest node id, without parameters if any failing case will do.
"""

# ruff: noqa: E501 - one guard a line

from __future__ import annotations

import contextlib
import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT_KEY = "LORAFOCAL_TEST_GUARD_OFF"

# The rows this project answers for so far. P0: wrong results, silently.
P0_ROWS = (
    "F1 F2 F3 F6 F11 F12 F13 F18 1 2 3 4 6 11 12 13 14 15 19 20 21 23 24 25 27 36 39 41 43 45 47 53 54 55 56 64"
).split()
OTHER_ROWS = "F9 F14 F19 7 8 10 22 32 51 52 57 63".split()


@dataclass(frozen=True, slots=True)
class Guard:
    rows: str
    target: str
    replacement: Callable[[Any], Any]
    test: str

    @property
    def name(self) -> str:
        """What `--guard-off` takes: the rows and the attribute, for example `11:focalpo`."""
        return f"{self.rows.replace(' ', '+')}:{self.target.partition(':')[2]}"


def _repeating_pairs(sampler: Any) -> Iterator[list[int]]:
    """As accelerate evens ragged batches out: what is missing is taken from the start again."""
    for start in range(0, sampler.num_pairs, sampler.pairs_per_step):
        step = [n % sampler.num_pairs for n in range(start, start + sampler.pairs_per_step)]
        yield step[sampler.rank :: sampler.world]


# fmt: off
GUARDS: list[Guard] = [
    # order of pairs, steps of several packs, several processes
    Guard("F1", "lorafocal.sampler:StepSampler.__iter__", lambda _: _repeating_pairs, "tests/test_sampler.py::test_over_all_ranks_every_pair_of_an_epoch_is_seen_exactly_once"),
    Guard("F2", "lorafocal.trainer:_SetEpoch.on_epoch_begin", lambda _: lambda *a, **k: None, "tests/test_packs_of_a_step.py::test_every_epoch_trains_each_pair_once_in_another_order"),
    Guard("F3", "accelerate.state:GradientState._set_sync_gradients", lambda _: lambda *a: None, "tests/test_packs_of_a_step.py::test_engines_are_told_of_the_last_backward_and_the_optimiser_steps_once"),
    Guard("F3", "accelerate:Accelerator.no_sync", lambda _: lambda *a: contextlib.nullcontext(), "tests/engine/test_data_parallel.py::test_gradients_are_exchanged_once_and_the_optimiser_steps_once_a_step"),
    Guard("57", "lorafocal.trainer:set_seed", lambda _: lambda seed: None, "tests/test_run.py::test_a_run_of_the_same_config_gives_the_same_adapter"),
    # what is trained, and whether it learns
    Guard("2 3", "lorafocal.model.adapters:check_trainable", lambda _: lambda model: {n: p for n, p in model.named_parameters() if "lora_" in n}, "tests/test_trainer.py::test_a_frozen_adapter_is_refused"),
    Guard("2", "lorafocal.health:HealthCheck.on_optimizer_step", lambda _: lambda *a, **k: None, "tests/test_run.py::test_a_rate_that_moves_nothing_stops_the_run"),
    Guard("12", "lorafocal.health:HealthCheck._stop", lambda _: lambda *a: None, "tests/test_trainer.py::test_a_non_finite_loss_stops_the_run_names_the_pair_and_overwrites_nothing"),
    # saving and resuming
    Guard("55", "lorafocal.sampler:shuffled", lambda _: lambda pairs, seed, epoch: random.sample(range(pairs), pairs), "tests/test_killed_runs.py::test_killed_once_and_resumed_it_ends_with_the_same_bits[in step 5, before the third pack]"),
    Guard("47", "lorafocal.tensor_files:check_saved", lambda _: lambda *a, **k: None, "tests/test_checkpoint.py::test_a_bad_adapter_is_refused"),
    Guard("53", "lorafocal.tensor_files:check_keys", lambda _: lambda *a: None, "tests/test_checkpoint.py::test_tensors_are_strict_both_ways_and_nothing_is_half_loaded"),
    Guard("54", "lorafocal.checkpoint:_restore_optimizer", lambda _: lambda *a: None, "tests/test_checkpoint.py::test_interrupted_equals_uninterrupted_bit_for_bit"),
    Guard("55 F9", "lorafocal.publish:published", lambda _: contextlib.contextmanager(lambda target, **_: (target.mkdir(exist_ok=True), (yield target))), "tests/test_publish.py::test_killed_at_every_file_operation_leaves_the_old_or_the_new"),
    Guard("F9", "lorafocal.publish:why_incomplete", lambda _: lambda *a, **k: None, "tests/test_checkpoint_folders.py::test_a_damaged_checkpoint_is_passed_over_with_the_reason"),
    Guard("56", "lorafocal.checkpoint:save_file", lambda _: lambda tensors, path: __import__("torch").save(tensors, path), "tests/test_checkpoint.py::test_interrupted_equals_uninterrupted_bit_for_bit"),
    Guard("51", "lorafocal.model.save:_public_name", lambda _: lambda base: base, "tests/test_run.py::test_no_path_of_this_machine_is_written_but_those_of_the_config"),
    # configs
    Guard("F18", "lorafocal.yaml12:parse_yaml", lambda _: lambda text, **_: __import__("yaml").safe_load(text), "tests/test_yaml12.py::test_floats_without_a_point_are_numbers"),
    Guard("F6", "lorafocal.training_fields:forced_values", lambda _: dict, "tests/test_training_fields.py::test_the_filter_that_hides_nan_is_off"),
    Guard("12", "lorafocal.training_fields:_field_problem", lambda _: lambda *a: None, "tests/test_training_fields.py::test_half_precision_is_refused_with_the_reason"),
    Guard("14", "lorafocal.bounds:check_dropout", lambda _: lambda *a, **k: None, "tests/test_config.py::test_dropout_needs_permission"),
    Guard("32", "lorafocal.config:_training_problems", lambda _: lambda *a: (), "tests/test_config.py::test_unknown_keys_are_answered_with_the_nearest"),
]
# fmt: on


def switch_off(name: str) -> None:
    """Replace the guard's target, also under the names other modules of the package have imported it by."""
    [guard] = [guard for guard in GUARDS if guard.name == name]
    module_name, _, path = guard.target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, attribute)
    replacement = guard.replacement(original)
    setattr(owner, attribute, replacement)
    if callable(original):  # constants such as True are shared by identity with everything else
        for loaded, module in list(sys.modules.items()):
            if loaded.partition(".")[0] == "lorafocal":
                for key in [key for key, value in vars(module).items() if value is original]:
                    setattr(module, key, replacement)


def switch_off_here_and_in_children(name: str) -> None:
    """`switch_off`, here and in every Python process started from here (guard_site/sitecustomize.py)."""
    tests = Path(__file__).resolve().parent
    search_path = [str(tests / "guard_site"), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, search_path))
    os.environ[ENVIRONMENT_KEY] = name
    switch_off(name)
