"""Files that are whole or not there: models, texts, and checkpoints of a run that may be killed at any moment."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

__all__ = ["NOT_WHOLE", "WholeCheckpoints", "is_whole", "new_files", "whole_checkpoints", "whole_files"]

logger = logging.get_logger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"  # of transformers.trainer, which is slow to import
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
PARTIAL = "_saving-"  # the Hub's uploads of a trainer leave out what begins so
NOT_WHOLE = (
    f"{{}} is no whole checkpoint: its {TRAINER_STATE_NAME}, which is written last, is missing or cut off, or it has "
    "no optimizer (`save_only_model`). Give an earlier one, or `True` for the last that is whole."
)


@contextmanager
def whole_files(directory: str | os.PathLike) -> Iterator[str]:
    """
    Write files into a directory so that each has its name only once it is whole: they are written into a new directory
    inside, which is yielded, and renamed at the end, the weights first and `config.json` last. (A model of several
    files is a mixture for the moment of renaming.) A model's weights replace those of an earlier model or adapter,
    which would be read instead; an adapter's leave a model's, which are then not read. What a killed process has left
    is removed.
    """
    os.makedirs(directory, exist_ok=True)
    for name in os.listdir(directory):
        if name.startswith(PARTIAL):
            shutil.rmtree(os.path.join(directory, name), ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=PARTIAL) as partial:
        yield partial
        written = sorted(os.listdir(partial), key=lambda name: (name.endswith(".json"), name == "config.json", name))
        for name in written:
            source, target = os.path.join(partial, name), os.path.join(directory, name)
            if os.path.isdir(source):
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                os.replace(source, target)
        if any(WEIGHT_FILES.fullmatch(name) for name in written):
            for name in os.listdir(directory):
                if (WEIGHT_FILES.fullmatch(name) or name in ADAPTER_FILES) and name not in written:
                    os.remove(os.path.join(directory, name))


@contextmanager
def new_files(paths: Sequence[str | os.PathLike], overwrite: bool = False) -> Iterator[list[TextIO]]:
    """
    Text files to write, in UTF-8, which get their names at the end, and only if nothing went wrong. Their directories
    are made.

    Raises:
        FileExistsError: If one is there already, unless `overwrite` is set.
    """
    existing = [str(path) for path in paths if os.path.exists(path)]
    if existing and not overwrite:
        raise FileExistsError(f"{', '.join(existing)}: already there: remove it, or set `overwrite`.")
    with ExitStack() as directories:
        partial = []
        for path in map(Path, paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            directory = tempfile.TemporaryDirectory(dir=path.parent, prefix=PARTIAL)
            partial.append(Path(directories.enter_context(directory), path.name))
        with ExitStack() as files:
            yield [files.enter_context(path.open("w", encoding="utf-8")) for path in partial]
        for source, path in zip(partial, paths, strict=True):
            os.replace(source, path)


class WholeCheckpoints:
    """
    For a [`~transformers.Trainer`]: resuming never begins from a checkpoint that was not written to its end.

    The trainer's state is the last file of a checkpoint. With the barrier set here before it, a checkpoint that has it
    has everything of all processes, and older ones are removed only then. Without a random state (`save_only_model`),
    a checkpoint has no optimizer either, and is none to resume from.

    Overrides of [`~transformers.Trainer`]: `train` (which checkpoint is the last, and what if there is none),
    `_init_training_state` (a run that has ended is not trained on), `_save_checkpoint` (nothing of an earlier run
    stays in it) and `_save_rng_state` (the barrier).
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        Train, as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): `True` goes on from the last whole checkpoint of
                `output_dir`, and begins at the start if there is none, so that a run that was killed can be started
                again by the same command. A directory must be a whole checkpoint.
            kwargs: The parent's `trial` and `ignore_keys_for_eval`.

        Raises:
            ValueError: If the given checkpoint is not whole, or `output_dir` has checkpoints of more than one run.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
        elif resume_from_checkpoint and not is_whole(resume_from_checkpoint):
            raise ValueError(NOT_WHOLE.format(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, **kwargs)

    def _last_checkpoint(self) -> str | None:
        """Found by the main process: the file systems of others need not show the same at once, or at all."""
        checkpoints = whole_checkpoints(self.args.output_dir)
        checkpoint, logs = (str(checkpoints[-1]), _logs(checkpoints[-1])) if checkpoints else (None, [])
        # Of one run, the logs of each are the beginning of the last one's.
        others = [str(path) for path in checkpoints for log in [_logs(path)] if log != logs[: len(log)]]
        checkpoint, others = broadcast_object_list([checkpoint, others])
        if others:
            raise ValueError(
                f"{checkpoint} does not go on from {others[0]}: their logs are of two runs. Remove the checkpoints of "
                "one, or give the checkpoint to resume from."
            )
        if checkpoint is None:
            logger.warning(f"{self.args.output_dir} has no checkpoint to resume from: training begins at the start.")
        return checkpoint

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
    """The checkpoints in `directory` that were written to their ends, in the order of their steps."""
    paths = Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    steps = {int(step): path for path in paths if (step := path.name.rpartition("-")[2]).isdecimal()}
    return [steps[step] for step in sorted(steps) if is_whole(steps[step])]


def _logs(checkpoint: Path) -> list[str]:
    """As texts, of which that of NaN equals itself."""
    return [json.dumps(entry) for entry in json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["log_history"]]


def is_whole(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was written to its end, and can be resumed from."""
    try:
        json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return any(Path(checkpoint).glob("rng_state*.pth"))
