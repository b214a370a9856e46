"""Damaged and hostile content for the tests of readers, and what a reader may answer: a sentence, or a sound result.

damaged(b"...", b"...")   one of the valid files with bits flipped, cut, spliced, zeroed, repeated or stuffed
hostile(tree)             a valid document with a field of a wrong type, absurd, deep, missing or strange
as_json, as_yaml          such a document as a file's bytes
SPECIAL, make_special     what may lie in a file's place: a FIFO, a device, a folder, a link to itself, ...
only_a_sentence(call)     runs a reader and fails where anything else comes out of it than may
untouched(folder)         fails where something in the folder was written, made or removed
fuzz(100, data=...)       a test with that many examples, and more where HETERO_KT_FUZZ=10 says ten times as many
"""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

TIMES = float(os.environ.get("HETERO_KT_FUZZ", "1"))
"""How many times as many examples as `make test` has."""
SECONDS = 10.0
"""Of computing that no reader may take longer than; on a machine that others use it may take six times as long."""


def fuzz(examples: int, **given_by: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of that many examples, the same ones at every run; more than that are drawn afresh."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        how = settings(
            max_examples=max(1, int(examples * TIMES)),
            derandomize=TIMES <= 1,
            deadline=None,
            database=None,
            phases=(Phase.explicit, Phase.generate),  # to shrink what failed takes minutes, and tells little more
            suppress_health_check=list(HealthCheck),
        )
        return how(given(**given_by)(test))

    return decorate


# --- what may come out ---


class _TooLong(BaseException):
    """Not an Exception: no reader may take it for an error of the file."""


def only_a_sentence(call: Callable[[], Any], *, errors: tuple[type[BaseException], ...] = (ValueError,)) -> Any:
    """What `call` returns, or the error that it raises, where that is one of `errors`, and says so in one line.

    Anything else fails the test: another kind of error, a library's own (of JSON or of decoding), a line break or a
    terminal's control character in the message, or more than `SECONDS`.
    """
    try:
        with _limited():
            return call()
    except errors as error:
        found = error
    except _TooLong:
        raise AssertionError(f"took more than {SECONDS:g} s") from None
    kind, text = type(found), str(found)
    assert text.strip(), f"{kind.__name__} says nothing"
    assert text.isprintable(), f"no one line of plain text: {text!r}"
    assert len(text) < 2000, f"{len(text)} characters are no sentence: {text[:300]!r}"
    assert kind.__module__.partition(".")[0] in ("hetero_kt", "builtins"), f"a library's own {kind.__name__}: {text}"
    assert not isinstance(found, RecursionError | MemoryError | UnicodeError), f"{kind.__name__}: {text}"
    return found


