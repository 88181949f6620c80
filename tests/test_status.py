"""What a router tells of itself."""

from __future__ import annotations

from collections import Counter

from deployments.status import Recent


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_what_was_answered_is_counted() -> None:
    clock = Clock()
    recent = Recent(clock)
    recent.begin()
    recent.begin()
    clock.now += 2.0
    recent.deliver(6)
    recent.end("stop", Counter(math=8, chat=2), Counter(math=4))
    told = recent.told()
    assert (told["since"], told["answering"], told["requests"]) == (1000.0, 1, {"stop": 1})
    assert (told["tokens"], told["tokens_per_second"]) == (6, 3.0)
    assert told["drafters"] == {"chat": {"drafted": 2, "accepted": 0}, "math": {"drafted": 8, "accepted": 4}}


def test_speed_is_of_the_last_seconds() -> None:
    clock = Clock()
    recent = Recent(clock)
    clock.now += 100.0
    recent.deliver(1000)
    clock.now += 8.0
    recent.deliver(50)
    assert recent.told()["tokens_per_second"] == 105.0
    clock.now += 5.0
    assert recent.told()["tokens_per_second"] == 5.0
    clock.now += 10.0
    assert (recent.told()["tokens_per_second"], recent.told()["tokens"]) == (0.0, 1050)
    assert not recent._tokens


def test_the_newest_refusals_come_first_and_are_few() -> None:
    clock = Clock()
    recent = Recent(clock)
    for number in range(50):
        clock.now += 1.0
        recent.refuse(f"reason {number}")
    told = recent.told()
    assert told["requests"] == {"refused": 50}
    assert told["refusals"][0] == {"at": 1050.0, "reason": "reason 49"}
    assert len(told["refusals"]) == 20
