"""Report on runs: a picture and figures of one or several, one run as a page for a browser, or one prompt's history.

python -m cero_jax.report RUN [RUN ...] [--output report.png]   # and print how each run's allocation works
python -m cero_jax.report RUN --html run.html   # a page with every prompt's history and samples
python -m cero_jax.report RUN --prompt 7        # print the history of prompt 7
"""

import argparse
from collections.abc import Sequence

from cero_jax.paths import local_path
from cero_jax.report.html import write_page
from cero_jax.report.picture import draw_report
from cero_jax.report.read_run import prompt_history, read_run
from cero_jax.report.summary import describe
from cero_jax.terminal import printable


def main(args: Sequence[str] | None = None) -> None:
    """The command line. Exits with a one-line message where a run cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m cero_jax.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's directory, e.g. runs/chain_sum-cero-0")
    parser.add_argument("--output", default="report.png", help="the picture to write (default: %(default)s)")
    parser.add_argument("--html", metavar="FILE", help="write a page about the first run instead")
    parser.add_argument(
        "--prompt", metavar="ID", type=int, help="print the history of one of the first run's prompts instead"
    )
    parsed = parser.parse_args(args)
    try:
        if parsed.prompt is not None:
            print(prompt_history(read_run(parsed.runs[0]), parsed.prompt))
        elif parsed.html:
            page = local_path(parsed.html)
            write_page(read_run(parsed.runs[0]), page)
            print(printable(str(page)))
        else:
            picture = local_path(parsed.output)
            draw_report(parsed.runs, picture)
            for run in parsed.runs:
                print(printable(describe(read_run(run))), end="\n\n")
            print(printable(str(picture)))
    except (OSError, ValueError) as error:
        parser.error(printable(str(error)))


if __name__ == "__main__":
    main()
