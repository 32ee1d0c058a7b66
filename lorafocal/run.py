"""One training run from its config: the run folder, training, and the finished adapter or model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from lorafocal import launch
from lorafocal.arguments import FocalPOConfig
from lorafocal.budget import AS_STATED
from lorafocal.caching import CacheReport
from lorafocal.checkpoint import latest_complete, step_of
from lorafocal.config import Config, lora_arguments, resolved_yaml, training_arguments
from lorafocal.data.held_out import HELD_OUT_FILE, write_held_out
from lorafocal.data.prepare import Part, check_sources, prepare_data, template_notes
from lorafocal.engines import loading_device
from lorafocal.errors import NO_ROOM, FullDisk, InputError
from lorafocal.interrupt import StopOnSignal, agreed
from lorafocal.loggers import services
from lorafocal.manifest import assembled, assembled_lines, manifest_of
from lorafocal.model import backends
from lorafocal.model.adapters import trainable_token_ids
from lorafocal.model.continued import continue_adapter
from lorafocal.model.load import check_place, check_same_tokens, load_base, load_tokenizer
from lorafocal.model.quantized import describe
from lorafocal.model.starts import lora_config
from lorafocal.progress import ProgressLine, speaker
from lorafocal.publish import alone_in, file_in_the_way, full_disk_named, inside, recover, write_atomically
from lorafocal.resume import changes, check_resumable
from lorafocal.run_folder import (
    ADAPTER_CONFIG,
    ADAPTER_DIR,
    CONFIG_FILE,
    MANIFEST_FILE,
    STAGES_FILE,
    SWEEP_FILE,
    made_by,
)
from lorafocal.saving import check_replaced
from lorafocal.schema import Adapter
from lorafocal.together import all_or_none, check_same, of_all_ranks
from lorafocal.trainer import FocalPOTrainer

GATE_PAIRS = 64  # held-out pairs kept with the run, for the merge gate

# What all processes must have alike, and where the manifest says it.
_SHARED = {
    "config": "config_sha256",
    "base": "base",
    "reference model": "reference_model",
    "set of reference adapters": "reference_adapters",
    "adapter to start from": "start_from",
    "chat template": "chat_template_sha256",
    "vocabulary": "vocabulary_sha256",
    "set of pairs": "data",
}

Watchers = Callable[[FocalPOTrainer], Sequence[TrainerCallback]]
Callbacks = Callable[[Config, FocalPOConfig, Mapping[str, Part], PreTrainedTokenizerBase], Watchers]


def no_watchers(trainer: FocalPOTrainer) -> Sequence[TrainerCallback]:
    """The trainer's own callbacks alone."""
    return ()


