"""What every command does when it is run: keep libraries quiet, and turn errors into one screen."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from qframe.cli.screen import note, print_error
from qframe.errors import QframeError, RanksError
from qframe.launcher import launched

INTERNAL_ERROR = 1
TOGETHER = "quantize"  # the command that several processes can do together
_WORDS = "qframe.words"
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks, and the warnings of other libraries.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        envvar="QFRAME_THREADS",
        show_envvar=False,
        help="How many threads; results do not depend on it. Default: all cores.",
    ),
]


class Command(TyperCommand):
    """A command whose errors end in one screen of text on stderr and the right exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the words as they came, for whoever has to repeat them."""
        ctx.meta[_WORDS] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; it may have the parameters `debug` and `threads`."""
        debug = bool(ctx.params.get("debug"))
        try:
            check_launched(ctx.command.name)
            limit_threads(ctx.params.get("threads"))
            with _quiet(debug):
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except KeyboardInterrupt as error:
            notes = _notes(error)
            print_error(
                _by_rank("interrupted" if notes else "interrupted; no output was left behind"),
                notes,
            )
            raise typer.Exit(INTERRUPTED) from None
        except QframeError as error:
            _show_trace(debug)
            print_error(_by_rank(str(error)), _notes(error))
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            _show_trace(debug)
            message, hint = _unforeseen(error, debug)
            print_error(_by_rank(message), "\n       ".join(filter(None, (hint, _notes(error)))))
            raise typer.Exit(INTERNAL_ERROR) from None


def check_launched(command: str | None) -> None:
    """Raise RanksError where several processes were started for a command that is one's work."""
    _, size = launched()
    if size > 1 and command != TOGETHER:
        raise RanksError(
            f"qframe {command} was started as {size} processes, which can share the work of "
            f"qframe {TOGETHER} alone; start it without torchrun"
        )


def _by_rank(message: str) -> str:
    """Return a message with the number of the process, where there are several."""
    try:
        rank, size = launched()
    except RanksError:
        return message
    return f"rank {rank} of {size}: {message}" if size > 1 else message


def limit_threads(threads: int | None) -> None:
    """Let numba use no more threads than asked for; the rest of qframe is told by argument.

    numba reads its limit when it is imported, so this comes before anything imports it.
    """
    if threads is None:
        if launched()[1] == 1:
            return
        from qframe.parallel import default_threads  # with torch, which is slow

        threads = default_threads()
    if "numba" not in sys.modules:
        os.environ["NUMBA_NUM_THREADS"] = str(threads)
        return
    import numba

    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))


def words_of(ctx: typer.Context) -> list[str]:
    """Return the words of the command line that a command was given."""
    return [*ctx.command_path.split(), *ctx.meta.get(_WORDS, ())]


def _notes(error: BaseException) -> str:
    """Return what was added to an error on its way."""
    return "\n       ".join(getattr(error, "__notes__", ()))


def _show_trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()


def _unforeseen(error: Exception, debug: bool) -> tuple[str, str]:
    """Return what to say of an error that is not one of ours, and what to do about it."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return (
            f"out of memory ({type(error).__name__}: {text})",
            "fewer --num-calibration-samples or a smaller --max-seq-length need less; "
            "qframe quantize --dry-run estimates how much",
        )
    if isinstance(error, ImportError):
        return f"a library cannot be loaded: {text}", "qframe doctor says what is missing"
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename or 'the system says'}: {error.strerror}", ""
    hint = "please report it" if debug else "run it again with --debug to see where it happened"
    return f"internal error: {type(error).__name__}: {text}", hint


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Keep other libraries' warnings and progress bars off the screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        yield
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Fallbacks are logged as they happen and listed at the end; here the list is enough.
    logging.getLogger("qframe").addHandler(logging.NullHandler())
    with warnings.catch_warnings(), compiling_told():
        warnings.simplefilter("ignore")
        yield


class _Compiling(logging.Handler):
    """Says that kernels are being compiled, and keeps what there is to say in the end."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "compiled"):
            self.last = record.getMessage()
        else:
            note(record.getMessage())


@contextmanager
def compiling_told() -> Iterator[None]:
    """Let users know why a first run takes longer: its kernels are compiled, and then kept."""
    log, handler = logging.getLogger("qframe.compiling"), _Compiling(logging.INFO)
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        if handler.last:
            note(handler.last)
