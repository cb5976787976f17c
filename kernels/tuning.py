"""Tiles chosen by measurement: off unless asked for, and then remembered in a file.

    neither variable set    the first tile of the table that fits (`tiles`); no file is read
    ANOMEM_TILES=PATH       tiles that were measured on this GPU and stand in PATH; the table's for other launches
    ANOMEM_AUTOTUNE=1       a launch that has no measured tile tries every candidate, takes the fastest and writes it to
                            PATH, or to `anomem/tiles.json` in the user's cache folder

The sums of a kernel are rounded in another order with another tile. So a file is read only by those who name it or
search: one that lies in a cache folder must not change the bits of tomorrow's run.

A choice holds for one kernel with all that it is compiled for, sizes up to the next power of two, one GPU, one release
of Triton and one state of these kernels. What a search takes is therefore what was compiled, without spills, and timed.
Nothing is searched for while a CUDA graph is captured.

Why not `triton.autotune`: the number of splits and the partial sums that a launch allocates depend on the tile, and so
does the kernel that adds them, all of which it would have to time; it keys on exact sizes, so that every new batch size
would search again, takes kernels that spill, and stores its choice under a hash where nobody can read or commit it.
"""

import contextlib
import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.testing

from anomem.kernels.common import next_power_of_2
from anomem.kernels.tile_file import read, write
from anomem.kernels.tiles import Key, Tile, candidates, fitting

_LOG = logging.getLogger(__name__)
# Beyond, a GPU is full and the loop of a block is long: larger launches are alike.
_MOST_ROWS, _MOST_COLUMNS = 2**17, 2**14


class Launched(NamedTuple):
    """What a launch with some tile gives."""

    compiled: Any
    """What `kernel[grid](…)` returned: Triton's compiled kernel, None in the interpreter."""
    result: Any = None


Run = Callable[[Tile], Launched]


class Site(NamedTuple):
    """A launch whose tile is to be chosen."""

    entry: Key
    """Of the tile table."""
    facts: dict[str, Any]
    """All else that the kernel is compiled for."""
    rows: int
    """Of the scores, which are never stored; of all groups together."""
    columns: int
    device: torch.device

    @property
    def name(self) -> str:
        """How the file names it."""
        facts = " ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in self.facts.items())
        rows = min(next_power_of_2(self.rows), _MOST_ROWS)
        columns = min(next_power_of_2(self.columns), _MOST_COLUMNS)
        kernel, kind, block_d = self.entry
        return f"{kernel} {kind} {block_d}, {facts}, {rows} x {columns}"


class Trial(NamedTuple):
    """A tile that was tried."""

    tile: Tile
    milliseconds: tuple[float, float, float] | None
    """20th, 50th and 80th percentile, or None where it was rejected."""
    reason: str = ""
    """Why it was rejected."""
    registers: int = 0

    def __str__(self) -> str:
        rows, columns, warps, stages, _ = self.tile
        told = self.reason if self.milliseconds is None else f"{self.milliseconds[1]:.4g} ms"
        return f"{rows}x{columns}, {warps} warps, {stages} stages: {told}"


class Search(NamedTuple):
    """What a search found."""

    site: Site
    trials: list[Trial]

    @property
    def best(self) -> Trial | None:
        """The fastest, None where nothing could be timed."""
        timed = [trial for trial in self.trials if trial.milliseconds is not None]
        return min(timed, key=lambda trial: trial.milliseconds[1], default=None)


def launch(site: Site, run: Run) -> Any:
    """Launch with the tile that is best as far as is known.

    Args:
        site: what is launched.
        run: launches with a tile, on the current stream; may be called more than once and must not depend on what an
            earlier call wrote.

    Returns:
        The result of `run`.
    """
    choice = active()
    tile = fitting(site.entry, site.device)[0] if choice is None else choice.tile(site, run)
    return run(tile).result