def no_callbacks(*parts: Any) -> Watchers:
    """Nothing watches the training."""
    return no_watchers


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a run left behind."""

    folder: Path
    steps: int
    max_steps: int
    held_out: Mapping[str, float]  # metrics of the last evaluation; empty without held-out pairs
    made: str = ADAPTER_DIR
    interrupted_by: int | None = None  # signal number
    signalled_late: int | None = None  # one that came when nothing was left to interrupt

    def __str__(self) -> str:
        if self.interrupted_by is not None:
            return f"stopped and saved after step {self.steps} of {self.max_steps}; the same run resumes there"
        lines = [
            f"{self.steps} step{'' if self.steps == 1 else 's'} done; the {self.made} is in {self.folder / self.made}"
        ]
        if self.held_out:
            keys = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
            shown = [f"{key[5:]} {self.held_out[key]:.4g}" for key in keys if key in self.held_out]
            lines.append("held out: " + ", ".join(shown))
        return "\n".join(lines)


def train(
    config: Config,
    *,
    resume: bool = False,
    quiet: bool = False,
    runs_dir: Path = Path("runs"),
    inspect: Callable[[Mapping[str, Any]], Iterable[str]] = lambda manifest: (),
    callbacks: Callbacks = no_callbacks,
) -> RunSummary:
    """Train as `config` says into `runs_dir`/<name>, or go on with that run.

    `inspect` is given the manifest of what goes in, before a model is loaded: it raises, or returns notes to be said.
    `callbacks` makes what watches the training, in two turns: what takes the device's memory before the base does, the
    rest once there is a trainer; `lorafocal.evaluate.during.callbacks` for the section `evaluation`.
    Raises InputError before anything is written where the input is wrong, the folder is taken, or what is resumed
    would give another result; UnhealthyRun where numbers stop being finite. Under a launcher all processes call it
    alike; rank 0 alone writes and speaks.
    """
    if not isinstance(config, Config):
        raise InputError(f"config is of the type {type(config).__name__}: give `lorafocal.load_config(FILE)`")
    if config.evaluation is not None and callbacks is no_callbacks:
        raise InputError("evaluation: nobody answers; give run.train `callbacks=lorafocal.evaluate.during.callbacks`")
    if config.stages is not None:
        raise InputError("stages: one run is one stage; `lorafocal.stages.train_stages` trains one after the other")
    say = speaker(quiet)
    folder = run_folder(runs_dir, config.name)
    _check_folder(folder, config, resume)
    check_places(config)
    began = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")) if resume else {}
    args = _arguments(config, folder, settled=began.get("settled", {}))
    if note := launch.idle_gpus(torch.cuda.device_count() if args.device.type == "cuda" else 0):
        say(note)
    with nothing_left_of(folder), claimed(folder, lambda: _check_folder(folder, config, resume)):
        return _train(config, args, began if resume else None, quiet=quiet, inspect=inspect, callbacks=callbacks)


def _train(
    config: Config,
    args: FocalPOConfig,
    began: Mapping[str, Any] | None,
    *,
    quiet: bool,
    inspect: Callable[[Mapping[str, Any]], Iterable[str]],
    callbacks: Callbacks,
) -> RunSummary:
    """`train` in the folder of `args`, which is this launch's alone; `began` is the manifest of a run that goes on."""
    say, folder, resume = speaker(quiet), Path(args.output_dir), began is not None
    began = began or {}
    checkpoint = _checkpoint_to_resume(folder, say) if resume else None
    tokenizer, data = _tokenized(config, say)
    manifest = manifest_of(config, tokenizer, data)
    check_same({name: manifest[key] for name, key in _SHARED.items()})
    for note in (*(check_resumable(began, manifest) if resume else ()), *inspect(manifest)):
        say(f"note: {note}")
    watchers = callbacks(config, args, data, tokenizer)
    base = _load(config.model.name, config.model.revision, config, args)
    loaded = describe(base)
    trainer = _trainer(config, args, data, tokenizer, base, quiet)
    trainer.look_up_reference(say)  # what is missing is said before anything is written
    for callback in watchers(trainer):
        trainer.add_callback(callback)
    if config.packing.tokens == "auto" and "tokens_per_pack" in began.get("settled", {}):
        trainer.kernels["packs"] = trainer.kernels["packs"].replace(AS_STATED, "as the run began")
    loaded = replace(loaded, attention=base.config.get_text_config()._attn_implementation)  # the layout's
    manifest |= assembled(trainer, loaded)
    for line in assembled_lines(trainer, loaded):
        say(line)
    for line in changes(began.get("kernels", trainer.kernels), trainer.kernels, ("packs",)):  # these are as settled
        say(f"note: {line} (the last bits may differ from an uninterrupted run)")
    _say_slow(args, config, say)
    if "eval" not in data:
        say("no held-out pairs: nothing is evaluated, and a merge will need some by --pairs (give data.held_out: 0.05)")
    if trainer.args.should_save:
        _write_run_files(folder, config, manifest, data)
    with full_disk_told(folder), services(trainer):
        return _trained(trainer, config, folder, checkpoint, resume)


def _trained(
    trainer: FocalPOTrainer, config: Config, folder: Path, checkpoint: Path | None, resume: bool
) -> RunSummary:
    """All steps that are left, and what the run makes."""
    stop = StopOnSignal()
    trainer.add_callback(stop)
    try:
        with stop.watching():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except InputError:
        if launch.is_main() and not resume and trainer.state.global_step == 0:
            (folder / MANIFEST_FILE).unlink()  # the first step was refused: the name is free for what is put right
        raise
    state, made = trainer.state, made_by(config.adapter)
    late = agreed(stop.heard, trainer.args.device)  # in the last step, or in what followed it
    if stop.received is not None and state.global_step < state.max_steps:
        return RunSummary(folder, state.global_step, state.max_steps, {}, made, int(stop.received))
    held_out = _held_out_metrics(trainer)
    trainer.save_model(str(folder / made))
    return RunSummary(folder, state.global_step, state.max_steps, held_out, made, signalled_late=late and int(late))


