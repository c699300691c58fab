"""The command ``lit-stepwise``. Answers what it can before it imports anything heavy."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence

COMMANDS = {
    "plan": "say what a run costs, and whether it fits, before anything is loaded",
    "fit": "train: play, give credit, update, sync, play again",
    "validate": "play the validation tasks greedily and print the metrics",
    "test": "the same with the test tasks",
    "predict": "the same without metrics",
    "play": "play tasks and write the trajectories, without a Trainer",
    "show": "look at a run: curves, groups, every turn",
    "compare": "two runs side by side",
    "report": "make one HTML file about a run: curves, and trajectories turn by turn",
    "export": "make a Hugging Face folder of a checkpoint",
    "serve": "start a vLLM server for rollout.engine VLLMServerEngine",
    "data": "see what tasks need, check their gold statements, convert them to DuckDB",
    "warmup": "make a tiny model that knows the text-to-SQL protocol",
}

USAGE = """usage: lit-stepwise COMMAND [--config FILE ...] [--section.key VALUE ...]

Step-wise, multi-turn reinforcement learning of language-model agents inside PyTorch Lightning.

commands:
{commands}

lit-stepwise COMMAND --help lists every setting; --print_config prints the whole configuration.
example: lit-stepwise fit --config configs/tiny.yaml --model.loss.dual 4"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0, 1 for an error of the run, 2 for one of the command line."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())))
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"lit-stepwise {version('lit-stepwise')}")
        return 0
    if words[0] not in COMMANDS:
        return _fail(f"unknown command '{words[0]}'{_suggestion(words[0], COMMANDS)}; see lit-stepwise --help", 2)
    _prepare_process()
    from lit_stepwise.errors import StepwiseError

    try:
        return _run(words)
    except StepwiseError as error:
        return _fail(str(error), 1)
    except ValueError as error:
        if isinstance(error.__cause__, StepwiseError):  # jsonargparse wraps what an optional setting's class says
            return _fail(str(error.__cause__), 1)
        raise
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _run(words: list[str]) -> int:
    if words[0] == "data":
        from lit_stepwise.data_commands import run as run_data

        return run_data(words[1:])
    if words[0] in ("show", "compare"):
        from lit_stepwise.viewer.command import run as look

        return look(words)
    if words[0] == "report":
        from lit_stepwise.report.command import run as run_report

        return run_report(words[1:])
    if words[0] == "warmup":
        from lit_stepwise.warmup import warmup

        _call(warmup, words[1:])
    elif words[0] == "serve":
        from lit_stepwise.serve import serve

        _call(serve, words[1:])
    elif words[0] == "export":
        from lit_stepwise.export.command import export

        _call(export, words[1:], as_positional=True)
    else:
        gc.disable()  # imports leave no garbage, and looking for it takes a tenth of the start
        if words[0] == "plan":
            from lit_stepwise.plan_command import run
        else:
            from lit_stepwise.commands import run

        gc.enable()
        run(words)
    return 0


def _call(command: Callable[..., None], words: list[str], as_positional: bool = False) -> None:
    """Its parameters are its options; with ``as_positional`` those without a default are given by place."""
    from jsonargparse import auto_cli

    auto_cli(command, args=words, as_positional=as_positional, prog=f"lit-stepwise {command.__name__}")


def _prepare_process() -> None:
    """What has to be so before torch is imported."""
    # a console script does not put the working directory on the path, and callbacks/ is found from there
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    # idle OpenMP threads that spin slow a busy machine down up to ten times
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():  # bars that move would be lines of control codes in a file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _suggestion(word: str, known: Sequence[str] | dict[str, str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


if __name__ == "__main__":
    sys.exit(main())
