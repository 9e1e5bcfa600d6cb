"""A chat template, rendered in a process of its own, since it is a program that a stranger wrote.

Jinja's sandbox keeps it off Python's objects, but not from looping for ever or doubling a string again and again. The
kernel ends the process at a limit of processor time or of memory, whatever the template is doing. Run as a script, this
file is that process; it imports jinja2, and nothing of cero_jax.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any, TextIO

SECONDS = 1.0  # of processor time for a prompt, compiling the template included: hundreds of times what one takes
MEMORY_MB = 512  # address space of the process
MAX_CHARS = 10**7  # of a rendered prompt: more tokens than any model's context
OUT_OF_MEMORY, NO_JINJA = 77, 78  # exit codes


class ChatTemplate:
    """Conversations, each messages {"role": ..., "content": ...}, to prompts that end where the assistant answers.

    source: the template. tokens: its special tokens, "bos_token" and such, by name. started: the time that its function
    strftime_now tells. The process starts with the first prompt and ends with this object.
    """

    def __init__(self, source: str, tokens: dict[str, str], started: datetime):
        self._setup = {"source": source, "tokens": tokens, "started": started.isoformat()}
        self._setup |= {"seconds": SECONDS, "memory_bytes": MEMORY_MB * 2**20}
        self._process: subprocess.Popen | None = None

    def __call__(self, conversations: Sequence[list[dict[str, str]]]) -> list[str]:
        """The prompts, asked for at once: to and fro costs more than to render one.

        Raises ValueError where the template is broken, refuses one of them or reaches a limit.
        """
        if self._process is None:
            self._process = _start_process()
            self._end = weakref.finalize(self, _end, self._process)
            _send(self._process, self._setup)
        _send(self._process, conversations)
        answer = self._process.stdout.readline()  # type: ignore[union-attr] (a pipe)
        if not answer.endswith("\n"):  # it was ended
            self._end()
            code, self._process = self._process.returncode, None
            from cero_jax.starting import install  # here, as the process has nothing of cero_jax

            raise ValueError(
                {
                    -signal.SIGPROF: f"it had not ended after {SECONDS:g} s of processor time",
                    OUT_OF_MEMORY: f"it needs more than {MEMORY_MB} MB of memory",
                    NO_JINJA: f"it needs jinja2: {install('train')}",
                }.get(code, f"its process ended with status {code}")
            )
        found = json.loads(answer)
        if "error" in found:
            raise ValueError(found["error"])
        return found["prompts"]


def _start_process() -> subprocess.Popen:
    """The process, which a Ctrl-C at the terminal does not reach."""
    return subprocess.Popen(
        [sys.executable, "-P", __file__],  # -P: the modules beside this file are not the ones that jinja2 imports
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="ascii",  # JSON's escapes
        start_new_session=True,
    )


def _send(process: subprocess.Popen, value: Any) -> None:
    stdin: TextIO = process.stdin  # type: ignore[assignment] (a pipe)
    with contextlib.suppress(BrokenPipeError):  # it was ended: its answer says so
        stdin.write(json.dumps(value) + "\n")
        stdin.flush()


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()  # type: ignore[union-attr]
    process.stdout.close()  # type: ignore[union-attr]
    process.wait()


# From here on: in the process.


def _main() -> None:
    """Answer a line of conversations with a line of their prompts, until there are no more."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    setup = json.loads(sys.stdin.readline())
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        environment = _environment(datetime.fromisoformat(setup["started"]))
    except ImportError:
        os._exit(NO_JINJA)
    compiled = cache(lambda: environment.from_string(setup["source"]))

    def render(messages: list[dict[str, str]]) -> str:
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])  # the kernel ends the process then
        try:
            text = compiled().render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **setup["tokens"]
            )
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if len(text) > MAX_CHARS:
            raise ValueError(f"it makes a prompt of {len(text):,} characters, more than {MAX_CHARS:,}")
        return text

    for line in sys.stdin:
        try:
            answer = json.dumps({"prompts": [render(messages) for messages in json.loads(line)]})
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except Exception as error:  # a template is a program: it may raise anything
            answer = json.dumps({"error": _what_went_wrong(error)})
        print(answer, flush=True)


def _environment(started: datetime) -> Any:
    """Jinja's sandbox; whitespace, tags, filters and functions are those that transformers gives a template."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant says, for training on that alone; a prompt is the same without."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = started.strftime
    return environment


def _what_went_wrong(error: Exception) -> str:
    """A template's error, with the line of its source where it is one of syntax."""
    line = getattr(error, "lineno", None)
    return f"{f'line {line}: ' if line else ''}{error or type(error).__name__}"[:1000]


if __name__ == "__main__":
    _main()
