"""Search for the fastest tile of a launch, off by default, and the JSON file that remembers the results.

    neither variable set    the first tile of the table that fits (`tile_table`); no file is read
    ANOMEM_TILES=PATH       the tiles in PATH that were measured on this GPU; the table's for other launches
    ANOMEM_AUTOTUNE=1       a launch without a measured tile tries every candidate, takes the fastest and writes it to
                            PATH, or to `anomem/tiles.json` in the user's cache folder

Another tile rounds the sums of a kernel in another order. So a file is read only if it is named or a search is on: a
file in a cache folder must not change the bits of tomorrow's run.

A choice is valid for one kernel with all that it is compiled for, sizes up to the next power of two, one GPU, one
release of Triton and one state of these kernels. So a search accepts only tiles that compiled without spilling and were
timed. No search runs while a CUDA graph is captured.

Why not `triton.autotune`:
    - the tile decides the number of splits, the partial sums that a launch allocates and the kernel that adds them, and
      all of these would have to be timed;
    - it keys on exact sizes, so every new batch size would search again;
    - it accepts kernels that spill;
    - it stores its choice under a hash, which cannot be read or committed.

The file has a section for each GPU, release of Triton and state of the kernels:
{"format": 1, "sections": [{"device": "…", "triton": "3.8.0", "kernels": "<digest>", "tiles": {SITE: TILE, …}}, …]}
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.testing

from anomem.kernels.primitives import next_power_of_2
from anomem.kernels.tile_table import Entry, Tile, candidates, fitting

FORMAT = 1
_LOG = logging.getLogger(__name__)
# Beyond these sizes a GPU is full and the loop of a block is long, so larger launches share a tile.
_MOST_ROWS, _MOST_COLUMNS = 2**17, 2**14


class Launched(NamedTuple):
    """A launch with some tile."""

    compiled: Any
    """The result of `kernel[grid](…)`: Triton's compiled kernel, None in the interpreter."""
    result: Any = None
    """The tensor that the launch allocated, if any."""


Run = Callable[[Tile], Launched]


class Site(NamedTuple):
    """A launch whose tile is to be chosen."""

    entry: Entry
    """Of the tile table."""
    facts: dict[str, Any]
    """The other facts that the kernel is compiled for."""
    rows: int
    """Rows of the scores, of all groups together."""
    columns: int
    """Columns of the scores."""
    device: torch.device

    @property
    def name(self) -> str:
        """The key of the file."""
        facts = " ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in self.facts.items())
        rows = min(next_power_of_2(self.rows), _MOST_ROWS)
        columns = min(next_power_of_2(self.columns), _MOST_COLUMNS)
        kernel, kind, block_d = self.entry
        return f"{kernel} {kind} {block_d}, {facts}, {rows} x {columns}"


class Trial(NamedTuple):
    """One tile of a search and its time."""

    tile: Tile
    milliseconds: tuple[float, float, float] | None
    """20th, 50th and 80th percentile; None if the tile was rejected."""
    reason: str = ""
    """Of the rejection."""
    registers: int = 0

    def __str__(self) -> str:
        rows, columns, warps, stages, _ = self.tile
        outcome = self.reason if self.milliseconds is None else f"{self.milliseconds[1]:.4g} ms"
        return f"{rows}x{columns}, {warps} warps, {stages} stages: {outcome}"


class Search(NamedTuple):
    """A launch and the tiles that were tried for it."""

    site: Site
    trials: list[Trial]

    @property
    def best(self) -> Trial | None:
        """The fastest; None if every tile was rejected."""
        timed = [trial for trial in self.trials if trial.milliseconds is not None]
        return min(timed, key=lambda trial: trial.milliseconds[1], default=None)