def cache_reference(config: Config, *, per_token: bool = False, quiet: bool = False) -> CacheReport:
    """Compute and store the reference log-probs that a run of `config` looks up, as far as the store lacks them.

    With `per_token`, and where the objective weighs tokens, those of each token too. Nothing is trained, so each
    process holds the whole model, and one will do whatever the engine. Raises InputError where the config keeps none,
    or its input is wrong.
    """
    if not config.objective.entry.reference:
        raise InputError(
            f"{config.objective.name} compares with no reference: there is nothing to compute, only to train"
        )
    kind = None if config.reference is None else config.reference.kind
    if kind != "cached":
        raise InputError(
            f"reference.kind is {kind or 'not set'}, and only `cached` looks log-probs up: set reference.kind=cached"
        )
    if not launch.launched():
        config = config.model_copy(update={"engine": None})
    say = speaker(quiet)
    check_places(config)
    with tempfile.TemporaryDirectory(prefix="lorafocal-cache-") as folder:  # a trainer's, which writes nothing here
        args = _arguments(config, Path(folder))
        tokenizer, data = _tokenized(config, say)
        base = _load(config.model.name, config.model.revision, config, args)
        trainer = _trainer(config, args, data, tokenizer, base, quiet)
        _say_slow(args, config, say)
        return trainer.cache_reference(per_token=per_token, say=say)


def _say_slow(args: FocalPOConfig, config: Config, say: Callable[[str], None]) -> None:
    if args.device.type == "cpu" and config.model.dtype == "bfloat16":
        say(
            "note: bfloat16 on a CPU that does not multiply it itself can be ten times slower than float32; to try"
            " things out, model.dtype=float32"
        )


def _tokenized(config: Config, say: Callable[[str], None]) -> tuple[PreTrainedTokenizerBase, Mapping[str, Part]]:
    """The tokenizer and the pairs of `train` and `eval`, with what is worth saying about them."""
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    if config.reference is not None and config.reference.model is not None:
        other, revision = config.reference.model, config.reference.revision
        check_same_tokens(tokenizer, load_tokenizer(other, revision, key="reference.model"), other)
    with launch.main_process_first():
        data = prepare_data(config.data, tokenizer, objective=config.objective.entry)
    for name, part in data.items():
        say(f"{name}: {part}")
    for note in template_notes(data, config.data, tokenizer):
        say(f"note: {note}")
    return tokenizer, data


def check_places(config: Config) -> None:
    """What the config names must be there: it costs nothing to look, and a model may take long to load."""
    check_sources(config.data)
    if config.reference is not None and config.reference.model is not None:
        try:
            check_place(config.reference.model)
        except InputError as error:
            raise InputError(f"reference.model: {error}") from error
    if config.reference is not None:
        strategy = config.reference.strategy
        for key, folder in (*(("adapter or members", f) for f in strategy.folders), ("guide", strategy.guide)):
            if folder is not None and not (Path(folder) / ADAPTER_CONFIG).is_file():
                raise InputError(f"reference.{key}: {folder} holds no adapter_config.json; name a finished adapter")
    start = None if config.adapter is None else config.adapter.start_from
    if start is not None and not (Path(start) / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"adapter.start_from: {start} holds no adapter_config.json; it names the adapter folder of a run"
        )


def run_folder(runs_dir: Path, name: str) -> Path:
    """The folder `runs_dir`/`name`. Raises InputError where there can be none."""
    folder = inside(runs_dir, name)
    if file := file_in_the_way(folder):
        raise InputError(f"{folder} cannot be made, because {file} is a file: give another `name`, or another --runs")
    return folder


@contextmanager
def nothing_left_of(folder: Path) -> Iterator[None]:
    """Where an error ends what is within, take away the folders that were made for it and are empty."""
    made = [place for place in (folder, folder.parent) if not place.exists()]
    try:
        yield
    except BaseException:
        for place in made if launch.is_main() else ():
            with suppress(OSError):
                place.rmdir()
        raise


@contextmanager
def claimed(folder: Path, check: Callable[[], None]) -> Iterator[None]:
    """Within, this launch alone trains in `folder`, which is made where it is not there.

    Collective, of ranks that have joined: rank 0 claims it, and asks `check` again, as another process may have been at
    work since. Raises InputError on all of them.
    """
    with ExitStack() as stack:
        with all_or_none():
            if launch.is_main():
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(alone_in(folder, "trained in"))
                check()
        yield


@contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """Where the disk is full while a run trains in `folder`: what is kept, and how to go on. Raises FullDisk."""
    try:
        with full_disk_named(folder):
            yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        last = latest_complete(folder).path
        kept = f"{last.name} is untouched" if last else "there is no checkpoint yet"
        place = folder if folder in Path(error.filename).parents else error.filename  # what was torn is gone by now
        way_out = f"make room, then {'go on' if last else 'begin anew'} by --resume"
        raise FullDisk(f"{place}: {error.strerror}", f"{kept}: {way_out}") from error


