"""Upload an exported folder to a model hub: opt-in, shown first, private by default, one commit or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from lorafocal.errors import InputError, first_line
from lorafocal.release.files import published_files

# An answer of the hub that is an error, and no answer at all: the base classes are those of its HTTP library.
_NETWORK: Any = (OSError, *HfHubHTTPError.__bases__)
_OF_THE_HUB = {".gitattributes"}  # what it puts into every repository itself


def push(
    folder: Path,
    repo: str,
    *,
    public: bool = False,
    with_pairs: bool = False,
    api: Any = None,
    confirm: Callable[[str], bool],
) -> str:
    """Publish an exported `folder` as the model repository `repo` ("owner/name"); returns its address.

    `confirm` gets the list of files with their sizes and who will be able to read them, and is asked once, before
    anything is sent. `with_pairs` adds the held-out pairs of a bundle. `api` stands in for `huggingface_hub.HfApi`,
    whose own login is the only place a token is taken from.

    Raises InputError: a folder with anything that no export writes, a repository that everybody can read where `public`
    does not say so (or the reverse), one that holds other files, no login, no permission, no connection, or a no.
    """
    api = HfApi() if api is None else api
    files, kept = published_files(folder, with_pairs=with_pairs)
    there = check_destination(repo, public=public, api=api)
    if there is not None:
        _check_others(there, repo, files)
    if not confirm(_question(repo, files, kept, public=public, exists=there is not None)):
        raise InputError(f"nothing was pushed; {folder} stays")
    with _explained(repo):
        return _upload(api, repo, files, there, public=public)


def check_destination(repo: str, *, public: bool, api: Any = None) -> Any:
    """What the hub knows of the repository, None where there is none yet; asked before an export as well, which takes
    long. Raises InputError: no name of a repository, nobody logged in, one that exists with the other visibility."""
    _check_name(repo)
    api = HfApi() if api is None else api
    with _explained(repo):
        api.whoami()
        there = _existing(api, repo)
    if there is not None:
        _check_visibility(there, repo, public=public)
    return there


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
        whole = repo.count("/") == 1
    except HFValidationError:
        whole = False
    if not whole:
        raise InputError(f"--push {repo!r} is no name of a repository: it has the form owner/name")


def _existing(api: Any, repo: str) -> Any:
    """What the hub knows of the repository; None where there is none, or none that this login may see."""
    try:
        return api.repo_info(repo, repo_type="model")
    except RepositoryNotFoundError:
        return None


def _check_visibility(there: Any, repo: str, *, public: bool) -> None:
    """Refuse a repository of the other visibility, which a push never changes."""
    if not there.private and not public:
        raise InputError(
            f"{repo} exists and everybody can read it: say --public if that is meant, or give another name"
        )
    if there.private and public:
        raise InputError(
            f"{repo} exists and is private, and --public would not change that: leave it out, or open the repository in"
            " its settings first"
        )


def _check_others(there: Any, repo: str, files: Mapping[str, Path]) -> None:
    """Refuse a repository that holds another model."""
    others = sorted({file.rfilename for file in there.siblings or ()} - files.keys() - _OF_THE_HUB)
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise InputError(
            f"{repo} holds {', '.join(others[:5])}{more}, which this folder has not: others would load a mixture of the"
            " two. Remove them there, or give another name"
        )


def _question(repo: str, files: Mapping[str, Path], kept: list[str], *, public: bool, exists: bool) -> str:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    width = max(map(len, sizes))
    lines = [f"  {name:<{width}}  {_size(size):>9}" for name, size in sizes.items()]
    if kept:
        lines.append(
            f"{', '.join(kept)} stays here: verify.py then checks the files, but not the gate (--with-pairs adds it)"
        )
    readers = "everybody can read it" if public else "private"
    where = f"{'one commit to' if exists else 'the new repository'} {repo} ({readers})"
    return "\n".join([*lines, f"push these {len(files)} files, {_size(sum(sizes.values()))}, as {where}?"])


def _size(size: int) -> str:
    for unit, bytes_of_it in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= bytes_of_it:
            return f"{size / bytes_of_it:.1f} {unit}"
    return f"{size} B"


def _upload(api: Any, repo: str, files: Mapping[str, Path], there: Any, *, public: bool) -> str:
    """Everything in one commit, on the state of the repository that was looked at."""
    if there is None:
        api.create_repo(repo, private=not public, repo_type="model", exist_ok=False)
        there = api.repo_info(repo, repo_type="model")
        if not there.private and not public:
            raise InputError(
                f"the hub made {repo} readable by everybody although a private one was asked for: nothing"
                " was pushed; look at the owner's settings"
            )
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    commit = api.create_commit(
        repo,
        operations,
        commit_message="Publish with lorafocal",
        repo_type="model",
        parent_commit=there.sha,
    )
    return str(commit.repo_url)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """The hub's errors as one message with the way out; a commit is complete or absent there whatever happened."""
    try:
        yield
    except InputError:
        raise
    except LocalTokenNotFoundError as error:
        raise InputError("nobody is logged in to the hub: run `hf auth login` with a token that may write") from error
    except HfHubHTTPError as error:
        raise InputError(_refused(repo, error)) from error
    except _NETWORK as error:
        raise InputError(
            f"the hub could not be reached ({first_line(error)}). No file of {repo} was changed, a repository may have"
            " been made and be empty; `lorafocal push` sends the exported folder again"
        ) from error
    except ValueError as error:  # a card whose front matter the hub does not take
        raise InputError(f"the hub does not take this folder: {first_line(error)}. Nothing was pushed") from error


def _refused(repo: str, error: HfHubHTTPError) -> str:
    status = getattr(error.response, "status_code", None)
    if status == 401:
        return "the hub does not know the token of this login: run `hf auth login` again, with one that may write"
    if status in (403, 404):
        return (
            f"this login may not write to {repo} (the hub answers {status}): log in as its owner, with a token that may"
            " write, or give another name"
        )
    if status in (409, 412):
        return f"{repo} was made or changed by somebody else in the meantime: nothing was pushed; look at it first"
    return f"the hub refuses ({first_line(error)}): no file of {repo} was changed"
