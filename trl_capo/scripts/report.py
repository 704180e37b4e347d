"""`trl-capo report`: one self-contained page that compares the samples of any number of runs.

    trl-capo report runs/evaluation/base runs/evaluation/capo --output report.html

    trl-capo report runs/evaluation/capo --model_card runs/capo

A run is a `samples.parquet` or its folder. Training curves are drawn for runs whose `trainer_state.json` is given.
"""

import argparse
import sys
from pathlib import Path

from trl_capo.cli import main as cli_main
from trl_capo.errors import UserError
from trl_capo.extras import require


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-capo report", description=__doc__.split("\n\n")[0])
    parser.add_argument("samples", nargs="+", help="samples.parquet files or their folders; the first is the baseline")
    parser.add_argument("--names", nargs="+", help="what to call the runs (default: their folders)")
    parser.add_argument(
        "--trainer_states",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="trainer_state.json of a run, for its curves",
    )
    parser.add_argument("--output", default="report.html", help="where the page goes (default: %(default)s)")
    parser.add_argument("--model_card", metavar="FOLDER", help="folder of a model whose card gets tables and figures")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read, check, write."""
    args = make_parser().parse_args(argv)
    if missing := [path for path in args.samples if not Path(path).exists()]:
        raise UserError(
            f"{missing[0]} does not exist. Give samples.parquet or its folder, as `trl-capo evaluate MODEL "
            "--benchmark ...` makes them."
        )
    if args.model_card is not None and not Path(args.model_card).is_dir():
        raise UserError(f"--model_card takes the folder of a model; {args.model_card} is none.")
    import numpy as np

    from trl_capo.evaluation.samples import read_samples
    from trl_capo.publish.card import add_to_model_card
    from trl_capo.report.page import read_history, run_names, write_report

    require("report")
    names = args.names or run_names(args.samples)
    if len(names) != len(args.samples) or len(set(names)) != len(names):
        raise UserError(f"{len(args.samples)} runs need as many different --names, got {', '.join(names)}.")
    histories = {}
    for pair in args.trainer_states:
        name, _, file = pair.partition("=")
        if name not in names or not file:
            raise UserError(f"--trainer_states takes NAME=FILE with a NAME of {', '.join(names)}, got {pair!r}.")
        histories[name] = read_history(Path(file))
    runs = {name: read_samples(path) for name, path in zip(names, args.samples, strict=True)}
    for name, sets in runs.items():
        for samples in sets:
            if np.isnan(samples.correct).all():
                print(
                    f"Note: no answer of {name} to {samples.benchmark} is graded, because no gold answer can be read. "
                    "Every number that needs grades is undefined.",
                    file=sys.stderr,
                )
    path = write_report(runs, args.output, histories=histories)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB), with figures and {path.with_suffix('.md').name} beside it")
    if args.model_card is not None:
        print(f"Also in {add_to_model_card(path.with_suffix('.md'), args.model_card)}")


if __name__ == "__main__":
    sys.exit(cli_main(["report", *sys.argv[1:]]))
