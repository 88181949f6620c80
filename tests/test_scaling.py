"""The paper model of a large cluster, against cases that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.scaling import ServiceTimes, Workload, main, needs, read

TIMES = ServiceTimes({1: 0.010, 512: 0.010}, {1: 0.004, 16: 0.016}, 0.002, 0.0005, 0.001)


def test_plain_decoding_needs_routers_alone() -> None:
    found = needs(TIMES, Workload(16, 0.0, 0.0, 1.0), 8)
    assert found.tokens_per_s == pytest.approx(8 * 16 / 0.010)
    assert (found.drafters, found.routers) == (0, 10)  # 12,800 tokens of half a millisecond, at seven tenths
    assert found.first == "router"


def test_drafts_need_as_many_drafters_as_their_batches_fill() -> None:
    found = needs(TIMES, Workload(16, 1.0, 6.0, 3.0), 1)
    round_s = 0.010 + 0.002 + 0.016
    assert found.tokens_per_s == pytest.approx(48 / round_s)
    assert found.drafters == 1  # 571 drafts a second of one millisecond each
    many = needs(TIMES, Workload(16, 1.0, 6.0, 3.0), 64)
    assert many.drafters == 53
    assert many.links == many.routers * (64 + many.drafters)


def test_the_command_prints_a_line_for_each_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parent.parent / "docs" / "results" / "service-times.json"
    machines, loads = read(path)
    main([str(path), "--verifiers", "1,8"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == len(machines) * (1 + 2 * len(loads))
    broken = tmp_path / "broken.json"
    broken.write_text('{"machines": {"a": {}}, "loads": {}}')
    with pytest.raises(ValueError, match="service times"):
        read(broken)
