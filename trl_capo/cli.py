"""The `trl-capo` command: `trl-capo train --config recipe.yaml`, `trl-capo demo`, ...

Each command is a module in `trl_capo.scripts` with a `main(argv)`. A command is imported only when you choose it, so
that `trl-capo --help` answers immediately. Neither this module nor its imports may import torch or TRL.
"""

import difflib
import importlib
import os
import signal
import sys

from trl_capo import __version__
from trl_capo.errors import UserError, UserErrors, one_line
from trl_capo.processes import Stopped, stopping_on_signals


# One line per command: the name of its module in `trl_capo.scripts`, and its description in `--help`.
COMMANDS = {
    "train": "train a model with CAPO or GRPO (see trl-capo train --help, recipes/)",
    "data": "check a dataset, or keep the questions that a model answers right only sometimes",
    "evaluate": "sample, grade and measure how far you can trust a model's confidence",
    "abstain": "choose the confidence below which a model should not answer",
    "answer": "ask a model that abstains when it is not confident enough",
    "report": "compare the samples of several runs on one page",
    "compare": "train several methods from one base and test which differences are real",
    "push": "upload a trained model to the Hub, or resume a failed upload",
    "demo": "train GRPO and CAPO side by side on a tiny model, on the CPU, in minutes",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0 on success, 2 if the user has something to fix.

    A command stopped by a signal returns 128 plus the signal's number, as shells do.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        print(_help(), file=sys.stderr)
        return 2
    name, *arguments = argv
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"trl-capo {__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(COMMANDS)}"
        print(f"trl-capo: error: unknown command '{name}': {hint}", file=sys.stderr)
        return 2

    try:
        with stopping_on_signals(name):
            return importlib.import_module(f"trl_capo.scripts.{name}").main(arguments) or 0
    except KeyboardInterrupt as error:
        number = error.signal if isinstance(error, Stopped) else signal.SIGINT
        print(f"\ntrl-capo {name}: stopped by {number.name}{_how_to_resume(name, arguments)}", file=sys.stderr)
        return 128 + number
    except (OSError, UserError) as error:  # the user can fix these; any other error keeps its traceback
        if os.environ.get("TRL_CAPO_TRACEBACK"):
            raise
        for problem in error.problems if isinstance(error, UserErrors) else [_one_line(error)]:
            print(f"trl-capo {name}: error: {problem}", file=sys.stderr)
        return 2


def _help() -> str:
    commands = "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())
    return f"""usage: trl-capo [-h] [--version] COMMAND ...

Calibration-Aware Policy Optimization for TRL.

commands:
{commands}

trl-capo COMMAND --help shows a command's own options.
TRL_CAPO_TRACEBACK=1 shows the whole traceback of an error."""


def _how_to_resume(name: str, arguments: list[str]) -> str:
    if name == "train" and not any(word.startswith("--resume_from_checkpoint") for word in arguments):
        return ". To resume from its last checkpoint, add --resume_from_checkpoint true"
    resumes = name in ("train", "evaluate", "compare", "demo") or arguments[:1] == ["filter"]
    return ". Rerun the same command to resume" if resumes else ""


def _one_line(error: OSError | UserError) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return one_line(str(error)) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
