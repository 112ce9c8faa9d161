"""bench/gpu_tickets.py: the simulation of ticketed launches. No figure in here is one of a GPU."""

from __future__ import annotations

import importlib
import itertools
import sys

import pytest
from checkout import ROOT

import gcnet_ext

pytestmark = pytest.mark.skipif(gcnet_ext._load.compiled is None, reason="the plan functions are in the compiled library")


@pytest.fixture
def tickets(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    return importlib.import_module("gpu_tickets")


@pytest.fixture
def card(tickets):
    return tickets.gpu_model.CARDS["NVIDIA H200"]


@pytest.mark.parametrize(("samples", "lag"), itertools.product((1, 2, 5), (0, 1, 7, 100)))
def test_what_an_item_needs_comes_before_it(tickets, samples, lag):
    stages = [tickets.Stage(items) for items in (5, 3, 2, 8)]
    order = tickets.order(samples, stages, lag)
    assert len(order) == samples * 18
    for number, (stage, sample) in enumerate(order):
        before = order[:number].count((stage - 1, sample))
        assert stage == 0 or before == stages[stage - 1].items


def test_what_needs_all_samples_comes_last(tickets, card):
    of_samples = [tickets.Stage(4, 0.03), tickets.Stage(4, 0.03)]
    stages = [*of_samples, tickets.Stage(3, of_all=0), tickets.Stage(2, cycles=1e5, of_all=1)]
    order = tickets.order(5, stages, 3)
    assert order[:40] == tickets.order(5, of_samples, 3)
    assert order[40:] == [(2, 0)] * 3 + [(3, 0)] * 2
    time, before = (tickets.simulate(5, found, 3, card) for found in (stages, of_samples))
    assert time > before + 0.9 * 1e5 / tickets.ISSUED / (card.clock * 1e3)  # it waits for the last item of the second stage


def test_a_second_reading_within_the_cache_is_cheaper(tickets, card):
    """A lag beyond the cache costs a third reading from memory, and so do stores that take its room. One that is shorter than
    what the blocks have in their hands makes them wait."""
    shape = tickets.gpu_model.shape_of("64x256x56x56 float32 NCHW")
    stages = tickets.stages(shape, "forward", 1, card.multiprocessors)
    short, near, far = (tickets.simulate(32, stages, lag, card) for lag in (50, 700, 32 * stages[0].items))
    assert far > 1.1 * near
    assert short > 1.1 * near
    assert tickets.simulate(32, stages, 700, card, hints=False) > near


def test_memory_is_never_faster_than_a_copy(tickets, card):
    shape = tickets.gpu_model.shape_of("8x512x100x168 float16 NCHW")
    stages = tickets.stages(shape, "forward", 1, card.multiprocessors)
    assert tickets.simulate(2, stages, 0, card) > 2 * (2 * shape.megabytes / 8) / card.copy


def test_clusters_share_the_work(tickets, card):
    """As many blocks in clusters take about as long for items of twice the size."""
    items = [tickets.Stage(50, 0.032, cycles=1000), tickets.Stage(4), tickets.Stage(50, 0.032, again=True, stored=0.032)]
    twice = [stage._replace(items=stage.items // 2, copied=2 * stage.copied, cycles=2 * stage.cycles) for stage in items]
    assert tickets.simulate(8, twice, 25, card, cluster=2) == pytest.approx(tickets.simulate(8, items, 50, card), rel=0.35)
