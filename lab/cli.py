"""The command line that all stages share: [CONFIG] [section.key=value ...] [--dry-run] [--help], and exit codes.

0 done · 1 training diverged · 2 something the user can put right, said in one line · 128+N stopped by signal N
"""

import contextlib
import errno
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
from lab.errors import Diverged, Stopped, UserError
from lab.settings import DEFAULT_CONFIG, help_text, load_config

# Large pages for torch's CPU allocations, read when torch is loaded: up to 1.4x the training rate where page faults are dear.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


# Of the processes that torchrun starts, one speaks; read when tqdm is loaded.
LEADS = os.environ.get("RANK", "0") == "0"
if not LEADS:
    os.environ["TQDM_DISABLE"] = "1"

command = ""  # as it was called, for the records of what it makes


def parse(argv: list[str]) -> tuple[Config, bool]:
    """Arguments -> (config, dry_run). Raises UserError."""
    flags = [a for a in argv if a.startswith("-")]
    overrides = [a for a in argv if re.match(r"\w[\w.]*=", a)]
    paths = [a for a in argv if a not in overrides and not a.startswith("-")]
    unknown = [f for f in flags if f not in ("--dry-run", "--help", "-h")]
    if unknown:
        raise UserError(
            f"{unknown[0]}: unknown option; there are --dry-run and --help, settings are given as section.key=value"
        )
    if len(paths) > 1:
        raise UserError(f"one config at a time, not {len(paths)}: {' '.join(paths)}")
    return load_config(paths[0] if paths else DEFAULT_CONFIG, overrides), "--dry-run" in flags


def answer_early(doc: str) -> None:
    """Answer --help and a wrong config before torch is imported, which takes seconds."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        if LEADS:
            print(help_text(doc))
        sys.exit(0)
    try:
        parse(sys.argv[1:])
    except UserError as error:
        if LEADS:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@functools.cache
def commit() -> str:
    """The commit of this checkout, with -dirty where its files differ (but for results/); nothing where git does not answer, or
    answers for a folder around it."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)

    try:
        if Path(git("rev-parse", "--show-toplevel").stdout.strip() or "/") != root:
            return ""
        dirty = git("diff", "--quiet", "HEAD", "--", ".", ":!results").returncode
        return git("rev-parse", "--short", "HEAD").stdout.strip() + ("-dirty" if dirty else "")
    except OSError:
        return ""


def run(work: Callable[[Config, bool], None], doc: str, argv: list[str] | None) -> int:
    """Parse argv, do the work, turn what went wrong into one line and an exit code."""
    argv = sys.argv[1:] if argv is None else argv
    global command
    command = shlex.join(["python", Path(sys.modules[work.__module__].__file__).name, *argv])
    if {"--help", "-h"} & set(argv):
        print(help_text(doc))
        return 0
    from lab import parallel  # loads torch

    try:
        config, dry_run = parse(argv)
        parallel.join()
        commit()  # of the code that was loaded, whatever is committed before the work is over
        with contextlib.nullcontext() if LEADS else contextlib.redirect_stdout(open(os.devnull, "w")):
            work(config, dry_run)
        parallel.leave()
        return 0
    except BaseException as error:
        message, code = answer_to(error)
        if message is None and parallel.size() == 1:
            raise
        message = message or f"error: {traceback.format_exc()}"
    if LEADS:
        print(message, file=sys.stderr)
    elif message.startswith("error: "):
        time.sleep(2)  # what rank 0 met too it says itself, and torchrun then ends the others
        print(f"process {os.environ['RANK']}: {message}", file=sys.stderr)
    if parallel.size() > 1:
        # The others may be waiting for this process in a collective, and leaving the group, or an ordinary exit, for them:
        # torchrun ends them when this one is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def answer_to(error: BaseException) -> tuple[str | None, int]:
    """One line and an exit code; None where nobody foresaw it."""
    from lab.artifacts import first_line
    from training import is_out_of_memory

    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, Diverged):
        return f"error: {error}", 1
    if isinstance(error, Stopped):
        return str(error), 128 + error.signal_number
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or "the run directory"
        remedy = "what was saved before is whole: free some space and run the same command again"
        return f"error: no space left on the disk of {where}; {remedy}", 2
    if is_out_of_memory(error):
        return f"error: out of memory, use a smaller batch_size, or micro_batch in training ({first_line(error)})", 2
    return None, 1
