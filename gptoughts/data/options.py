"""Command-line arguments about input text that both data tools share."""

from __future__ import annotations

import jsonargparse

DEFAULT_EXCLUDE = (".*", "__pycache__", "site-packages", "dist-packages", "node_modules")


def add_input_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Add --input, --suffix, --exclude, --text_field and --encoding_errors."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=".jsonl, .jsonl.gz, .jsonl.zst and .parquet (a document per row), text files (one each), folders",
    )
    parser.add_argument(
        "--suffix", nargs="+", default=[], metavar=".EXT", help="in folders, only files that end so, e.g. .py .md"
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=list(DEFAULT_EXCLUDE),
        metavar="NAME",
        help="in folders, leave out files and folders whose name matches one of these patterns",
    )
    parser.add_argument("--text_field", default="text", help="the field of a row that holds its text")
    parser.add_argument(
        "--encoding_errors",
        default="replace",
        choices=["replace", "skip", "strict"],
        help="a text file that is not UTF-8: replace such bytes by U+FFFD, skip the file, or stop",
    )