def _check_folder(folder: Path, config: Config, resume: bool) -> None:
    if (folder / SWEEP_FILE).exists():
        raise InputError(
            f"{folder} holds a sweep: give another `name`; to go on with one of its runs, train its config.yaml with"
            f" --runs {folder} --resume"
        )
    if (folder / STAGES_FILE).exists():
        raise InputError(f"{folder} holds a run of several stages: give another `name`, or say `stages` to go on")
    taken = (folder / MANIFEST_FILE).exists()
    if taken and not resume:
        raise InputError(f"{folder} already holds a run: go on with it by --resume, or give another `name`")
    if resume and not taken:
        raise InputError(f"{folder} holds no run to resume; start it without --resume")
    made = made_by(config.adapter)
    check_replaced(folder / made, made, "another `name`, or move that away")


def _arguments(config: Config, folder: Path, *, settled: Mapping[str, Any] = MappingProxyType({})) -> FocalPOConfig:
    """The trainer's arguments; making them decides this process's device and joins it to the others.

    What the config leaves open is as `settled`, when the run began: the last bits depend on it.
    """
    arguments = training_arguments(config)
    for name, value in settled.items():
        if arguments.get(name, "auto") == "auto":
            arguments[name] = value
    if config.data.eval is not None or config.data.held_out is not None:
        arguments.setdefault("eval_strategy", "epoch")
    args = FocalPOConfig(output_dir=str(folder), **arguments)
    launch.check_world(args.world_size)
    return args


def join(config: Config) -> None:
    """Let this process find the others of its launch, as a run of `config` does."""
    _arguments(config, Path(config.name))


def _checkpoint_to_resume(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint; None where the run was stopped before its first one, and starts over.

    Collective: rank 0 reads them, the others take its word.
    """
    newest = -1
    with all_or_none():
        if launch.is_main():
            recover(folder)
            latest = latest_complete(folder)
            for reason in latest.skipped:
                say(f"warning: {reason}")
            newest = step_of(latest.path) if latest.path else -1
    step = of_all_ranks(newest)[0]
    say(f"resuming from checkpoint-{step}" if step >= 0 else "no checkpoint yet: starting from step 0")
    return folder / f"checkpoint-{step}" if step >= 0 else None


def _load(name: str, revision: str | None, config: Config, args: FocalPOConfig) -> PreTrainedModel:
    """The base, or a reference model: both are held alike, so that they differ by their weights alone."""
    model, shape = config.model, config.model.shape if name == config.model.name else None
    held: dict[str, Any] = {"dtype": model.dtype, "shape": shape, "quantization": model.quantization}
    if model.backend == "transformers":
        return load_base(name, revision=revision, device=loading_device(args), **held)
    return backends.named(model.backend).load(name, revision=revision, max_length=config.data.max_length, **held)[0]


def _trainer(
    config: Config,
    args: FocalPOConfig,
    data: Mapping[str, Part],
    tokenizer: PreTrainedTokenizerBase,
    base: PreTrainedModel,
    quiet: bool,
) -> FocalPOTrainer:
    adapter, reference = config.adapter, config.reference
    start = None if adapter is None else adapter.start_from
    ref_model = None
    if reference is not None and reference.model is not None:
        try:
            ref_model = _load(reference.model, reference.revision, config, args)
        except InputError as error:
            raise InputError(f"reference.model, which is held as the policy's base is: {error}") from error
    return FocalPOTrainer(
        base if start is None else continue_adapter(base, Path(start)),
        ref_model,
        args=args,
        train_dataset=data["train"].tokens.pairs,
        eval_dataset=data["eval"].tokens.pairs if "eval" in data else None,
        processing_class=tokenizer,
        peft_config=None if adapter is None or start is not None else _lora_config(adapter, tokenizer),
        callbacks=[ProgressLine(quiet=quiet)],
    )


def _lora_config(adapter: Adapter, tokenizer: PreTrainedTokenizerBase) -> LoraConfig:
    """The fresh adapter's configuration; trained tokens are named by text, and found by the tokenizer."""
    tokens = trainable_token_ids(adapter.trainable_tokens, tokenizer) or None
    return lora_config(**lora_arguments(adapter), trainable_token_indices=tokens)


def _held_out_metrics(trainer: FocalPOTrainer) -> Mapping[str, float]:
    """Of the finished adapter: evaluated now if the last step was not, or a kill came between the two."""
    if trainer.eval_dataset is None:
        return {}
    last = [e for e in trainer.state.log_history if "eval_loss" in e and e["step"] == trainer.state.global_step]
    return last[-1] if last else trainer.evaluate()


def _write_run_files(folder: Path, config: Config, manifest: Mapping[str, Any], data: Mapping[str, Part]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if "eval" in data:
        write_held_out(folder / HELD_OUT_FILE, data["eval"].tokens.pairs[:GATE_PAIRS])
    write_atomically(folder / CONFIG_FILE, resolved_yaml(config))
    write_atomically(folder / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")
