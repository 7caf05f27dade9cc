"""Files that are whole or not there: models, texts, and checkpoints of a run that may be killed at any moment."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from zipfile import ZipFile

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

__all__ = ["WholeCheckpoints", "check_output_dir", "check_writable", "locked", "whole_files", "write_whole"]

logger = logging.get_logger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"  # of transformers.trainer, which is slow to import
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
PARTIAL, LOCK = "_saving-", "_lock"  # the Hub's uploads of a trainer leave out what begins with `_`
# A checkpoint to resume from has a file of each line: by the names of one process, DeepSpeed and FSDP.
NEEDED = [
    ("model.safetensors", "model.safetensors.index.json", ADAPTER_FILES[1], "global_step*", "pytorch_model_fsdp*"),
    ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    ("scheduler.pt", "global_step*"),
    ("rng_state.pth", "rng_state_0.pth"),
]
NEVER = torch.iinfo(torch.long).max


def check_writable(directory: str | os.PathLike) -> None:
    """Raise `OSError` if a directory cannot be made or written into."""
    path = Path(directory).resolve()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(f"{directory} cannot be written, since {there} is no directory you may write to.") from error


def check_output_dir(directory: str | os.PathLike) -> None:
    """Raise `OSError` if a directory cannot be made or written into, `ValueError` if another run is writing there."""
    check_writable(directory)
    if Path(directory, LOCK).exists() and PartialState().is_main_process:
        with locked(directory):
            pass


@contextmanager
def locked(directory: str | os.PathLike) -> Iterator[None]:
    """Within, no other run writes into a directory, which is made. The system frees the lock, however a run ends."""
    path = Path(directory, LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"Another run is writing {directory}: wait for it, or write elsewhere.") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def whole_files(directory: str | os.PathLike) -> Iterator[str]:
    """
    Write files into a directory so that each has its name only once it is whole: they are written into a new directory
    inside, which is yielded, and renamed at the end, the weights first and `config.json` last. (A model of several
    files is a mixture for the moment of renaming.) A model's weights replace those of an earlier model or adapter,
    which would be read instead; an adapter leaves an earlier model's, since it is found first. What a killed process
    has left is removed.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(f"{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=PARTIAL) as partial:
        yield partial
        written = sorted(os.listdir(partial), key=lambda name: (name.endswith(".json"), name == "config.json", name))
        for name in written:
            source = Path(partial, name)
            if source.is_dir():
                shutil.copytree(source, directory / name, dirs_exist_ok=True)
            else:
                os.replace(source, directory / name)
        if any(WEIGHT_FILES.fullmatch(name) for name in written):
            for path in directory.iterdir():
                if (WEIGHT_FILES.fullmatch(path.name) or path.name in ADAPTER_FILES) and path.name not in written:
                    path.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write a text file that has its name only once it is whole; its directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=PARTIAL) as directory:
        new = Path(directory, path.name)
        new.write_text(text, encoding="utf-8")
        new.replace(path)


