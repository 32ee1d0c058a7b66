"""What a config and `FocalPOConfig` say of references: defaults, and each mistake by its key."""

from __future__ import annotations

import pytest

from lorafocal.arguments import FocalPOConfig
from lorafocal.config import check_config, training_arguments
from lorafocal.errors import InputError
from lorafocal.references.strategy import misfits, strategy_of, with_defaults
from tests.test_config import VALUES

SEVERAL = {"kind": "several", "members": ["base", "runs/a/adapter"]}


@pytest.mark.parametrize(
    ("given", "filled"),
    [
        ({"kind": "moving"}, {"every": 512, "mixing": 1.0}),
        ({"kind": "moving", "every": 1, "mixing": 0.5}, {"every": 1, "mixing": 0.5}),
        (SEVERAL, {"combine": "harmonic", "weights": "adaptive", "clip": 0.1}),
        (SEVERAL | {"combine": "geometric"}, {"combine": "geometric", "weights": [0.5, 0.5]}),
        ({"kind": "frozen_copy"}, {}),
    ],
)
def test_a_kind_brings_its_defaults(given, filled):
    values = with_defaults(given)
    assert values == given | filled
    assert not [*misfits(values)]


@pytest.mark.parametrize(
    ("given", "key", "said"),
    [
        ({"kind": "adapter"}, "adapter", "needs the folder"),
        ({"kind": "frozen_copy", "adapter": "runs/a/adapter"}, "adapter", "would ignore it"),
        ({"kind": "disabled_adapter", "every": 3}, "every", "kind: moving"),
        ({"kind": "moving", "clip": 0.1}, "clip", "kind: several"),
        ({"kind": "moving", "every": 0}, "every", "1 or more"),
        ({"kind": "moving", "mixing": 0.0}, "mixing", "frozen_copy"),
        ({"kind": "moving", "mixing": 1.1}, "mixing", "above 0 to 1"),
        ({"kind": "several", "members": ["base"]}, "members", "two or more"),
        (SEVERAL | {"weights": [0.5, 0.6]}, "weights", "sum to 1"),
        (SEVERAL | {"weights": [1.0]}, "weights", "2 numbers"),
        (SEVERAL | {"clip": 0.0}, "clip", "MRPO: 0.1"),
        (SEVERAL | {"combine": "geometric", "clip": 0.1}, "clip", "clips nothing"),
        (SEVERAL | {"combine": "geometric", "weights": "adaptive"}, "weights", "combine: harmonic"),
    ],
)
def test_a_mistake_is_told_of_by_its_key_in_a_config_and_in_python(tmp_path, given, key, said):
    assert [name for name, _ in misfits(with_defaults(given))] == [key]
    with pytest.raises(InputError, match=rf"reference\.{key}.*{said}"):
        check_config(VALUES | {"reference": given})
    named = {"reference" if name == "kind" else f"reference_{name}": value for name, value in given.items()}
    with pytest.raises(InputError, match=rf"reference_{key}.*{said}"):
        FocalPOConfig(output_dir=str(tmp_path), use_cpu=True, beta=0.1, **named)


@pytest.mark.parametrize(
    ("objective", "reference", "key", "said"),
    [
        ({"name": "modpo", "beta": 0.1}, {"kind": "disabled_adapter"}, "guide", "needs the folder"),
        ({"name": "dpo", "beta": 0.1}, {"kind": "disabled_adapter", "guide": "a"}, "guide", "would ignore it"),
        ({"name": "sampo", "beta": 0.1}, SEVERAL, "combine", "geometric"),
    ],
)
def test_what_the_objective_leaves_no_room_for_is_told_of(tmp_path, objective, reference, key, said):
    with pytest.raises(InputError, match=rf"reference\.{key}.*{said}"):
        check_config(VALUES | {"objective": objective, "reference": reference})


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "adapter", "adapter": "runs/a/adapter"},
        {"kind": "moving", "every": 1, "mixing": 0.6},
        SEVERAL | {"combine": "geometric", "weights": [0.2, 0.8]},
    ],
)
def test_a_configs_reference_reaches_the_trainer(tmp_path, given):
    config = check_config(VALUES | {"reference": given})
    args = FocalPOConfig(output_dir=str(tmp_path), use_cpu=True, **training_arguments(config))
    assert args.strategy == config.reference.strategy == strategy_of(with_defaults(given))
    assert args.identity_probe == (given["kind"] == "moving")