def launch(site: Site, run: Run) -> Any:
    """Launch with the best tile that is known.

    Args:
        site: the launch.
        run: launches with a tile on the current stream. It may be called several times and must not depend on the
            results of an earlier call.

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
        search: whether to search for tiles that the file lacks.
        neighbours: whether a search also tries neighbours of the table's tiles.
    """

    def __init__(self, path: Path | None, search: bool, neighbours: bool = True) -> None:
        self.path = path
        self.search = search
        self.tried = candidates if neighbours else fitting
        self.searches: list[Search] = []
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
            if found.best is None:  # launching the table's tile will raise the error
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
                    self._tiles[device] = read_tiles(self.path, device)
            except (FileNotFoundError, LookupError) as error:
                if not self.search:  # a search fills the file
                    _warn(f"no measured tiles are used: {error}")
            except (OSError, ValueError) as error:
                _warn(f"no measured tiles are used: {error}")
        return self._tiles[device]

    def _keep(self, device: torch.device, name: str, best: Trial) -> None:
        try:
            if self.path is not None:
                write_tile(self.path, device, name, best.tile, best.milliseconds[1])
        except (OSError, ValueError) as error:
            _warn(f"measured tiles are not kept: {error}")


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def trying(run: Run, tiles: Iterable[Tile]) -> Iterator[Trial]:
    """Launch and time each tile; reject tiles that do not compile, do not fit or spill."""
    for tile in tiles:
        try:
            compiled = run(tile).compiled
            spills = getattr(compiled, "n_spills", 0)
            if spills:
                yield Trial(tile, None, f"spills {spills} registers", compiled.n_regs)
                continue
            times = measure(functools.partial(run, tile))
        except (triton.errors.TritonError, RuntimeError) as error:  # RuntimeError: from LLVM, or out of memory
            yield Trial(tile, None, f"{type(error).__name__}: {str(error).strip()[:200]}")
            continue
        if compiled is not None:
            tile = tile._replace(shared=-(-compiled.metadata.shared // 1024))
        yield Trial(tile, times, "", getattr(compiled, "n_regs", 0))


def measure(call: Callable[[], object]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile of a launch in milliseconds, the L2 cache flushed before each."""
    return tuple(triton.testing.do_bench(call, warmup=10, rep=50, quantiles=(0.2, 0.5, 0.8)))


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, during which the host may not wait for the GPU."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def from_environment() -> Choice | None:
    """The choice that the environment variables ask for, None for the table; read once.

    Raises:
        ValueError: ANOMEM_AUTOTUNE is neither 0 nor 1.
    """
    autotune, path = os.environ.get("ANOMEM_AUTOTUNE", "") or "0", os.environ.get("ANOMEM_TILES", "")
    if autotune not in ("0", "1"):
        raise ValueError(f"ANOMEM_AUTOTUNE: expected 0 or 1, received {autotune!r}")
    if autotune == "0" and not path:
        return None
    return Choice(Path(os.path.expanduser(path)) if path else default_path(), search=autotune == "1")


def default_path() -> Path:
    """The file of a search when ANOMEM_TILES is not set."""
    folder = os.environ.get("XDG_CACHE_HOME") or str(Path(os.path.expanduser("~"), ".cache"))
    if folder.startswith("~"):  # a user without a home
        folder = tempfile.gettempdir()
    return Path(folder) / "anomem" / "tiles.json"


class Fixed:
    """A choice that gives one kernel this tile, and others the table's.

    Args:
        kernel: its name in the table.
        tile: its tile.
    """

    def __init__(self, kernel: str, tile: Tile) -> None:
        self.kernel = kernel
        self.fixed = tile

    def tile(self, site: Site, run: Run) -> Tile:
        """The tile to launch with."""
        return self.fixed if site.entry[0] == self.kernel else fitting(site.entry, site.device)[0]


_overrides: list[Choice | Fixed] = []


def active() -> Choice | Fixed | None:
    """The choice that launches follow."""
    return _overrides[-1] if _overrides else from_environment()


@contextlib.contextmanager
def using(choice: Choice | Fixed) -> Iterator[Any]:
    """Inside, launches of every thread follow this choice instead of the environment's."""
    _overrides.append(choice)
    try:
        yield choice
    finally:
        _overrides.pop()


def source(device: torch.device) -> str:
    """The origin of a device's tiles, as a sentence."""
    try:
        choice = from_environment()
    except ValueError as error:
        return str(error)
    if choice is None:
        return "the package's table (ANOMEM_TILES and ANOMEM_AUTOTUNE are not set)"
    rest = "others are searched for" if choice.search else "others come from the package's table"
    try:
        return f"{len(read_tiles(choice.path, device))} measured tiles in {choice.path}; {rest}"
    except FileNotFoundError:
        return f"{choice.path} does not exist; {rest}"
    except (OSError, LookupError, ValueError) as error:
        return f"{error}; {rest}"


def read_tiles(path: Path, device: torch.device) -> dict[str, Tile]:
    """The tiles that a file has for a GPU, by the name of their site.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a file of tiles.
        LookupError: its tiles were measured on another GPU, release of Triton or state of the kernels.
    """
    sections, wanted = _sections(path), identity(device)
    for section in sections:
        if _measured_for(section, wanted):
            return {name: _tile(values) for name, values in section["tiles"].items()}
    measured = " and ".join(map(_described, sections)) or "nothing"
    raise LookupError(f"{path} has tiles for {measured}, none for {_described(wanted)}")


def write_tile(path: Path, device: torch.device, name: str, tile: Tile, milliseconds: float) -> None:
    """Add a tile to a file, atomically; sections of other GPUs and releases of Triton stay.

    If two processes write at the same time one addition may be lost; a later search measures it again.

    Args:
        path: of the file.
        device: on which the tile was measured.
        name: of the site.
        tile: the fastest.
        milliseconds: its median.

    Raises:
        OSError: the file cannot be written.
        ValueError: the path has another kind of file, which is not overwritten.
    """
    wanted = identity(device)
    sections = _sections(path) if path.exists() else []
    section = next((section for section in sections if _measured_for(section, wanted)), None)
    if section is None:
        section = {**wanted, "tiles": {}}
        # Replaces a section of an older state of the kernels. Other GPUs and releases of Triton may share the file.
        place = wanted["device"], wanted["triton"]
        sections = [*(other for other in sections if (other["device"], other["triton"]) != place), section]
    section["tiles"][name] = {**tile._asdict(), "milliseconds": milliseconds}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(json.dumps({"format": FORMAT, "sections": sections}, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _measured_for(section: dict[str, Any], wanted: dict[str, str]) -> bool:
    return all(section[field] == value for field, value in wanted.items())


def _described(section: dict[str, Any]) -> str:
    return f"{section['device']} with Triton {section['triton']} and kernels {section['kernels']}"


def _sections(path: Path) -> list[dict[str, Any]]:
    """The sections of a file; raises ValueError if it is not a file of tiles."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {FORMAT} expected, not {content['format']!r}")
        for section in content["sections"]:
            _described(section)
            for values in section["tiles"].values():
                _tile(values)
    # Errors of JSON and UTF-8 are ValueErrors. RecursionError: thousands of brackets.
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a file of tiles ({type(error).__name__}: {error})") from None
    return content["sections"]


def _tile(values: dict[str, Any]) -> Tile:
    tile = Tile(**{field: values[field] for field in Tile._fields})
    if tile.stages < 1 or any(size < 1 or size & (size - 1) for size in (tile.rows, tile.columns, tile.warps)):
        raise ValueError(f"{values} is not a tile")
    return tile


@functools.cache
def identity(device: torch.device) -> dict[str, str]:
    """The fields of a section: the GPU, the release of Triton and the state of the kernels."""
    name = "Triton's interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {"device": name, "triton": triton.__version__, "kernels": _state_of_kernels()}


def _state_of_kernels() -> str:
    """Digest of the kernels' source: after any change of it a tile may spill."""
    state = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()[:12]
