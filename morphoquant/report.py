"""One HTML file about some runs: ``python -m morphoquant.report RUNS [--output report.html]``.

RUNS is the folder that holds run directories (``runs/``), one or more run directories, or a
sweep's folder. The file needs no network and no server; ``analysis.report`` says what is in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

OUTPUT = "report.html"
EXIT_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; returns the exit code of the process.

    0: written; 1: there is nothing to report, or it cannot be written; 2: wrong arguments.
    """
    options = _parser().parse_args(arguments)
    # Here, so that --help answers at once.
    from morphoquant.analysis.page import gather, render
    from morphoquant.errors import HarnessError
    from morphoquant.tracking.rundir import write_atomic

    output: Path = options.output
    try:
        if output.is_dir():
            raise HarnessError(f"--output {output}: a folder; name a file, as {output / OUTPUT}")
        gathered = gather(options.runs)
        page = render(gathered, most_atlases=options.figures).encode()
        write_atomic(output, lambda path: _write(path, page))
    except HarnessError as error:
        print(f"No report: {error}", file=sys.stderr)
        return EXIT_FAILED
    told = [f"{len(gathered.runs)} finished runs"]
    told += [f"{len(gathered.unfinished)} unfinished"] if gathered.unfinished else []
    told += [f"{len(gathered.failures)} failed jobs"] if gathered.failures else []
    print(f"Report: {output} ({len(page) / 1e6:.1f} MB; {', '.join(told)})")
    return 0


def _write(path: Path, page: bytes) -> None:
    path.write_bytes(page)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m morphoquant.report",
        description="Write one self-contained HTML file about finished runs.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUNS",
        help="a folder of run directories, run directories, or a sweep's folder",
    )
    parser.add_argument(
        "--output", type=Path, default=Path(OUTPUT), metavar="FILE", help=f"default: {OUTPUT}"
    )
    parser.add_argument(
        "--figures",
        type=_count,
        default=8,
        metavar="N",
        help="runs whose figures are drawn (default: 8; about a megabyte each)",
    )
    return parser


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of runs (0 or more)")
    return number


if __name__ == "__main__":
    sys.exit(main())