class Choice:
    """Tiles by site, from a file and from searches.

    Args:
        path: of the file; None keeps everything in this object.
        search: whether to measure what is not known.
        neighbours: whether a search tries more than the table's tiles.
    """

    def __init__(self, path: Path | None, search: bool, neighbours: bool = True) -> None:
        self.path = path
        self.search = search
        self.tried = candidates if neighbours else fitting
        self.searches: list[Search] = []
        """Of this process."""
        self._tiles: dict[torch.device, dict[str, Tile]] = {}
        self._lock = threading.RLock()

    def tile(self, site: Site, run: Run) -> Tile:
        """The tile to launch with."""
        with self._lock:
            known, name = self._known(site.device), site.name
            if name in known:
                return known[name]
            if not self.search or capturing(site.device):
                return fitting(site.entry, site.device)[0]
            found = Search(site, list(trying(run, self.tried(site.entry, site.device))))
            self.searches.append(found)
            _LOG.info("%s: %s", name, "; ".join(map(str, found.trials)))
            if found.best is None:  # then launching the table's tile says what is wrong
                known[name] = fitting(site.entry, site.device)[0]
            else:
                known[name] = found.best.tile
                self._keep(site.device, name, found.best)
            return known[name]

    def _known(self, device: torch.device) -> dict[str, Tile]:
        if device not in self._tiles:
            self._tiles[device] = {}
            try:
                if self.path is not None:
                    self._tiles[device] = read(self.path, device)
            except (FileNotFoundError, LookupError) as nothing:
                if not self.search:  # which fills it
                    _warn(f"no measured tiles are used: {nothing}")
            except (OSError, ValueError) as error:
                _warn(f"no measured tiles are used: {error}")
        return self._tiles[device]

    def _keep(self, device: torch.device, name: str, best: Trial) -> None:
        try:
            if self.path is not None:
                write(self.path, device, name, best.tile, best.milliseconds[1])
        except (OSError, ValueError) as error:
            _warn(f"the tiles that are measured are not kept: {error}")


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def trying(run: Run, tiles: Iterable[Tile]) -> Iterator[Trial]:
    """Launch and time each tile; what does not compile, does not fit or spills gets no time."""
    for tile in tiles:
        try:
            compiled = run(tile).compiled
            spills = getattr(compiled, "n_spills", 0)
            if spills:
                yield Trial(tile, None, f"spills {spills} registers", compiled.n_regs)
                continue
            times = measure(functools.partial(run, tile))
        except (triton.errors.TritonError, RuntimeError) as error:  # a RuntimeError is LLVM's, or a lack of memory
            yield Trial(tile, None, f"{type(error).__name__}: {str(error).strip()[:200]}")
            continue
        if compiled is not None:
            tile = tile._replace(shared=-(-compiled.metadata.shared // 1024))
        yield Trial(tile, times, "", getattr(compiled, "n_regs", 0))


def measure(call: Callable[[], object]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile of a launch in milliseconds, the L2 cache flushed before each."""
    return tuple(triton.testing.do_bench(call, warmup=10, rep=50, quantiles=(0.2, 0.5, 0.8)))


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records the launches, so that nothing may be waited for."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def from_environment() -> Choice | None:
    """The choice that the environment asks for, None for the table; read once.

    Raises:
        ValueError: ANOMEM_AUTOTUNE is neither 0 nor 1.
    """
    asked, path = os.environ.get("ANOMEM_AUTOTUNE", "") or "0", os.environ.get("ANOMEM_TILES", "")
    if asked not in ("0", "1"):
        raise ValueError(f"ANOMEM_AUTOTUNE: expected 0 or 1, received {asked!r}")
    if asked == "0" and not path:
        return None
    return Choice(Path(path).expanduser() if path else default_path(), search=asked == "1")


def default_path() -> Path:
    """Where a search writes when ANOMEM_TILES names no file."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anomem" / "tiles.json"


_instead: list[Choice] = []


def active() -> Choice | None:
    """The choice that launches follow."""
    return _instead[-1] if _instead else from_environment()


@contextlib.contextmanager
def using(choice: Choice) -> Iterator[Choice]:
    """Within, launches of every thread follow this choice and not the environment's."""
    _instead.append(choice)
    try:
        yield choice
    finally:
        _instead.pop()


def source(device: torch.device) -> str:
    """Where the tiles of a device come from, in words."""
    try:
        choice = from_environment()
    except ValueError as error:
        return str(error)
    if choice is None:
        return "the package's table (ANOMEM_TILES and ANOMEM_AUTOTUNE are not set)"
    rest = "what it lacks is searched for" if choice.search else "the package's table has the others"
    try:
        return f"{len(read(choice.path, device))} measured ones in {choice.path}; {rest}"
    except FileNotFoundError:
        return f"{choice.path} does not exist; {rest}"
    except (OSError, LookupError, ValueError) as error:
        return f"{error}; {rest}"