class WholeCheckpoints:
    """
    For a [`~transformers.Trainer`]: a run has its output directory for itself, ends before it logs, evaluates or saves
    what is not finite, and never goes on from a checkpoint that is damaged or was not written to its end.

    The trainer's state is the last file of a checkpoint. With the barrier set here before it, a checkpoint that has it
    has everything of all processes, and older ones are removed only then.

    Overrides of [`~transformers.Trainer`]: `train` (the lock; which checkpoint is the last, and what if there is
    none), `_init_training_state` (a run that has ended is not trained on), `_save_checkpoint` (nothing of an earlier
    run stays in it), `_save_rng_state` (the barrier), `training_step`, `_get_grad_norm` and `_maybe_log_save_evaluate`
    (whether losses, gradients and weights are finite).
    """

    _first_bad_step = torch.tensor(NEVER)  # on the device, so that no step waits for it

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        Train, as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): `True` goes on from the last whole checkpoint of
                `output_dir`, and begins at the start if there is none, so that a run that was killed can be started
                again by the same command. A directory must be a whole checkpoint.
            kwargs: The parent's `trial` and `ignore_keys_for_eval`.

        Raises:
            ValueError: If the given checkpoint is not whole, or `output_dir` has those of more than one run or is
                being written by another; `OSError` if it cannot be written.
            FloatingPointError: If a loss, a gradient or a weight is not finite; the message names the step.
        """
        check_output_dir(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
        elif resume_from_checkpoint:
            check_whole(resume_from_checkpoint)
        own = "rng_state.pth" if self.args.world_size == 1 else f"rng_state_{self.args.process_index}.pth"
        if resume_from_checkpoint and not Path(resume_from_checkpoint, own).exists():
            logger.warning(f"{resume_from_checkpoint} has no {own}: this is not as if the run had never stopped.")
        if resume_from_checkpoint:
            self._check_resumed(resume_from_checkpoint)
        with locked(self.args.output_dir) if self.is_world_process_zero() else nullcontext():
            return super().train(resume_from_checkpoint, **kwargs)

    def _check_resumed(self, checkpoint: str) -> None:
        """For a trainer that knows what its model is: raise `ValueError` for a checkpoint of another."""

    def _last_checkpoint(self) -> str | None:
        """Found by the main process: the file systems of others need not show the same at once, or at all."""
        checkpoints = whole_checkpoints(self.args.output_dir) if self.is_world_process_zero() else []
        checkpoint = str(checkpoints[-1]) if checkpoints else None
        states = [json.loads((path / TRAINER_STATE_NAME).read_text()) for path in checkpoints]
        logs = [[json.dumps(entry) for entry in state["log_history"]] for state in states]  # a NaN equals itself
        # In one run, the log of an earlier checkpoint is the beginning of the last one's.
        others = [str(path) for path, log in zip(checkpoints, logs, strict=True) if log != logs[-1][: len(log)]]
        checkpoint, others = broadcast_object_list([checkpoint, others])
        if others:
            raise ValueError(
                f"{checkpoint} does not go on from {others[0]}: their logs are of two runs. Remove the checkpoints of "
                "one, or give the checkpoint to resume from."
            )
        if checkpoint is None:
            logger.warning(f"{self.args.output_dir} has no checkpoint to resume from: training begins at the start.")
        return checkpoint

    def training_step(self, *args, **kwargs):
        return self._note_if_not_finite(super().training_step(*args, **kwargs))

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        # The scaler of fp16 tries scales that are too large, and skips such steps. DeepSpeed may not know the norm.
        if norm is not None and self.accelerator.mixed_precision != "fp16":
            self._note_if_not_finite(torch.as_tensor(norm).sqrt())  # DeepSpeed says -1 for one that is not finite
        return norm

    def _note_if_not_finite(self, value: torch.Tensor) -> torch.Tensor:
        first = self._first_bad_step.to(self.args.device)
        is_finite = (value.to_local() if isinstance(value, DTensor) else value).to(first.device).isfinite()
        self._first_bad_step = torch.where(is_finite, first, first.clamp(max=self.state.global_step + 1))
        return value

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        control = self.control
        may_save = control.should_save or control.should_evaluate or control.should_training_stop
        if may_save or control.should_log:
            self._check_finite(with_weights=may_save)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _check_finite(self, with_weights: bool) -> None:
        """End the run on all processes if anything was not finite on one; waits for what was computed so far."""
        for weight in self.model.parameters() if with_weights else ():
            if weight.requires_grad:  # what cannot be squared and added up cannot be computed with
                self._note_if_not_finite(torch.linalg.vector_norm(weight.detach(), dtype=torch.float32))
        first = self.accelerator.gather(self._first_bad_step.to(self.args.device)[None]).min().item()
        if first != NEVER:
            self._first_bad_step = torch.tensor(NEVER)  # for another `train`
            raise FloatingPointError(
                f"The loss, a gradient or a weight is not finite at step {min(first, self.state.global_step)}, so the "
                "run ends: lower `learning_rate`, or see where it begins by `--debug underflow_overflow`."
            )

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args):
        begun = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        # The parent would take another step where the end was within an epoch.
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begun

    def _save_checkpoint(self, model, trial):
        directory = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save and directory.exists():  # of an earlier run in the same directory
            (directory / TRAINER_STATE_NAME).unlink(missing_ok=True)  # first: what is deleted in part is not whole
            shutil.rmtree(directory)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()


def whole_checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints in `directory` that can be resumed from, in the order of their steps; a warning names others."""
    paths = Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    steps = {int(step): path for path in paths if (step := path.name.rpartition("-")[2]).isdecimal()}
    faults = {steps[step]: why_not_whole(steps[step]) for step in sorted(steps)}
    if passed := [f"{path}, since {reason}" for path, reason in faults.items() if reason]:
        logger.warning(f"Checkpoints that cannot be resumed from are passed over: {'; '.join(passed)}.")
    return [path for path, reason in faults.items() if reason is None]


def check_whole(checkpoint: str | Path) -> None:
    """Raise `ValueError` if a checkpoint cannot be resumed from."""
    if reason := why_not_whole(checkpoint):
        raise ValueError(
            f"{checkpoint} is no whole checkpoint: {reason}. Give an earlier one, or `True` for the last whole one."
        )


def why_not_whole(checkpoint: str | Path) -> str | None:
    """What keeps a checkpoint from being resumed from, as far as that is told without reading tensors; else `None`."""
    checkpoint = Path(checkpoint)
    if not (checkpoint / TRAINER_STATE_NAME).exists():
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    needed = NEEDED + [(f"rng_state_{rank}.pth",) for rank, _ in enumerate(checkpoint.glob("rng_state_*.pth"))]
    needed += [(name,) for name in ADAPTER_FILES if any(checkpoint.glob("adapter_*"))]
    for path in sorted(checkpoint.rglob("*.*")):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                with ZipFile(path) as archive:
                    _ = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
            elif path.suffix == ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
                if WEIGHT_FILES.fullmatch(path.name):  # the index of several files
                    needed += [(name,) for name in {*content["weight_map"].values()}]
        except Exception as error:  # whatever a reader raises for what it cannot read
            return f"its {path.relative_to(checkpoint)} is damaged ({error})"
    missing = [" or ".join(names) for names in needed if not any(any(checkpoint.glob(name)) for name in names)]
    return f"it has no {', no '.join(missing)}" if missing else None
