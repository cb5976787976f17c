"""Tiles chosen by measurement, in the interpreter with a timer that says what the test wants."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from anomem import functional as AF
from anomem import reference as R
from anomem.testing import compare, draw

CPU = torch.device("cpu")


@pytest.fixture
def tile_search(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module with three candidates, of which the last is the fastest, and an environment that asks for nothing."""
    from anomem.kernels import tile_search
    from anomem.kernels.tile_table import INTERPRETED

    tiles = (INTERPRETED, INTERPRETED._replace(rows=16), INTERPRETED._replace(columns=16))

    def timer(call: Any) -> tuple[float, float, float]:
        call()
        return 0.1, 9.0 - tiles.index(call.args[0]), 10.0

    monkeypatch.setattr(tile_search, "candidates", lambda entry, device: tiles)
    monkeypatch.setattr(tile_search, "measure", timer)
    for name in ("ANOMEM_AUTOTUNE", "ANOMEM_TILES"):
        monkeypatch.delenv(name, raising=False)
    tile_search.from_environment.cache_clear()
    yield tile_search
    tile_search.from_environment.cache_clear()


class Site:
    """A launch that records the tiles it was launched with."""

    def __init__(self, tile_search: Any, rows: int = 1000, columns: int = 64, **facts: object) -> None:
        self.launched: list[Any] = []
        self.tile_search = tile_search
        self.site = tile_search.Site(("retrieve_flash_forward", "half", 64), facts, rows, columns, CPU)

    def __call__(self) -> Any:
        return self.tile_search.launch(self.site, self.run)

    def run(self, tile: Any) -> Any:
        self.launched.append(tile)
        return self.tile_search.Launched(None, tile)


def never(call: object) -> None:
    raise AssertionError("something was measured")