@contextmanager
def _limited() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield
        return

    def end(*_: Any) -> None:
        raise _TooLong

    before = [signal.signal(number, end) for number in (signal.SIGALRM, signal.SIGPROF)]
    signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGALRM, before[0])
        signal.signal(signal.SIGPROF, before[1])


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Inside, nothing in `folder` may be written, made, removed or get another mode."""
    before = _seen(folder)
    yield
    assert _seen(folder) == before


def _seen(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            about = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = (about.st_mode, about.st_size, about.st_mtime_ns, about.st_ino)
    return found


# --- bytes ---

TOKENS = (
    *(b"\0", b"\n", b"\r", b"\t", b'"', b"'", b"{", b"}", b"[", b"]", b":", b",", b"-", b"\\", b"\\u0000", b"\\ud800"),
    *(
        b"NaN",
        b"-Infinity",
        b"1e308",
        b"1e999",
        b"-1",
        b"9" * 400,
        b"null",
        b"true",
        b"\xff",
        b"\xed\xa0\x80",
        b"\x1b[",
    ),
    *(b"../", b"/", b"!!bool x", b"&a ", b"*a", b"<<: ", b"%", b"PK\x03\x04", b"\x89PNG", b"PAR1", b"[" * 300),
)


@st.composite
def damaged(draw: st.DrawFn, *valid: bytes) -> bytes:
    """One of the `valid` files after one to three accidents."""
    data = draw(st.sampled_from(valid))
    for _ in range(draw(st.integers(1, 3))):
        data = draw(st.sampled_from((_flip, _flip, _cut, _splice, _zero, _repeat, _stuff, _drop)))(draw, data, valid)
    return data


def _spot(draw: st.DrawFn, data: bytes) -> int:
    return draw(st.integers(0, len(data)))


def _flip(draw: st.DrawFn, data: bytes, _: Any) -> bytes:
    flipped = bytearray(data)
    for bit in draw(st.lists(st.integers(0, max(0, 8 * len(data) - 1)), min_size=1, max_size=8)) if data else ():
        flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def _cut(draw: st.DrawFn, data: bytes, _: Any) -> bytes:
    return data[: _spot(draw, data)]


def _splice(draw: st.DrawFn, data: bytes, valid: tuple[bytes, ...]) -> bytes:
    other = draw(st.sampled_from(valid))
    return data[: _spot(draw, data)] + other[_spot(draw, other) :]


def _zero(draw: st.DrawFn, data: bytes, _: Any) -> bytes:
    first, length = _spot(draw, data), draw(st.sampled_from((1, 4, 64, 512)))
    return data[:first] + bytes(len(data[first : first + length])) + data[first + length :]


def _repeat(draw: st.DrawFn, data: bytes, _: Any) -> bytes:
    first, length = _spot(draw, data), draw(st.sampled_from((1, 8, 64)))
    return data[:first] + data[first : first + length] * draw(st.sampled_from((2, 3, 100))) + data[first + length :]


def _stuff(draw: st.DrawFn, data: bytes, _: Any) -> bytes:
    spot = _spot(draw, data)
    return data[:spot] + draw(st.sampled_from(TOKENS)) + data[spot:]


def _drop(draw: st.DrawFn, data: bytes, _: Any) -> bytes:
    first = _spot(draw, data)
    return data[:first] + data[first + draw(st.sampled_from((1, 8, 64))) :]


# --- documents ---


class Raw(str):
    """Text that stands in the file as it is, without quotes."""


DEEP = (2_000, 200_000)
RAW_JSON = (
    *(Raw("[" * depth + "]" * depth) for depth in DEEP),
    Raw('{"a":' * 5_000 + "1" + "}" * 5_000),
    *map(Raw, ("1" * 400, "1" * 5_000, "1e308", "-1e308", "1e999", "NaN", "Infinity", "-Infinity", "1e-400", "-0.0")),
    *map(Raw, ('"\\ud800"', '"\\u0000"', '{"a":1,"a":2}', "9007199254740993", "01", "+1", "'a'", "undefined", "")),
)
RAW_YAML = (
    Raw("[" * 2_000 + "]" * 2_000),
    Raw("{a: " * 2_000 + "1" + "}" * 2_000),
    *map(Raw, ("1" * 400, "1" * 5_000, "0x" + "f" * 9_000, ".nan", ".inf", "1e308", "1:59:59:59", "0b1", "2001-99-99")),
    *map(Raw, ("!!bool foo", "!!int ''", "!!int foo", "!!float x", "!!timestamp x", "!!binary '?'", "!!set {a, b}")),
    *map(Raw, ("!!omap [a]", "!!null x", "!!pairs [x]", "!unknown x", "!!python/name:os.system", "*nobody", "&a [*a]")),
    *map(Raw, ("!!python/object/apply:os.system ['touch executed']", "&b [&c [x, x], *c]", "{? [a] : b}", "<<")),
    *map(Raw, ("2001-01-01", "2001-01-01 00:00:00", "~", "yes", "'", '"\\ud800"', "=", "%YAML 9.9", "@", "`", "? a")),
)
NAMES = (
    *(
        "",
        " ",
        ".",
        "..",
        "../../x",
        "/etc/passwd",
        "a/b",
        "\0",
        "\n",
        "a\nb",
        "\x1b[2J\x1b]0;x\x07",
        "\x9b31m",
        "-",
        "--help",
    ),
    *(
        "\u202egnp.exe",
        "\u2028",
        "\ufeff",
        "\U0001f600",
        "e\u0301",
        "\ud800",
        "~",
        "$HOME",
        "`x`",
        "%s",
        "{}",
        "{0.x}",
        "$\\frac{$",
    ),
    *(
        "=1+1",
        "+1",
        "-1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "<script>alert(1)</script>",
        "<img src=http://x.invalid/a>",
        "]]>",
    ),
    *(
        "![a](http://x.invalid/a.png)",
        "[a](http://x.invalid)",
        "http://x.invalid",
        "a|b",
        "*a*",
        "a" * 5_000,
        "CON",
        "nul",
    ),
)
"""Strange names and texts."""
SCALARS = (
    *(None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**400, 0.0, -0.0, 0.5, 1e300, -1e-300),
    *([], {}, [[]], [1, 2], ["a"], {"a": 1}, {"a": {"b": {}}}, [None], *NAMES),
)
"""Values of wrong types, and absurd ones, which JSON and YAML can both say."""


@st.composite
def hostile(draw: st.DrawFn, tree: Any, raw: tuple[Raw, ...] = (*RAW_JSON, *RAW_YAML)) -> Any:
    """`tree`, a valid document, after one to three changes: to be written by `as_json` or `as_yaml`."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        value = draw(st.sampled_from((*raw, *SCALARS, *SCALARS)))
        where = [*_places(tree)] if isinstance(tree, dict | list) else []
        if not where or draw(st.integers(0, 30)) == 0:
            tree = copy.deepcopy(value)
            continue
        parent, key = draw(st.sampled_from(where))
        change = draw(st.sampled_from(("value", "value", "value", "gone", "name", "twin", "many")))
        if change == "value":
            parent[key] = copy.deepcopy(value)
        elif change == "gone":
            del parent[key]
        elif change == "many":
            many = {f"{key}{i}": copy.deepcopy(parent[key]) for i in range(50)}
            parent.update(many) if isinstance(parent, dict) else parent.extend(many.values())
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(NAMES))] = copy.deepcopy(parent[key]) if change == "twin" else parent.pop(key)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    waiting = [tree]
    while waiting:
        container = waiting.pop()
        entries = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in entries:
            yield container, key
            if isinstance(value, dict | list):
                waiting.append(value)


