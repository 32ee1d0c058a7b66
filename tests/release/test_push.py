"""Push: exactly the allow-list arrives, in one commit, read by nobody unless that was said; or a way out is said.

The client is a stand-in with the signatures of huggingface_hub's, checked against the installed one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from lorafocal.errors import InputError
from lorafocal.release import verify
from lorafocal.release.push import push

REPO = "somebody/model"
BUNDLE = (
    "README.md adapter/README.md adapter/adapter_config.json adapter/adapter_model.safetensors"
    " adapter/chat_template.jinja adapter/lorafocal.json adapter/tokenizer.json adapter/tokenizer_config.json gate.json"
    " manifest.json merged/config.json merged/generation_config.json merged/lorafocal.json merged/merge.json"
    " merged/model-00001-of-00002.safetensors merged/model-00002-of-00002.safetensors"
    " merged/model.safetensors.index.json merged/tokenizer.json verify.py"
).split()


def folder_of(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Path(verify.__file__).read_bytes() if name == "verify.py" else b"x" * 2048)
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "bundle", *BUNDLE, "pairs.jsonl")


def answered(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    """What the client raises for an answer of this status."""
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} Client Error.\nMore words.", response=response)


class Hub:
    """A hub of one repository that records what it is asked; a call named in `errors` raises instead."""

    def __init__(
        self,
        private: bool | None = None,
        files: tuple[str, ...] = (),
        errors: Mapping[str, BaseException] = MappingProxyType({}),
    ) -> None:
        self.private, self.files, self.errors = private, files, errors
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def _called(self, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        bound = inspect.signature(getattr(HfApi, name)).bind(self, *args, **kwargs).arguments
        self.calls.append((name, bound))
        if name in self.errors:
            raise self.errors[name]
        return bound

    def whoami(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        self._called("whoami", *args, **kwargs)
        return {"name": "somebody"}

    def repo_info(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        self._called("repo_info", *args, **kwargs)
        if self.private is None:
            raise answered(404, RepositoryNotFoundError)
        siblings = [SimpleNamespace(rfilename=name) for name in (".gitattributes", *self.files)]
        return SimpleNamespace(private=self.private, sha="c" * 40, siblings=siblings)

    def create_repo(self, *args: Any, **kwargs: Any) -> None:
        self.private = self._called("create_repo", *args, **kwargs)["private"]

    def create_commit(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        bound = self._called("create_commit", *args, **kwargs)
        self.files = tuple(sorted(operation.path_in_repo for operation in bound["operations"]))
        return SimpleNamespace(repo_url=f"https://hub/{bound['repo_id']}")

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def asked(answer: bool = True) -> tuple[list[str], Callable[[str], bool]]:
    """A person who notes the questions and gives one answer."""
    questions: list[str] = []

    def confirm(question: str) -> bool:
        questions.append(question)
        return answer

    return questions, confirm


def yes(_: str) -> bool:
    return True


@pytest.mark.row("S14")
def test_exactly_the_allow_list_arrives_in_one_commit_to_a_new_private_repository(bundle: Path) -> None:
    hub, (questions, confirm) = Hub(), asked()
    assert push(bundle, REPO, api=hub, confirm=confirm) == f"https://hub/{REPO}"
    assert hub.files == tuple(BUNDLE)
    assert hub.private is True
    assert hub.names == ["whoami", "repo_info", "create_repo", "repo_info", "create_commit"]
    assert hub.calls[-1][1]["parent_commit"] == "c" * 40
    [question] = questions
    *listed, kept, last = question.splitlines()
    assert [line.split() for line in listed] == [[name, *(_words(bundle / name))] for name in BUNDLE]
    assert kept.startswith("pairs.jsonl stays here")
    assert last.startswith("push these 19 files,")
    assert last.endswith(f"as the new repository {REPO} (private)?")


def _words(path: Path) -> list[str]:
    return f"{path.stat().st_size / 1024:.1f} KiB".split()


def test_pairs_go_along_only_where_that_is_said(bundle: Path) -> None:
    hub, (questions, confirm) = Hub(), asked()
    push(bundle, REPO, with_pairs=True, api=hub, confirm=confirm)
    assert "pairs.jsonl" in hub.files
    assert "stays here" not in questions[0]


@pytest.mark.row("S14")
@pytest.mark.parametrize(
    "stranger",
    "state/optimizer.safetensors checkpoint-4/adapter/adapter_config.json train.jsonl held_out.jsonl metrics.jsonl"
    " run.log .env .cache/x config.yaml adapter/trainer_state.json adapter/pairs.jsonl merged/modeling_own.py"
    " pytorch_model.bin merged/deeper/config.json adapter/verify.py".split(),
)
def test_a_folder_that_holds_a_stranger_is_refused_by_its_name_before_the_hub_is_asked(
    bundle: Path, stranger: str
) -> None:
    folder_of(bundle, stranger)
    hub = Hub()
    with pytest.raises(InputError, match=f"holds .*{stranger.split('/')[0]}.*new folder"):
        push(bundle, REPO, with_pairs=True, api=hub, confirm=yes)
    assert hub.calls == []


@pytest.mark.row("S14")
def test_a_link_and_another_script_are_strangers(bundle: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    (bundle / "merged" / "vocab.json").symlink_to(secret)
    with pytest.raises(InputError, match=r"holds merged/vocab\.json, which"):
        push(bundle, REPO, api=Hub(), confirm=yes)
    (bundle / "merged" / "vocab.json").unlink()
    (bundle / "verify.py").write_text("import os")
    with pytest.raises(InputError, match=r"holds verify\.py, which"):
        push(bundle, REPO, api=Hub(), confirm=yes)


@pytest.mark.row("52")
def test_an_adapter_beside_a_model_is_refused(tmp_path: Path) -> None:
    names = "config.json model.safetensors adapter_config.json adapter_model.safetensors".split()
    with pytest.raises(InputError, match="one folder, which loaders take for one or the other"):
        push(folder_of(tmp_path / "both", *names), REPO, api=Hub(), confirm=yes)
    adapter = folder_of(tmp_path / "adapter", "adapter_config.json", "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"holds README\.md, config\.json, which this folder has not"):
        push(adapter, REPO, api=Hub(private=True, files=("README.md", "config.json")), confirm=yes)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", folder_of(tmp_path / "papers", "README.md")):
        with pytest.raises(InputError, match=r"no folder|no weights"):
            push(folder, REPO, api=Hub(), confirm=yes)


@pytest.mark.row("S14")
def test_nobody_else_reads_it_unless_that_was_said(bundle: Path) -> None:
    hub = Hub(private=False)
    with pytest.raises(InputError, match="everybody can read it: say --public"):
        push(bundle, REPO, api=hub, confirm=yes)
    assert hub.names == ["whoami", "repo_info"]
    questions, confirm = asked()
    push(bundle, REPO, public=True, api=Hub(private=False), confirm=confirm)
    assert questions[0].endswith(f"as one commit to {REPO} (everybody can read it)?")
    created = Hub()
    push(bundle, REPO, public=True, api=created, confirm=yes)
    assert created.private is False
    with pytest.raises(InputError, match="is private, and --public would not change that"):
        push(bundle, REPO, public=True, api=Hub(private=True), confirm=yes)


def test_a_private_repository_that_turns_out_public_gets_nothing(bundle: Path) -> None:
    class Open(Hub):
        def create_repo(self, *args: Any, **kwargs: Any) -> None:
            super().create_repo(*args, **kwargs)
            self.private = False

    hub = Open()
    with pytest.raises(InputError, match="readable by everybody although a private one was asked for"):
        push(bundle, REPO, api=hub, confirm=yes)
    assert "create_commit" not in hub.names


def test_without_a_yes_nothing_is_made(bundle: Path) -> None:
    hub, (_, confirm) = Hub(), asked(answer=False)
    with pytest.raises(InputError, match="nothing was pushed"):
        push(bundle, REPO, api=hub, confirm=confirm)
    assert hub.names == ["whoami", "repo_info"]


@pytest.mark.parametrize("repo", ["model", "a/b/c", "a/..", "", "somebody/mo del"])
def test_a_name_that_is_none_is_refused(bundle: Path, repo: str) -> None:
    with pytest.raises(InputError, match="owner/name"):
        push(bundle, repo, api=Hub(), confirm=yes)


NO_ANSWER = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)("name or service not known")


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        ("whoami", LocalTokenNotFoundError("no token"), "nobody is logged in.*`hf auth login`"),
        ("whoami", answered(401), "does not know the token.*`hf auth login` again"),
        ("whoami", NO_ANSWER, r"could not be reached \(name or service not known\)"),
        ("repo_info", ConnectionError("offline"), r"could not be reached \(offline\)"),
        ("create_repo", answered(403), "may not write to somebody/model .*403"),
        ("create_repo", answered(409), "by somebody else in the meantime"),
        ("create_commit", answered(403), "may not write to somebody/model"),
        ("create_commit", answered(412), "by somebody else in the meantime"),
        ("create_commit", answered(500), r"refuses \(500 Client Error\.\)"),
        (
            "create_commit",
            NO_ANSWER,
            r"could not be reached.*No file of somebody/model was changed.*sends the exported folder again",
        ),
        ("create_commit", ValueError("Invalid metadata in README.md.\n- x"), "does not take this folder: Invalid meta"),
    ],
)
def test_what_goes_wrong_is_said_with_the_way_out_and_nothing_is_half_published(
    bundle: Path, call: str, error: BaseException, says: str
) -> None:
    hub = Hub(errors={call: error})
    with pytest.raises(InputError, match=says) as caught:
        push(bundle, REPO, api=hub, confirm=yes)
    assert hub.files == ()
    assert hub.names.count("create_commit") == (call == "create_commit")
    assert "\n" not in str(caught.value)
