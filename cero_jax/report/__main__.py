"""Report on runs: a picture and figures, a page for a browser, or one prompt's history.

python -m cero_jax.report RUN [RUN ...] [--output report.png]   # and print how each run's allocation works
python -m cero_jax.report RUN [RUN ...] --html run.html   # a page: curves, settings, prompts with history and samples
python -m cero_jax.report RUN [RUN ...] --serve           # the same, of runs that go on, at http://127.0.0.1:8000
python -m cero_jax.report RUN --prompt 7                  # print the history of prompt 7
"""

import argparse
import contextlib
from collections.abc import Sequence

from cero_jax import starting

if __name__ == "__main__":
    starting.name_what_is_missing()

from cero_jax.paths import local_path
from cero_jax.report.html import write_page
from cero_jax.report.picture import draw_report
from cero_jax.report.read_run import prompt_history, read_run
from cero_jax.report.serve import HOST, server
from cero_jax.report.summary import describe
from cero_jax.terminal import printable


def main(args: Sequence[str] | None = None) -> None:
    """The command line. Exits with a one-line message where a run cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m cero_jax.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's directory, e.g. runs/chain_sum-cero-0")
    parser.add_argument("--output", default="report.png", help="the picture to write (default: %(default)s)")
    parser.add_argument("--html", metavar="FILE", help="write a page about the runs instead")
    parser.add_argument(
        "--serve",
        metavar="PORT",
        nargs="?",
        type=_port,
        const=8000,
        help="show that page to browsers of this machine instead, and keep it fresh (default port: %(const)s)",
    )
    parser.add_argument(
        "--prompt", metavar="ID", type=int, help="print the history of one of the first run's prompts instead"
    )
    parsed = parser.parse_args(args)
    try:
        if parsed.prompt is not None:
            print(prompt_history(read_run(parsed.runs[0]), parsed.prompt))
        elif parsed.html:
            page = local_path(parsed.html)
            write_page([read_run(run) for run in parsed.runs], page)
            print(printable(str(page)))
        elif parsed.serve is not None:
            _serve(parsed.runs, parsed.serve)
        else:
            picture = local_path(parsed.output)
            draw_report(parsed.runs, picture)
            for run in parsed.runs:
                print(printable(describe(read_run(run))), end="\n\n")
            print(printable(str(picture)))
    except ModuleNotFoundError as error:
        parser.error(f"{error}: the picture needs it (pip install matplotlib); --html, --serve and --prompt do not")
    except (OSError, ValueError) as error:
        parser.error(printable(str(error)))


def _port(text: str) -> int:
    if not text.isdecimal() or not int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} must be a port, 0 to 65535 (0: any that is free)")
    return int(text)


def _serve(runs: Sequence[str], port: int) -> None:
    """Serve until Ctrl-C. Raises OSError where the port is taken or a run is not there."""
    for run in runs:
        if not local_path(run).is_dir():
            raise FileNotFoundError(f"{run}: no such run directory")
    try:
        serving = server(runs, port)
    except OSError as error:
        raise OSError(f"port {port} cannot be had ({error.strerror}): name another, --serve PORT") from error
    with serving, contextlib.suppress(KeyboardInterrupt):
        print(f"http://{HOST}:{serving.server_port}   (Ctrl-C ends it)", flush=True)
        serving.serve_forever()


if __name__ == "__main__":
    main()
