"""The command: light to import, right exit codes, every option passed on. Heavy modules have stand-ins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lorafocal import cli
from lorafocal.cli.training import ends_tidily
from lorafocal.config import load_config
from lorafocal.errors import InputError

CONFIG = """
name: run
model: {name: base, dtype: float32}
adapter: {r: 8, alpha: 16}
data: {train: train.jsonl}
objective: {name: focalpo, beta: 0.1, gamma: 0.5}
reference: {kind: disabled_adapter}
training: {pairs_per_step: 64}
"""


@dataclass
class Summary:
    interrupted_by: int | None = None

    def __str__(self) -> str:
        return "the summary"


class Report:
    def as_dict(self) -> dict[str, Any]:
        return {"pairs": 3, "name": "Zoë"}

    def table(self) -> str:
        return "a table"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, function: str, result: Any) -> list[Any]:
    """Put a module with one recording function in place of `lorafocal.<module>`; returns its calls."""
    calls: list[Any] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        if isinstance(result, BaseException):
            raise result
        return result

    fake = ModuleType(f"lorafocal.{module}")
    setattr(fake, function, record)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    if "." not in module:
        monkeypatch.setattr(sys.modules["lorafocal"], module, fake, raising=False)
    return calls


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["lorafocal", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def command(
    *arguments: object, code: str = "from lorafocal.cli import main; main()"
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
    )


HEAVY = "print(sorted({'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules)))"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    done = command(
        *arguments,
        code=f"import sys, atexit; atexit.register(lambda: {HEAVY});\nfrom lorafocal.cli import main; main()",
    )
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"


def test_importing_the_package_loads_nothing_and_its_names_are_lazy() -> None:
    done = command(code=f"import sys, lorafocal; assert 'focalpo' in dir(lorafocal); {HEAVY}")
    assert done.stdout.strip() == "[]"
    import lorafocal

    assert lorafocal.InputError is InputError
    assert lorafocal.load_config.__module__ == "lorafocal.config"
    with pytest.raises(AttributeError, match="no attribute 'focalpoo'"):
        lorafocal.focalpoo  # noqa: B018


def test_every_lazy_name_is_public_and_has_a_home() -> None:
    import lorafocal

    assert set(lorafocal._HOME) | {"__version__"} == set(lorafocal.__all__)


def test_help_names_the_verbs_and_the_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "lorafocal", "--help"], capture_output=True, text=True, check=True)
    for verb in ("train", "score", "merge"):
        assert verb in done.stdout


def test_train_passes_everything_on(
    monkeypatch: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stand_in(monkeypatch, "run", "train", Summary())
    assert (
        call(
            monkeypatch,
            "train",
            file,
            "objective.beta=0.2",
            "--resume",
            "--quiet",
            "--runs",
            "out",
            "adapter.r=4",
        )
        == 0
    )
    [((config,), options)] = calls
    assert (config.objective.beta, config.adapter.r) == (0.2, 4)
    assert options == {"resume": True, "quiet": True, "runs_dir": Path("out")}
    output = capsys.readouterr()
    assert output.out == "the summary\n"
    assert "warning: objective.gamma" in output.err


def test_train_has_plain_defaults(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    calls = stand_in(monkeypatch, "run", "train", Summary())
    assert call(monkeypatch, "train", file) == 0
    assert calls[0][1] == {"resume": False, "quiet": False, "runs_dir": Path("runs")}


@pytest.mark.parametrize(("signal", "code"), [(2, 130), (15, 143)])
def test_an_interrupted_run_that_saved_says_so(
    monkeypatch: pytest.MonkeyPatch, file: Path, signal: int, code: int
) -> None:
    stand_in(monkeypatch, "run", "train", Summary(interrupted_by=signal))
    assert call(monkeypatch, "train", file) == code


def test_score_passes_everything_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "evaluate.score", "score_file", Report())
    assert (
        call(
            monkeypatch,
            "score",
            "adapter",
            "pairs.jsonl",
            "--base",
            "b",
            "--reference",
            "r",
            "--beta",
            "0.2",
            "--out",
            "x",
            "--json",
        )
        == 0
    )
    assert calls == [(("adapter", Path("pairs.jsonl")), {"base": "b", "reference": "r", "beta": 0.2, "out": Path("x")})]
    assert json.loads(capsys.readouterr().out) == {"pairs": 3, "name": "Zoë"}


def test_score_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "evaluate.score", "score_file", Report())
    assert call(monkeypatch, "score", "org/model", "pairs.jsonl") == 0
    assert calls == [(("org/model", Path("pairs.jsonl")), {"base": None, "reference": None, "beta": None, "out": None})]
    assert capsys.readouterr().out == "a table\n"


@pytest.mark.parametrize(("verb", "started"), [(["train"], 1), (["cache-reference"], 1), (["train", "--tiny"], 0)])
def test_a_backend_starts_before_anything_heavy(
    monkeypatch: pytest.MonkeyPatch, file: Path, verb: list[str], started: int
) -> None:
    """A rehearsal runs on transformers, whatever the run will."""
    starts = stand_in(monkeypatch, "model.backends.unsloth", "start", None)
    run = stand_in(monkeypatch, "run", "train", Summary())
    sys.modules["lorafocal.run"].cache_reference = lambda *_, **__: run.append("") or Summary()  # type: ignore[attr-defined]
    stand_in(monkeypatch, "rehearsal", "rehearse", Summary())
    assert call(monkeypatch, verb[0], file, "model.backend=unsloth", "model.dtype=bfloat16", *verb[1:]) == 0
    assert len(starts) == started


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two adapter folders, `one` and `other`, in the working directory."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)


MERGING = (
    "--weights=1,-0.5 --base b --onto original --original o --pairs p --dtype float16 --gate-dtype bfloat16"
    " --max-drift 0.2"
).split()
ASKED = {
    "weights": (1.0, -0.5), "base": "b", "onto": "original", "original": "o", "pairs": Path("p"), "dtype": "float16",
    "gate_dtype": "bfloat16", "max_drift": 0.2,
}  # fmt: skip
UNASKED = {
    "weights": None, "base": None, "onto": "auto", "original": None, "pairs": None, "dtype": None,
    "gate_dtype": "float32",
}  # fmt: skip


@pytest.mark.usefixtures("adapters")
def test_merge_passes_everything_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "release.merge", "merge_adapter", Report())
    assert call(monkeypatch, "merge", "one", "other", "--out", "merged", *MERGING, "--json") == 0
    assert call(monkeypatch, "merge", "one", "--out", "merged") == 0
    assert calls == [
        (([Path("one"), Path("other")], Path("merged")), ASKED),
        (([Path("one")], Path("merged")), UNASKED),
    ]
    assert capsys.readouterr().out.endswith("a table\nmerged model          merged\n")


@pytest.mark.usefixtures("adapters")
def test_export_passes_everything_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "release.export", "export", Report())
    gguf = ["--as", "gguf", "--converter", "convert.py", "--outtype", "q8_0"]
    assert call(monkeypatch, "export", "one", "other", "--out", "x", *gguf, *MERGING, "--json") == 0
    assert call(monkeypatch, "export", "one", "--out", "x") == 0
    converted = {"form": "gguf", "converter": Path("convert.py"), "outtype": "q8_0"}
    assert calls == [
        (([Path("one"), Path("other")], Path("x")), ASKED | converted),
        (([Path("one")], Path("x")), UNASKED | {"form": "bundle", "converter": None, "outtype": None}),
    ]
    assert capsys.readouterr().out.endswith("a table\n")


@pytest.mark.usefixtures("adapters")
def test_export_asks_before_it_pushes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(monkeypatch, "release.export", "export", Report())
    calls = stand_in(monkeypatch, "release.push", "push", "hub/owner/name")
    destinations: list[Any] = []
    check = lambda repo, *, public: destinations.append((repo, public))  # noqa: E731
    monkeypatch.setattr(sys.modules["lorafocal.release.push"], "check_destination", check, raising=False)
    asked: list[str] = []
    monkeypatch.setattr("typer.confirm", lambda question, **_: bool(asked.append(question)))
    assert call(monkeypatch, "export", "one", "--out", "x", "--push", "owner/name") == 0
    all_of_it = ["--public", "--with-pairs", "--yes", "--json"]
    assert call(monkeypatch, "export", "one", "--out", "x", "--push", "owner/name", *all_of_it) == 0
    assert destinations == [("owner/name", False), ("owner/name", True)]
    (_, careful), (_, bold) = calls
    assert [arguments for arguments, _ in calls] == [(Path("x"), "owner/name")] * 2
    assert (careful["public"], careful["with_pairs"], bold["public"], bold["with_pairs"]) == (False, False, True, True)
    assert careful["confirm"]("These files?") is False
    assert asked == ["These files?"]
    assert bold["confirm"]("These files?") is True
    said = capsys.readouterr()
    assert "pushed to hub/owner/name" in said.out
    assert "These files?" in said.err


@pytest.mark.parametrize(
    "words", [["--public"], ["--yes"], ["--with-pairs"], ["--outtype", "bf16"], ["--weights", "a"]]
)
@pytest.mark.usefixtures("adapters")
def test_options_of_export_that_would_be_ignored_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    calls = stand_in(monkeypatch, "release.export", "export", Report())
    assert call(monkeypatch, "export", "one", "--out", "x", *words) == 2
    assert words[0] in capsys.readouterr().err
    assert not calls


@pytest.mark.usefixtures("adapters")
def test_a_push_that_cannot_be_is_refused_before_the_export(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stand_in(monkeypatch, "release.export", "export", Report())
    stand_in(monkeypatch, "release.push", "check_destination", InputError("nobody is logged in"))
    monkeypatch.setattr(sys.modules["lorafocal.release.push"], "push", None, raising=False)
    assert call(monkeypatch, "export", "one", "--out", "x", "--push", "owner/name") == 2
    assert "nobody is logged in" in capsys.readouterr().err
    assert call(monkeypatch, "export", "one", "--out", "x", "--push", "a/b", "--as", "merged", "--with-pairs") == 2
    assert "--with-pairs goes with --as bundle" in capsys.readouterr().err
    assert not calls


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize("verb", ["merge", "export"])
def test_places_are_looked_at_before_the_libraries_are_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    loaded = stand_in(monkeypatch, "release.merge", "merge_adapter", Report())
    loaded += stand_in(monkeypatch, "release.export", "export", Report())
    assert call(monkeypatch, verb, "one", "elsewhere", "--out", "x") == 2
    assert "elsewhere: there is no such folder" in capsys.readouterr().err
    assert call(monkeypatch, verb, "one", "--out", "other") == 2
    assert "other exists already" in capsys.readouterr().err
    assert not loaded


def test_chat_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "chat", "chat", None)
    drawing = ["--system", "s", "--max-new-tokens", "5", "--temperature", "0", "--seed", "3", "--base", "b"]
    assert call(monkeypatch, "chat", "runs/a", "--prompt", "one", "--prompt", "two", *drawing) == 0
    assert call(monkeypatch, "chat", "runs/a") == 0
    given = {"base": "b", "prompts": ("one", "two"), "system": "s", "max_new_tokens": 5, "temperature": 0.0, "seed": 3}
    usual = {"base": None, "prompts": (), "system": None, "max_new_tokens": 256, "temperature": 0.7, "seed": 0}
    assert calls == [((Path("runs/a"),), given), ((Path("runs/a"),), usual)]


def test_check_reads_the_config_and_writes_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: Path
) -> None:
    checks = stand_in(monkeypatch, "report.check", "check_data", Report())
    pages = stand_in(monkeypatch, "report.check_page", "write_check_page", None)
    assert call(monkeypatch, "check", file, "objective.beta=0.2", "--html", "page.html", "--json") == 0
    [((config,), _)] = checks
    assert config.objective.beta == 0.2
    assert [arguments[1] for arguments, _ in pages] == [Path("page.html")]
    said = capsys.readouterr()
    assert json.loads(said.out) == {"pairs": 3, "name": "Zoë"}
    assert "warning: objective.gamma" in said.err


def test_report_passes_its_runs_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stand_in(monkeypatch, "report.write", "write_report", Report())
    assert call(monkeypatch, "report", "runs/a", "runs/b", "--out", "both") == 0
    assert calls == [(([Path("runs/a"), Path("runs/b")], Path("both")), {})]
    assert capsys.readouterr().out == "a table\n"


def test_from_trl_prints_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    theirs = tmp_path / "dpo.yaml"
    theirs.write_text(
        "model_name_or_path: org/model\ndataset_name: org/pairs\nuse_peft: true\nlora_r: 8\nbeta: 0.3\n"
        "lora_target_modules: all-linear\noutput_dir: mine\n"
    )
    given = ["--data", "pairs.jsonl", "--objective", "dpo", "--processes", "2"]
    assert call(monkeypatch, "from-trl", theirs, *given) == 0
    ours = tmp_path / "ours.yaml"
    ours.write_text(capsys.readouterr().out)
    config = load_config(ours)
    assert (config.objective.name, config.objective.beta, config.adapter.r) == ("dpo", 0.3, 8)
    assert config.data.train[0].path == "pairs.jsonl"
    assert config.training.pairs_per_step == 16  # 8 a process


def test_a_store_in_the_making_ends_tidily_on_both_signals(
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """SIGTERM passes through the functions on the way, so that temporary folders go; then it is as before."""
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs do not hear Ctrl-C
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ignored))

    def hear(received: signal.Signals) -> None:
        with ends_tidily("kept"):
            os.kill(os.getpid(), received)
            time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    for received, ending in ((signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)):
        with pytest.raises(ending) as ended:
            hear(received)
        assert getattr(ended.value, "code", 143) == 143
        assert capsys.readouterr().err == "kept\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_real_functions_take_what_the_command_gives() -> None:
    """The stand-ins above accept anything, so the signatures are compared with the real ones."""
    import inspect

    from lorafocal.chat import chat
    from lorafocal.evaluate.score import score_file
    from lorafocal.release.export import export
    from lorafocal.release.merge import merge_adapter
    from lorafocal.release.push import push
    from lorafocal.report.check import check_data
    from lorafocal.report.check_page import write_check_page
    from lorafocal.report.write import write_report

    inspect.signature(check_data).bind("config")
    inspect.signature(write_check_page).bind("report", Path("p"))
    inspect.signature(write_report).bind([Path("a")], None)
    inspect.signature(score_file).bind("adapter", Path("p"), base=None, reference=None, beta=None, out=None)
    inspect.signature(merge_adapter).bind([Path("a")], Path("o"), **ASKED)
    inspect.signature(export).bind([Path("a")], Path("o"), form="gguf", converter=None, outtype=None, **ASKED)
    inspect.signature(push).bind(Path("o"), "owner/name", public=False, with_pairs=False, confirm=print)
    drawing = {"max_new_tokens": 1, "temperature": 0.0, "seed": 0}
    inspect.signature(chat).bind(Path("a"), base=None, prompts=(), system=None, **drawing)


def test_a_wrong_config_is_one_message_and_code_2(file: Path) -> None:
    done = command("train", file, "adapter.r=x", "training.fp16=true")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "adapter.r: found 'x'" in done.stderr
    assert "training.fp16" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["train"], ["train", "a", "--nonsense"], ["fly"], ["merge", "a"], ["score", "a", "b", "--beta", "x"]],
)
def test_wrong_usage_is_code_2(arguments: list[str]) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize(
    ("module", "function", "arguments"),
    [
        ("evaluate.score", "score_file", ["score", "a", "b"]),
        ("release.merge", "merge_adapter", ["merge", "one", "--out", "b"]),
    ],
)
def test_wrong_input_found_late_is_code_2_too(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    function: str,
    arguments: list[str],
) -> None:
    stand_in(monkeypatch, module, function, InputError("a/rows.jsonl row 3: no chosen; add it"))
    assert call(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err == "lorafocal: a/rows.jsonl row 3: no chosen; add it\n"


def test_a_defect_keeps_its_traceback_and_is_code_1() -> None:
    code = (
        "import sys, types; fake = types.ModuleType('lorafocal.evaluate.score');\n"
        "def score_file(*a, **k): raise RuntimeError('a defect')\n"
        "fake.score_file = score_file; sys.modules[fake.__name__] = fake\n"
        "from lorafocal.cli import main; main()"
    )
    done = command("score", "a", "b", code=code)
    assert done.returncode == 1
    assert "RuntimeError: a defect" in done.stderr


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize("out", ["file/x", "x" * 300])
def test_a_place_that_cannot_be_written_is_one_message_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, out: str
) -> None:
    (tmp_path / "file").touch()

    def made(*_: Any, **__: Any) -> None:
        (tmp_path / out).mkdir()

    monkeypatch.setattr("lorafocal.release.merge.merge_adapter", made)
    assert call(monkeypatch, "merge", "one", "--out", out) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("lorafocal: ")
    assert line.endswith(out)


@pytest.mark.usefixtures("adapters")
def test_a_library_s_error_that_is_not_the_system_s_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "release.merge", "merge_adapter", OSError("cannot load this"))
    monkeypatch.setattr(sys, "argv", ["lorafocal", "merge", "one", "--out", "x"])
    with pytest.raises(OSError, match="cannot load this"):
        cli.main()
