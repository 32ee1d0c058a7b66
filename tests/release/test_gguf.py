"""GGUF through somebody else's converter: how it is called, and that only a GGUF counts as one."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from lorafocal.errors import InputError
from lorafocal.release.export import export
from lorafocal.release.gguf import OUTTYPES, tensor_count
from tests.saved_run import SavedRun, save_run

pytestmark = pytest.mark.slow  # whole models are written and loaded again

# What the published script takes (llama.cpp's convert_hf_to_gguf.py), with nothing behind it.
ARGUMENTS = """
import argparse, json, os, struct, sys
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--outfile", type=Path)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto"], default="auto")
parser.add_argument("--model-name")
args = parser.parse_args()
assert os.environ["HF_HUB_OFFLINE"] == "1"
assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(args.model))
Path("scratch.tmp").write_text("left in the working directory")
"""
GOOD = 'args.outfile.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 20, 0) + args.model_name.encode() + bytes(99))'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return save_run(tmp_path_factory.mktemp("run"))


def converter(folder: Path, ending: str = GOOD) -> Path:
    path = folder / "convert_hf_to_gguf.py"
    path.write_text(ARGUMENTS + ending)
    return path


def test_a_relative_output_folder_is_the_caller_s(
    run: SavedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = converter(tmp_path)
    monkeypatch.chdir(tmp_path)
    export(run.adapter, Path("deep/out"), form="gguf", converter=Path(script.name))
    assert (tmp_path / "deep" / "out" / "out-bf16.gguf").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {script.name, "deep"}


@pytest.mark.row("52", "51")
def test_the_folder_holds_the_converter_s_file_and_papers(run: SavedRun, tmp_path: Path) -> None:
    out = tmp_path / "My model"
    report = export(run.adapter, out, form="gguf", converter=converter(tmp_path))
    assert {path.name for path in out.iterdir()} == {
        "My-model-bf16.gguf", "README.md", "merge.json", "lorafocal.json",
    }  # fmt: skip
    assert report.converted is not None
    assert report.converted.as_dict() == {"file": "My-model-bf16.gguf", "outtype": "bf16", "tensors": 20}
    assert report.notes == ()
    assert b"My-model" in (out / "My-model-bf16.gguf").read_bytes()
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
    json.dumps(report.as_dict())


def test_a_coarser_outtype_is_said_not_to_be_measured(run: SavedRun, tmp_path: Path) -> None:
    report = export(run.adapter, tmp_path / "out", form="gguf", converter=converter(tmp_path), outtype="q8_0")
    [note] = report.notes
    assert "q8_0" in note
    assert "not measured" in note
    assert note in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("sys.exit('Model LlamaForCausalLM is not supported')", r"failed \(exit code 1\): Model .* is not supported"),
        ("pass", "wrote no out-bf16.gguf"),
        ("args.outfile.write_bytes(b'GGUF')", "wrote no out-bf16.gguf"),
        ("args.outfile.write_bytes(bytes(1000))", "no GGUF"),
        ("args.outfile.write_bytes(struct.pack('<4sIQQ', b'GGUF', 77, 20, 0) + bytes(99))", "no GGUF of version"),
        ("args.outfile.write_bytes(struct.pack('<4sIQQ', b'GGUF', 3, 0, 9) + bytes(99))", "0 tensors for 2 layers"),
        ("args.outfile.write_bytes(struct.pack('<4sIQQ', b'GGUF', 3, 10**9, 9))", "1000000000 tensors"),
    ],
)
def test_a_converter_that_fails_leaves_nothing(run: SavedRun, tmp_path: Path, ending: str, message: str) -> None:
    script = converter(tmp_path, ending)
    with pytest.raises(InputError, match=message):
        export(run.adapter, tmp_path / "out", form="gguf", converter=script)
    assert list(tmp_path.iterdir()) == [script]


def test_what_is_missing_is_said_before_anything_is_merged(run: SavedRun, tmp_path: Path) -> None:
    for given, message in (
        ({}, "needs --converter FILE"),
        ({"converter": tmp_path}, "no such script"),
        ({"converter": converter(tmp_path), "outtype": "q4_k_m"}, "--outtype 'q4_k_m': choose one of f32"),
    ):
        with pytest.raises(InputError, match=message):
            export(Path("nowhere"), tmp_path / "out", form="gguf", **given)  # type: ignore[arg-type]


def test_the_outtypes_are_the_converter_s() -> None:
    assert all(f'"{outtype}"' in ARGUMENTS for outtype in OUTTYPES)


def test_the_header_is_little_endian_and_counts_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) + bytes([0, 1, 0, 0, 0, 0, 0, 0]) + struct.pack("<Q", 5))
    assert tensor_count(path, Path("c.py")) == 256
