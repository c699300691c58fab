"""Which loggers a run has, and where they write: all that a run leaves behind is in one folder."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

_RUN_FOLDER = "RUN_FOLDER"
"""On the command line: the folder of a logger that was given none."""
_KEY_CHARACTERS = 40
"""A password in a netrc file that is as long may be a key of W&B, whichever host it is for."""


class NoLogger(CSVLogger):
    """``trainer.logger: false``: names the folder of the run, and writes nothing into it."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Nowhere."""

    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Nowhere."""

    def save(self) -> None:
        """Nothing to save."""

    def finalize(self, status: str) -> None:
        """Nothing to finish."""


def with_folders(words: Sequence[str]) -> list[str]:
    """The command line, in which a logger of files may be named without the ``save_dir`` that it asks for."""
    found: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        found.append(word)
        option, _, value = word.replace("+=", "=").partition("=")
        name = value if option == "--trainer.logger" else word if before.rstrip("+") == "--trainer.logger" else ""
        if name.rpartition(".")[2] in ("CSVLogger", "TensorBoardLogger"):
            found.append(f"--trainer.logger.save_dir={_RUN_FOLDER}")
    return found


def prepare_loggers(config: Any, root: str, words: Iterable[str], pages: Iterable[str]) -> None:
    """Settle what was left open in ``trainer.logger``, before any logger is made.

    Args:
        config: of ``trainer.logger``, as parsed; changed in place.
        root: ``trainer.default_root_dir``.
        words: the command line.
        pages: the text of each configuration file.
    """
    for each in config if isinstance(config, list) else [config]:
        name = str(getattr(each, "class_path", "")).rpartition(".")[2]
        if name in ("CSVLogger", "TensorBoardLogger") and each.init_args.save_dir == _RUN_FOLDER:
            each.init_args.save_dir = root
            each.init_args.name = "" if each.init_args.name == "lightning_logs" else each.init_args.name
        if name == "WandbLogger":
            if each.init_args.save_dir == "." and "WANDB_DIR" not in os.environ:
                each.init_args.save_dir = root
            if not _mode_is_given(words, pages) and not _has_key():
                os.environ["WANDB_MODE"] = "offline"
                rank_zero_info(
                    f"no key for W&B (WANDB_API_KEY, wandb login), so it logs offline; "
                    f"`wandb sync {Path(each.init_args.save_dir) / 'wandb'}/offline-run-*` sends that later"
                )


def complete(loggers: Any, root: str) -> list[Logger]:
    """``trainer.logger`` as a list whose first names the folder of the run, and writes ``metrics.csv`` into it.

    It is that of the first CSV or else TensorBoard logger; with neither the next free ``version_N`` below ``root``.
    """
    if loggers in (None, True, False, []):
        return [CSVLogger(root, name="") if loggers in (None, True) else NoLogger(root, name="")]
    found: list[Logger] = list(loggers) if isinstance(loggers, list) else [loggers]
    of_files = [each for each in found if isinstance(each, CSVLogger | TensorBoardLogger)]
    versions = [each.version for each in of_files]  # chosen now, before one of them makes a folder that another sees
    for each in of_files:
        if isinstance(each, CSVLogger):
            return [each, *(other for other in found if other is not each)]
    first = CSVLogger(of_files[0].save_dir, of_files[0].name, versions[0]) if of_files else CSVLogger(root, name="")
    return [first, *found]


def _mode_is_given(words: Iterable[str], pages: Iterable[str]) -> bool:
    """Whether the user said himself how W&B is to log."""
    if "WANDB_MODE" in os.environ:
        return True
    options = [word.partition("=")[0] for word in words if word.startswith("--trainer.logger")]
    if any(option.endswith((".offline", ".mode")) for option in options):
        return True
    return any(_mentions((yaml.safe_load(page) or {}).get("trainer", {}).get("logger")) for page in pages)


def _mentions(section: Any) -> bool:
    if isinstance(section, Mapping):
        return bool({"offline", "mode"} & section.keys()) or any(map(_mentions, section.values()))
    return isinstance(section, list) and any(map(_mentions, section))


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    places = [Path(os.environ[name]) for name in ("NETRC",) if name in os.environ]
    for path in places or [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            passwords = [entry[2] for entry in netrc.netrc(path.expanduser()).hosts.values()]
        except (OSError, netrc.NetrcParseError):
            continue
        if any(len(password or "") >= _KEY_CHARACTERS for password in passwords):
            return True
    return False