def test_nothing_is_read_or_measured_unless_asked_for(tile_search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from anomem.kernels.tile_table import INTERPRETED

    monkeypatch.setattr(tile_search, "read_tiles", never)
    monkeypatch.setattr(tile_search, "measure", never)
    site = Site(tile_search)
    assert tile_search.from_environment() is None
    assert site() == INTERPRETED
    assert site.launched == [INTERPRETED]


def test_fastest_is_taken_remembered_and_read_by_a_later_process(
    tile_search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "tiles.json"
    monkeypatch.setenv("ANOMEM_TILES", str(path))
    monkeypatch.setenv("ANOMEM_AUTOTUNE", "1")
    first = Site(tile_search, dtype=torch.bfloat16)
    assert first().columns == 16
    assert len(first.launched) == 2 * 3 + 1  # each candidate compiled and timed, then the launch itself
    monkeypatch.setattr(tile_search, "measure", never)
    assert first().columns == 16
    assert "1 measured tiles" in tile_search.source(CPU)
    assert [one.name for one in path.parent.iterdir()] == ["tiles.json"]
    section = json.loads(path.read_text())["sections"][0]
    assert section["tiles"]["retrieve_flash_forward half 64, dtype=bfloat16, 1024 x 64"]["milliseconds"] == 7.0

    monkeypatch.delenv("ANOMEM_AUTOTUNE")
    tile_search.from_environment.cache_clear()
    assert Site(tile_search, dtype=torch.bfloat16)().columns == 16
    assert Site(tile_search, dtype=torch.float16)().columns == 32  # not measured: the table's


def test_size_classes(tile_search: Any) -> None:
    names = [
        Site(tile_search, rows, columns).site.name
        for rows, columns in ((513, 65), (1024, 128), (1025, 128), (1024, 129))
    ]
    assert names[0] == names[1]
    assert len(set(names)) == 3
    assert Site(tile_search, 2**18, 2**15).site.name == Site(tile_search, 2**24, 2**20).site.name
    assert Site(tile_search, tied=True).site.name != Site(tile_search, tied=False).site.name


def test_what_does_not_compile_does_not_fit_or_spills_is_not_taken(
    tile_search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.errors import OutOfResources

    monkeypatch.setattr(tile_search, "measure", lambda call: (1.0, 1.0, 1.0))
    sound, too_large, broken, spilling = (
        tile_search.candidates(None, CPU)[0]._replace(stages=stages) for stages in range(4)
    )

    def run(tile: Any) -> Any:
        if tile == too_large:
            raise OutOfResources(300, 227, "shared memory")
        if tile == broken:
            raise RuntimeError("PassManager::run failed")
        spills = 8 if tile == spilling else 0
        return tile_search.Launched(SimpleNamespace(n_spills=spills, n_regs=90, metadata=SimpleNamespace(shared=2000)))

    trials = list(tile_search.trying(run, (sound, too_large, broken, spilling)))
    assert [trial.milliseconds is None for trial in trials] == [False, True, True, True]
    for trial, reason in zip(trials, ("", "shared memory", "PassManager", "spills 8"), strict=True):
        assert reason in trial.reason
    assert (trials[0].tile.shared, trials[0].registers) == (2, 90)  # KiB, rounded up


def test_mistakes_of_a_launch_are_not_taken_for_a_bad_tile(tile_search: Any) -> None:
    def run(tile: Any) -> Any:
        raise TypeError("wrong argument")

    with pytest.raises(TypeError, match="wrong argument"), tile_search.using(tile_search.Choice(None, search=True)):
        tile_search.launch(Site(tile_search).site, run)


def test_where_no_tile_works_the_launch_says_why_and_nothing_is_kept(tile_search: Any, tmp_path: Path) -> None:
    def run(tile: Any) -> Any:
        raise RuntimeError("no memory")

    path = tmp_path / "tiles.json"
    with pytest.raises(RuntimeError, match="no memory"), tile_search.using(tile_search.Choice(path, search=True)):
        tile_search.launch(Site(tile_search).site, run)
    assert not path.exists()


def test_nothing_is_measured_while_a_graph_is_captured(tile_search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tile_search)
    with tile_search.using(tile_search.Choice(None, search=True)):
        with monkeypatch.context() as captured:
            captured.setattr(tile_search, "capturing", lambda device: True)
            assert site().columns == 32
        assert site.launched == [tile_search.fitting(site.site.entry, CPU)[0]]
        assert site().columns == 16  # the capture left nothing behind


CASES = {
    "retrieve": lambda q, k, v=None: AF.hopfield_retrieve(q, k, values=v, normalize="layer", impl="triton"),
    "nt_xent": lambda *x: AF.nt_xent(*x, reduction="none", impl="triton"),
    "info_nce": lambda *x: AF.info_nce(*x, torch.arange(33), reduction="none", impl="triton"),
}
REFERENCES = {
    "retrieve": lambda q, k, v=None: R.hopfield_retrieve(q, k, values=v, normalize="layer").out,
    "nt_xent": lambda *x: R.nt_xent_rows(*x, 0.2),
    "info_nce": lambda *x: R.info_nce_rows(*x, torch.arange(33), None, 0.07),
}


@pytest.mark.parametrize("fastest", range(3))
@pytest.mark.parametrize(
    ("operator", "sizes", "kernels"),
    [
        (
            "retrieve",
            [(33, 24), (70, 24)],
            "retrieve_flash_forward retrieve_flash_query_gradient retrieve_flash_prototype_sums",
        ),
        (
            "retrieve",
            [(33, 24), (70, 24), (70, 40)],
            "retrieve_flash_forward retrieve_flash_query_gradient retrieve_flash_prototype_sums",
        ),
        ("retrieve", [(33, 260), (5, 260)], "retrieve_resident retrieve_chunked_weights"),
        ("nt_xent", [(2, 33, 24), (2, 33, 24)], "contrast_forward contrast_backward"),
        ("info_nce", [(1, 33, 24), (1, 70, 24)], "contrast_forward contrast_backward"),
    ],
    ids=str,
)
def test_every_kernel_is_tuned_and_right_with_any_tile(
    operator: str,
    sizes: list[tuple[int, ...]],
    kernels: str,
    fastest: int,
    tile_search: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The launches of a search leave nothing behind that the last one would read."""
    tiles = tile_search.candidates(None, CPU)
    monkeypatch.setattr(tile_search, "measure", lambda call: (1.0, float(tiles.index(call.args[0]) != fastest), 1.0))
    inputs: list[Tensor] = [draw(*size, dtype=torch.bfloat16, seed=seed) for seed, size in enumerate(sizes)]
    with tile_search.using(tile_search.Choice(None, search=True)) as choice:
        compare(CASES[operator], REFERENCES[operator], inputs)
    assert {found.site.entry[0] for found in choice.searches} == set(kernels.split())
    assert set(choice._tiles[CPU].values()) == {tiles[fastest]}


def put(path: Path, **changed: str) -> None:
    """A file with a tile of 16 columns for `Site`, measured where the test runs but for what is changed."""
    from anomem.kernels import tile_search
    from anomem.kernels.tile_table import INTERPRETED

    tile = {**INTERPRETED._replace(columns=16)._asdict(), "milliseconds": 1.0}
    section = {**tile_search.identity(CPU), **changed, "tiles": {"retrieve_flash_forward half 64, , 1024 x 64": tile}}
    path.write_text(json.dumps({"format": 1, "sections": [section]}))


def test_a_file_is_used(tile_search: Any, tmp_path: Path) -> None:
    put(tmp_path / "tiles.json")
    with tile_search.using(tile_search.Choice(tmp_path / "tiles.json", search=False)):
        assert Site(tile_search)().columns == 16


@pytest.mark.parametrize("field", ["device", "triton", "kernels"])
def test_a_file_of_elsewhere_is_ignored_with_a_reason(field: str, tile_search: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    put(path, **{field: "another"})
    with (
        tile_search.using(tile_search.Choice(path, search=False)),
        pytest.warns(RuntimeWarning, match=r"another.*none for"),
    ):
        assert Site(tile_search)().columns == 32
    with tile_search.using(tile_search.Choice(path, search=True)):
        Site(tile_search)()
    held = [section[field] for section in json.loads(path.read_text())["sections"]]
    assert len(held) == (1 if field == "kernels" else 2)  # an older state of the kernels is replaced
    with tile_search.using(tile_search.Choice(path, search=False)):
        assert Site(tile_search)().columns == 16


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "\xff", '{"format": 2, "sections": []}', '{"format": 1}', '{"format": 1, "sections": [{}]}'],
)
def test_a_damaged_file_is_ignored_with_a_reason_and_not_overwritten(
    content: str, tile_search: Any, tmp_path: Path
) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(content, encoding="latin1")
    for search, columns in ((False, 32), (True, 16)):
        with (
            tile_search.using(tile_search.Choice(path, search)),
            pytest.warns(RuntimeWarning, match="is not a file of tiles"),
        ):
            assert Site(tile_search)().columns == columns
    assert path.read_text(encoding="latin1") == content


@pytest.mark.parametrize("change", [{"rows": 48}, {"warps": 0}, {"stages": "2"}, {"columns": None}])
def test_a_damaged_tile_is_seen(change: dict[str, object], tile_search: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    put(path)
    held = json.loads(path.read_text())
    next(iter(held["sections"][0]["tiles"].values())).update(change)
    path.write_text(json.dumps(held))
    with (
        tile_search.using(tile_search.Choice(path, search=False)),
        pytest.warns(RuntimeWarning, match="is not a file of tiles"),
    ):
        assert Site(tile_search)().columns == 32


def test_a_write_that_fails_leaves_the_file_as_it_was(
    tile_search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiles.json"
    put(path, device="another")
    before = path.read_text()

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("os.replace", refuse)
    with (
        tile_search.using(tile_search.Choice(path, search=True)),
        pytest.warns(RuntimeWarning, match=r"not kept.*read-only"),
    ):
        assert Site(tile_search)().columns == 16
    assert path.read_text() == before
    assert [one.name for one in tmp_path.iterdir()] == ["tiles.json"]


def test_the_environment(tile_search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "ANOMEM_TILES and ANOMEM_AUTOTUNE are not set" in tile_search.source(CPU)
    for asked, path, search in (("1", "", True), ("0", "x.json", False), ("", "x.json", False), ("1", "x.json", True)):
        monkeypatch.setenv("ANOMEM_AUTOTUNE", asked)
        monkeypatch.setenv("ANOMEM_TILES", path)
        tile_search.from_environment.cache_clear()
        choice = tile_search.from_environment()
        assert choice.search == search
        assert choice.path == (Path(path) if path else tmp_path / "anomem" / "tiles.json")
        assert "does not exist" in tile_search.source(CPU)
    monkeypatch.setenv("ANOMEM_AUTOTUNE", "yes")
    tile_search.from_environment.cache_clear()
    told = "ANOMEM_AUTOTUNE: expected 0 or 1, received 'yes'"
    assert tile_search.source(CPU) == told
    with pytest.raises(ValueError, match=told):
        Site(tile_search)()


def test_neighbours_keep_to_what_an_architecture_compiles_well() -> None:
    from anomem.kernels.tile_table import MMA_SYNC, TABLE, neighbours

    for entry, tiles in TABLE.items():
        for architecture, known in tiles.items():
            for tile in known:
                near = list(neighbours(entry, tile, architecture))
                assert near, entry
                assert tile not in near
                for other in near:
                    changed = [(tile.rows, tile.warps) != (other.rows, other.warps)]
                    changed += [tile.columns != other.columns, tile.stages != other.stages]
                    assert sum(changed) == 1
                    assert 16 <= other.rows <= 128
                    assert other.stages > 0
                    if entry[0] == "retrieve_resident":
                        assert other.columns == entry[2]
                    if architecture not in MMA_SYNC and entry[1] != "ieee":
                        assert other.rows >= 64
                        assert other.warps in {64: (4,), 128: (4, 8)}[other.rows]
                reachable = {(other.rows, other.warps) for other in near}
                if tile.rows in (64, 128):
                    assert reachable >= {(128, 4), (128, 8)} - {(tile.rows, tile.warps)}


def test_only_tiles_that_fit_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from anomem.kernels import tile_table

    entry, device = ("retrieve_flash_forward", "half", 128), torch.device("cuda", 7)
    small, large = tile_table.TABLE[entry][90]
    monkeypatch.setattr(tile_table, "architecture_of", lambda device: 90)
    for limit, fit in ((small.shared - 1, ()), (small.shared, (small,)), (large.shared, (small, large))):
        monkeypatch.setattr(tile_table, "_device_properties", lambda device, kib=limit: {"max_shared_mem": kib * 1024})
        tile_table._fitting_gpu.cache_clear()
        assert tile_table.fitting(entry, device) == fit
        assert tile_table.candidates(entry, device)[: len(fit)] == fit
        assert len(set(tile_table.candidates(entry, device))) >= len(fit)
    assert tile_table.fitting(("retrieve_flash_query_gradient", "half", 256), device) == ()
    tile_table._fitting_gpu.cache_clear()
