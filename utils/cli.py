"""Command line of all scripts: [CONFIG] [section.key=value ...] [--dry-run] [--help].

Exit codes: 0 success, 1 diverged, another process lost or unexpected error, 2 UserError, 128+N stopped by signal N.
Does not import torch, which takes seconds, so that --help and config errors appear at once.
"""

import contextlib
import functools
import os
import re
import shlex
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Callable

from config import Config
from utils.errors import Diverged, ProcessLost, Stopped, UserError
from utils.files import printable
from utils.settings import DEFAULT_CONFIG, help_text, load_config

# Huge pages for CPU tensors make training up to 1.4x faster. torch reads this variable when it is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

IS_MAIN = os.environ.get("RANK", "0") == "0"
if not IS_MAIN:
    os.environ["TQDM_DISABLE"] = "1"  # tqdm reads this variable when it is imported

HELP_FLAGS = {"--help", "-h"}

command = ""  # command line of this process; reports and PNG files store it


def parse(argv: list[str]) -> tuple[Config, bool]:
    """Return the config and whether --dry-run is set."""
    flags = [argument for argument in argv if argument.startswith("-")]
    overrides = [argument for argument in argv if re.match(r"\w[\w.]*=", argument)]
    paths = [argument for argument in argv if argument not in overrides and argument not in flags]
    unknown = set(flags) - HELP_FLAGS - {"--dry-run"}
    if unknown:
        raise UserError(f"unknown option {min(unknown)}: use --dry-run, --help, or section.key=value for a setting")
    if len(paths) > 1:
        raise UserError(f"at most one config file is allowed (got {len(paths)}: {' '.join(paths)})")
    return load_config(paths[0] if paths else DEFAULT_CONFIG, overrides), "--dry-run" in flags


def handle_help(doc: str) -> None:
    """Print the help text or config errors and exit, before the slow import of torch."""
    if HELP_FLAGS & set(sys.argv[1:]):
        if IS_MAIN:
            print(help_text(doc))
        sys.exit(0)
    try:
        parse(sys.argv[1:])
    except UserError as error:
        if IS_MAIN:
            print(f"error: {error}", file=sys.stderr)
        else:
            time.sleep(2)  # torchrun ends all processes when one exits: rank 0 must have printed the error
        sys.exit(2)


@functools.cache
def commit() -> str:
    """Return the commit hash, with -dirty if files outside results/ have changed; "" outside a git checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)

    try:
        if Path(git("rev-parse", "--show-toplevel").stdout.strip() or "/") != root:  # no checkout of this project
            return ""
        dirty = git("diff", "--quiet", "HEAD", "--", ".", ":!results").returncode
        return git("rev-parse", "--short", "HEAD").stdout.strip() + ("-dirty" if dirty else "")
    except OSError:
        return ""


def run(work: Callable[[Config, bool], None], doc: str, argv: list[str] | None) -> int:
    """Call work(config, dry_run) and return the exit code. Expected errors are printed as one line."""
    global command
    argv = sys.argv[1:] if argv is None else argv
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # like stderr, because file names can contain invalid UTF-8
    command = printable(shlex.join(["python", Path(sys.modules[work.__module__].__file__).name, *argv]))
    if HELP_FLAGS & set(argv):
        print(help_text(doc))
        return 0

    from utils import distributed, locks

    try:
        config, dry_run = parse(argv)
        distributed.init()
        commit()  # look up the git commit at the start: another one may be checked out during the run
        if IS_MAIN and not dry_run:
            clean_up(config)
        if not dry_run:
            distributed.require_shared(config.run_dir)
        with contextlib.nullcontext() if IS_MAIN else contextlib.redirect_stdout(open(os.devnull, "w")):
            work(config, dry_run)
        distributed.cleanup()
        return 0
    except BaseException as error:
        message, code = exit_message(error)
        stopped = isinstance(error, Stopped)
        if message is None and distributed.world_size() == 1:
            raise
        message = message or f"error: {traceback.format_exc()}"
    finally:
        locks.release_all()
    if IS_MAIN:
        print(message, file=sys.stderr)
    elif message.startswith("error: "):
        # If rank 0 fails with the same error, only rank 0 should print it. torchrun then ends this process during the sleep.
        time.sleep(2)
        print(f"process {os.environ['RANK']}: {message}", file=sys.stderr)
    if distributed.world_size() > 1:
        if stopped:  # on all ranks: wait until rank 0 has closed its logs
            distributed.cleanup()
        # Exit without cleanup, which would hang while other ranks wait in a collective operation. torchrun ends those ranks.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def clean_up(config: Config) -> None:
    """Remove temporary files that killed processes have left."""
    from utils.files import remove_leftovers

    remove_leftovers(config.run_dir, "**/*")
    remove_leftovers(Path(config.runs_dir) / "cache")
    remove_leftovers(Path(config.results_dir))
    remove_leftovers(Path(config.results_dir), "*/*")


def exit_message(error: BaseException) -> tuple[str | None, int]:
    """Return a one-line message (None for an unexpected error) and the exit code."""
    from utils.device import is_out_of_memory
    from utils.files import DISK_FULL_ERRNOS, first_line

    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, (Diverged, ProcessLost)):
        return f"error: {error}", 1
    if isinstance(error, Stopped):
        return str(error), 128 + error.signal_number
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
        path = error.filename or "the run directory"
        return (
            f"error: no space left on the disk of {path}; saved files are intact: free space and run the same command again",
            2,
        )
    if is_out_of_memory(error):
        return f"error: out of memory: use a smaller batch_size or, in training, micro_batch ({first_line(error)})", 2
    return None, 1
