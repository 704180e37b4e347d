"""`trl-capo push`: upload a trained model to the Hub, or resume a failed upload.

    trl-capo push runs/capo --repo_id me/qwen-capo --private

Uploads all files in one commit, so the Hub never shows half a model. Files that are already there are not sent again.
The card says how the model was trained, and contains the calibration report if the folder has one. The local folder
does not change.
"""

import argparse
import sys

from trl_capo.cli import main as cli_main
from trl_capo.publish.push import PushError, push_folder


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-capo push", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("folder", help="folder of the model: the output_dir of a run, or one of its checkpoints")
    parser.add_argument("--repo_id", required=True, help="name on the Hub: NAME, or OWNER/NAME")
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="upload only to a private repository, created if missing (default: hub_private_repo of the run)",
    )
    parser.add_argument("--dataset", help="dataset on the Hub that the card names (default: the run's)")
    parser.add_argument("--revision", help="existing branch to push to (default: main)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Upload. Returns 1 if the upload failed."""
    args = make_parser().parse_args(argv)
    try:
        push_folder(
            args.folder,
            args.repo_id,
            private=args.private,
            dataset=args.dataset,
            revision=args.revision,
        )
    except PushError as error:
        print(f"trl-capo push: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(cli_main(["push", *sys.argv[1:]]))
