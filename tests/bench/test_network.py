"""Checks which settings of the peers are tried, and which of these settings our code is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench import network
from bench.network import Setting, Side

# Seconds of a call, by the name of the setting.
PLAIN = {"float32": 4.0, "bfloat16": 5.0, "channels_last": 3.0, "channels_last, bfloat16": 2.0}
COMPILED = {"channels_last, torch.compile": 2.5, "channels_last, bfloat16, torch.compile": 1.0}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns machine(seconds, cost), which pretends that calls take these seconds and bfloat16 has this cost."""

    def become(seconds: dict[str, float], cost: float = 1.0) -> None:
        def tried(peer: str, make: Any, setting: Setting, device: str) -> Side:
            slower = 1.5 if peer == "another" else 1.0
            return Side(peer, setting, lambda: None, slower * seconds[str(setting)], 60.0 * setting.compiled)

        def alternate(sides: dict[str, Any], repeats: int, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            times = {name: seconds[name.partition("(")[2][:-1]] if "(" in name else 0.5 for name in sides}
            slower = {name: 1.5 if name.startswith("another") else 1.0 for name in sides}
            return {name: dict.fromkeys(("wall", "cpu"), [slower[name] * times[name]] * repeats) for name in sides}, {}

        monkeypatch.setattr(network, "TINY", False)
        monkeypatch.setattr(network, "_bfloat16_cost", lambda device: cost)
        monkeypatch.setattr(network, "_try", tried)
        monkeypatch.setattr(network, "alternate", alternate)

    return become


def settings() -> list[str]:
    return [str(side.setting) for side in network._tried("one", lambda setting: lambda: None, "cpu")]


def test_every_plain_setting_is_tried_and_the_faster_format_is_compiled(machine: Callable[..., None]) -> None:
    machine({**PLAIN, **COMPILED})
    assert settings() == [*PLAIN, *COMPILED]


def test_a_precision_that_is_far_slower_is_not_compiled(machine: Callable[..., None]) -> None:
    machine({**PLAIN, **COMPILED, "bfloat16": 70.0, "channels_last, bfloat16": 70.0})
    assert settings() == [*PLAIN, "channels_last, torch.compile"]


def test_bfloat16_is_left_out_where_the_processor_lacks_it(machine: Callable[..., None]) -> None:
    machine({**PLAIN, **COMPILED}, cost=30.0)
    assert settings() == ["float32", "channels_last", "channels_last, torch.compile"]


def test_ours_is_compared_with_the_docs_and_with_the_fastest_of_all(machine: Callable[..., None]) -> None:
    """Ratios compare equal numbers of operations: the second peer does half as many, so its times are doubled."""
    machine({**PLAIN, **COMPILED})
    peers = {
        name: (lambda setting: lambda: None, Setting(), share) for name, share in {"one": 1.0, "another": 0.5}.items()
    }
    found, best = network._versus(lambda: None, peers, "cpu", 3, (4.0, 1.25), compilation=1.5)
    assert {name: str(side.setting) for name, side in best.items()} == dict.fromkeys(peers, list(COMPILED)[1])
    figures = {figure["name"]: figure for figure in found["figures"]}
    assert list(figures)[::2] == [
        "one as its docs show it / ours",
        "another as its docs show it / ours",
        "best of the peers (one: channels_last, bfloat16, torch.compile) / ours",
    ]
    docs, other, fastest = (figures[name] for name in list(figures)[::2])
    assert (docs["value"], docs["goal"], other["value"]) == (8.0, 4.0, 24.0) and "goal" not in other
    assert (fastest["value"], fastest["goal"], fastest["met"]) == (2.0, 1.25, True)
    assert len(found["tried"]) == 12 and len(found["times"]) == 5
    assert found["compilation"]["one (channels_last, bfloat16, torch.compile)"] == 60.0
    assert found["compilation"]["ours"] >= 1.5