def as_json(tree: Any) -> bytes:
    """The document as JSON, with its `Raw` texts as they are."""
    marked, raw = _marked(tree)
    text = json.dumps(marked)
    for mark, own in raw.items():
        text = text.replace(f'"{mark}"', own)
    return text.encode("utf-8", "surrogatepass")


def as_yaml(tree: Any) -> bytes:
    """The document as YAML, with its `Raw` texts as they are."""
    marked, raw = _marked(tree)
    text = yaml.dump(marked, Dumper=_NoAliases, sort_keys=False)
    for mark, own in raw.items():
        text = text.replace(mark, own)
    return text.encode("utf-8", "surrogatepass")


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _marked(tree: Any) -> tuple[Any, dict[str, str]]:
    raw: dict[str, str] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Raw):
            mark = f"rawmark{len(raw)}x"
            raw[mark] = str(value)
            return mark
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, list) else value

    return plain(tree), raw


def bomb(levels: int = 40) -> bytes:
    """YAML of a few hundred bytes that stands for 2 ** `levels` entries."""
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels))]
    return "\n".join(lines).encode()


# --- in a file's place ---

SPECIAL = ("fifo", "device", "folder", "loop", "dangling", "empty", "zeros", "huge")


def make_special(kind: str, path: Path) -> Path:
    """Put something else in the place of the file `path`; `huge` is a sparse file of 5 GB, `device` has no end."""
    path.unlink(missing_ok=True)
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "dangling":
            path.symlink_to(path.parent / "nowhere" / "at all")
        case "empty":
            path.touch()
        case "zeros":
            path.write_bytes(bytes(4096))
        case "huge":
            with path.open("wb") as stream:
                stream.truncate(5 * 10**9)
        case _:
            raise ValueError(kind)
    return path
