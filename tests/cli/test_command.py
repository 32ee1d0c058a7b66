"""The command: light to import, right exit codes, every option of training passed on. Heavy modules have stand-ins."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lorafocal import cli
from lorafocal.cli.training import ends_tidily, resume_command
from lorafocal.config import load_config
from lorafocal.errors import InputError
from lorafocal.memory import Lengths
from lorafocal.report.html import document
from tests.command import Report, Summary, call, command, stand_in
from tests.no_memory import whoever_says_it

pytestmark = pytest.mark.slow

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


def trainings(monkeypatch: pytest.MonkeyPatch, summary: Summary) -> list[Any]:
    """The calls of `run.train`, in whose place and in that of its watchers nothing happens."""
    stand_in(monkeypatch, "evaluate.during", "callbacks", ())
    stand_in(monkeypatch, "stages", "train_stages", None)  # which takes more of `run` than its stand-in has
    return stand_in(monkeypatch, "run", "train", summary)


def options_of(train: Any) -> dict[str, Any]:
    """What `run.train` was called with by name, but for what watches the training, which is always given."""
    _, options = train
    assert options["callbacks"] is sys.modules["lorafocal.evaluate.during"].callbacks
    return {name: value for name, value in options.items() if name != "callbacks"}


def test_train_passes_everything_on(
    monkeypatch: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = trainings(monkeypatch, Summary())
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
    [((config,), _)] = calls
    assert (config.objective.beta, config.adapter.r) == (0.2, 4)
    assert options_of(calls[0]) == {"resume": True, "quiet": True, "runs_dir": Path("out")}
    output = capsys.readouterr()
    assert output.out == "the summary\n"
    assert "warning: objective.gamma" in output.err


def test_train_has_plain_defaults(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    calls = trainings(monkeypatch, Summary())
    assert call(monkeypatch, "train", file) == 0
    assert options_of(calls[0]) == {"resume": False, "quiet": False, "runs_dir": Path("runs")}


@pytest.mark.parametrize(("signal", "code"), [(2, 130), (15, 143)])
def test_an_interrupted_run_that_saved_says_so(
    monkeypatch: pytest.MonkeyPatch, file: Path, signal: int, code: int
) -> None:
    trainings(monkeypatch, Summary(interrupted_by=signal))
    assert call(monkeypatch, "train", file) == code


@pytest.mark.parametrize(
    ("words", "processes"),
    [(["--processes", "3", "--quiet"], 3), (["--engine", "zero3", "--processes=2"], 2), (["--engine=fsdp2"], 1)],
)
def test_several_processes_are_a_launch_of_the_same_command(
    monkeypatch: pytest.MonkeyPatch, file: Path, words: list[str], processes: int
) -> None:
    """The config is read first; an engine of several processes is launched even where no number is named."""
    launches: list[Any] = []

    def start(arguments: list[str], count: int) -> None:
        launches.append((arguments, count))
        raise SystemExit(0)

    monkeypatch.setattr("lorafocal.launch.start", start)
    monkeypatch.setattr("lorafocal.launch.visible_gpus", lambda: 0)
    assert call(monkeypatch, "train", file, *words) == 0
    kept = [word for word in words if not word.startswith("--processes") and word not in ("3", "2")]
    assert launches == [(["train", str(file), *kept], processes)]
    assert call(monkeypatch, "train", file, *words, "training.learning_rte=1") == 2
    assert len(launches) == 1


def test_a_run_again_needs_its_manifest_alone(
    monkeypatch: pytest.MonkeyPatch, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"format": 1, "config": load_config(file).model_dump(mode="json"), "base": {}}))
    asked: list[Any] = []

    def reproduce(config: Any, first: Path, **options: Any) -> Any:
        asked.append((config.name, first, options))
        return type("Done", (), {"summary": Summary(), "__str__": lambda self: "the same weights"})()

    monkeypatch.setattr("lorafocal.provenance.reproduce", reproduce)
    assert call(monkeypatch, "train", "--repro", manifest, "--quiet") == 0
    assert call(monkeypatch, "train", "name=other", "--repro", manifest) == 0
    assert capsys.readouterr().out == "the same weights\n" * 2
    first = load_config(file).name
    assert [name for name, _, _ in asked] == [f"{first}-again", "other"]
    assert asked[0][1:] == (manifest, {"resume": False, "quiet": True, "runs_dir": Path("runs")})
    assert call(monkeypatch, "train", "--repro", manifest, "training.learning_rate=1.0") == 2
    assert call(monkeypatch, "train", file, "--repro", manifest) == 2
    assert f"leave {file} out" in capsys.readouterr().err
    assert call(monkeypatch, "train") == 2


@pytest.mark.parametrize(("verb", "started"), [(["train"], 1), (["cache-reference"], 1), (["train", "--tiny"], 0)])
def test_a_backend_starts_before_anything_heavy(
    monkeypatch: pytest.MonkeyPatch, file: Path, verb: list[str], started: int
) -> None:
    """A rehearsal runs on transformers, whatever the run will."""
    starts = stand_in(monkeypatch, "model.backends.unsloth", "start", None)
    run = trainings(monkeypatch, Summary())
    sys.modules["lorafocal.run"].cache_reference = lambda *_, **__: run.append("") or Summary()  # type: ignore[attr-defined]
    stand_in(monkeypatch, "rehearsal", "rehearse", Summary())
    assert call(monkeypatch, verb[0], file, "model.backend=unsloth", "model.dtype=bfloat16", *verb[1:]) == 0
    assert len(starts) == started


def test_check_reads_the_config_and_writes_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path
) -> None:
    checks = stand_in(monkeypatch, "report.check", "check_data", Report())
    stand_in(monkeypatch, "report.check_page", "check_page", "<p>checked</p>")
    page = tmp_path / "page.html"
    assert call(monkeypatch, "check", file, "objective.beta=0.2", "--html", page, "--json") == 0
    [((config,), _)] = checks
    assert config.objective.beta == 0.2
    assert page.read_text(encoding="utf-8") == "<p>checked</p>"
    said = capsys.readouterr()
    assert json.loads(said.out) == {"pairs": 3, "name": "Zoë"}
    assert "warning: objective.gamma" in said.err


def test_a_page_of_the_check_never_replaces_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path
) -> None:
    checks = stand_in(monkeypatch, "report.check", "check_data", Report())
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("{}\n", encoding="utf-8")
    assert call(monkeypatch, "check", file, "--html", rows) == 2
    assert "pairs.jsonl: the page is one .html file" in capsys.readouterr().err
    assert (rows.read_text(encoding="utf-8"), checks) == ("{}\n", [])


def test_a_page_never_replaces_a_page_of_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path
) -> None:
    checks = stand_in(monkeypatch, "report.check", "check_data", Report())
    stand_in(monkeypatch, "report.check_page", "check_page", document("a title", "checked"))
    page, pipe = tmp_path / "page.html", tmp_path / "pipe.html"
    page.write_text("<html>mine</html>")
    os.mkfifo(pipe)
    for place, message in ((page, "page.html is no page of lorafocal"), (pipe, "is a device or a pipe")):
        assert call(monkeypatch, "check", file, "--html", place) == 2
        assert message in capsys.readouterr().err
    assert (page.read_text(), checks) == ("<html>mine</html>", [])
    page.unlink()
    for _ in range(2):  # the second time over its own
        assert call(monkeypatch, "check", file, "--html", page) == 0


@pytest.mark.parametrize("lengths", ["67,666", "67,666,0", "67,666,nan", "a,b,c"])
def test_lengths_of_a_plan_are_three_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: Path, lengths: str
) -> None:
    plans = stand_in(monkeypatch, "plan", "plan", Report())
    assert call(monkeypatch, "plan", file, "--lengths", lengths) == 2
    assert "--lengths" in capsys.readouterr().err
    assert plans == []
    assert call(monkeypatch, "plan", file, "--lengths", "67,666,218") == 0
    [(_, given)] = plans
    assert given["lengths"] == Lengths(67, 666, 218)


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
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "Full", "x"), "Full: x; make room there, or name another folder by --runs or --out"),
        (OSError(errno.ENOSPC, "Full"), "Full; make room there, or name another folder by --runs or --out"),
        (
            OSError(errno.EFBIG, "Big", "x"),
            "Big: x; allow larger files there, or name another folder by --runs or --out",
        ),
        (OSError(errno.EROFS, "Read-only", "d"), "Read-only: d; name another folder by --runs or --out"),
        (OSError(errno.EIO, "Bad", "d"), "Bad: d"),
    ],
)
def test_a_disk_without_room_is_told_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: OSError, told: str
) -> None:
    stand_in(monkeypatch, "release.merge", "merge_adapter", error)
    assert call(monkeypatch, "merge", "one", "--out", "x") == 2
    assert capsys.readouterr().err == f"lorafocal: {told}\n"


@pytest.mark.usefixtures("adapters")
def test_a_library_s_error_that_is_not_the_system_s_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "release.merge", "merge_adapter", OSError("cannot load this"))
    monkeypatch.setattr(sys, "argv", ["lorafocal", "merge", "one", "--out", "x"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert "Traceback" in said
    assert "OSError: cannot load this" in said


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize(("met", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(errno.EPIPE, "no reader"), 1)])
def test_what_one_process_alone_has_met_ends_it_without_the_others(
    monkeypatch: pytest.MonkeyPatch, met: BaseException, code: int
) -> None:
    """They may not have heard the signal, and write to no pipe: over NCCL a farewell would wait for them."""
    left: list[int] = []
    stand_in(monkeypatch, "release.merge", "merge_adapter", met)
    monkeypatch.setattr(sys, "argv", ["lorafocal", "merge", "one", "--out", "x"])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which typer exchanges
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(cli.launch, "leave", left.append)
    cli.main()
    assert left == [code]


@pytest.mark.usefixtures("adapters")
@whoever_says_it
def test_a_device_without_memory_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: RuntimeError
) -> None:
    stand_in(monkeypatch, "release.merge", "merge_adapter", error)
    assert call(monkeypatch, "merge", "one", "--out", "x") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"lorafocal: the device has no memory left ({str(error).splitlines()[0]})")
    assert "`lorafocal plan`" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("here", "of", "expected"),
    [
        (1, 1, "lorafocal train run.yaml --resume"),
        (8, 8, "torchrun --standalone --nproc-per-node 8 -m lorafocal train run.yaml --resume"),
        (8, 16, "(the launcher as before, on every machine) -m lorafocal train run.yaml --resume"),
    ],
)
def test_how_to_go_on_is_said_of_the_machines_that_trained(
    monkeypatch: pytest.MonkeyPatch, here: int, of: int, expected: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["lorafocal", "train", "run.yaml"])
    monkeypatch.setenv("WORLD_SIZE", str(of))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    assert resume_command() == expected
