"""What a chat template can be told by `chat_template_kwargs`, read off its syntax tree; nothing is rendered here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from lorafocal.errors import InputError

# Arguments of apply_chat_template that are lists a template may write into the prompt, so a user may give them.
WRITTEN_LISTS = {"tools", "documents"}
OURS = (
    {"messages", "raise_exception", "strftime_now", "namespace", "dict", "range", "loop"}
    | set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    | set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES)
) - WRITTEN_LISTS


class _GenerationBlocks(Extension):
    """`{% generation %}` of transformers, which marks the assistant's words: here only its inside counts."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own way to declare them

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_PARSER = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
)


def template_text(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    """The template that renders with these options (a tokenizer may hold another one for tools)."""
    if not tokenizer.chat_template:
        raise InputError(
            "a conversation needs a chat template and this tokenizer has none; use an instruction-tuned model's "
            "tokenizer, set tokenizer.chat_template, or give plain strings"
        )
    try:
        return str(tokenizer.get_chat_template(tools=options.get("tools")))
    except ValueError as error:
        raise InputError("this tokenizer has several chat templates and no default; set tokenizer.chat_template") from (
            error
        )


def parsed(template: str) -> nodes.Template:
    """The syntax tree."""
    try:
        return _PARSER.parse(template)
    except TemplateSyntaxError as error:
        raise InputError(f"the chat template is not valid Jinja (line {error.lineno}: {error.message})") from error


_ASKS_WHETHER_SET = ("defined", "undefined", "default", "d")


@lru_cache(maxsize=8)
def variables(template: str) -> frozenset[str]:
    """What a template reads from outside: names it never sets, or looks whether they are set.

    A name that a template sets before it reads it is its own, and giving it from outside would change nothing.
    """
    tree = parsed(template)
    names = list(tree.find_all(nodes.Name))
    own = {name.name for name in names if name.ctx != "load"}
    questions = [(find.node, find.name) for find in tree.find_all((nodes.Test, nodes.Filter))]
    asked = {node.name for node, how in questions if isinstance(node, nodes.Name) and how in _ASKS_WHETHER_SET}
    return frozenset(name for name in find_undeclared_variables(tree) if name not in own or name in asked) - OURS


def check_options(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
    """Refuses options that the template would not see, or that are not the user's to set."""
    for name in options:
        if name in OURS:
            raise InputError(f"chat_template_kwargs: `{name}` is set for every rendering; leave it out")
    known = variables(template_text(tokenizer, options)) if options else frozenset()
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)
            way_out = f"it reads {', '.join(near)}" if near else "it reads none: leave chat_template_kwargs out"
            raise InputError(f"chat_template_kwargs: the chat template does not read `{name}`; {way_out}")


def writes_now(template: str, rendered: str) -> bool:
    """Whether a rendering holds the present date or time as the template formats it."""
    return any(datetime.now().strftime(written) in rendered for written in clock_formats(template))


@lru_cache(maxsize=8)
def clock_formats(template: str) -> frozenset[str]:
    """The formats in which a template may write the present date or time."""
    return frozenset(
        argument.value
        for call in parsed(template).find_all(nodes.Call)
        if isinstance(call.node, nodes.Name) and call.node.name == "strftime_now"
        for argument in call.args
        if isinstance(argument, nodes.Const)
    )
