"""YAML as people expect it: 5e-6 is a number, `no` is a word (YAML 1.2), no duplicate keys, no aliases."""

from __future__ import annotations

import re
from typing import Any

import yaml

from lorafocal.errors import InputError

_NULL = (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_BOOL = (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_INT = (re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_FLOAT = (
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


class _Loader(yaml.SafeLoader):
    """Safe loader with the scalars of YAML 1.2's core schema; PyYAML's own are those of YAML 1.1."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's way: start from none, not from 1.1's

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise _error("an alias (*name) is not allowed; write the value again", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise _error(f"the key {key!r} is not a word", key_node.start_mark)
            if key in seen:
                raise _error(f"the key {key!r} is given twice, first in line {seen[key]}", key_node.start_mark)
            seen[key] = line
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float:
        text = self.construct_scalar(node)
        if node.tag.endswith(":int"):
            return int(text)
        return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""


for _tag, (_pattern, _first) in {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def parse_yaml(text: str, *, source: str) -> Any:
    """The plain values (dict, list, str, int, float, bool, None) in one YAML document.

    `source` names the text in errors. Raises `InputError` with the line for bad YAML, duplicate keys, tags
    that would build objects, and aliases.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{source}{where}: {', '.join(filter(None, (error.context, error.problem)))}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{source}: {error}") from None
    except RecursionError:
        raise InputError(
            f"{source}: lists or mappings stand in each other too deep to be read; a config has a few levels"
        ) from None


def dump_yaml(values: Any) -> str:
    """YAML text of plain values, in their order, that both YAML 1.1 and 1.2 readers understand alike."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def _error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
