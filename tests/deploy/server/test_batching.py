from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from vitkit.deploy.server.batching import Batcher
from vitkit.deploy.server.limits import Limits, Refused
from vitkit.deploy.server.metrics import Metrics
from vitkit.errors import BadInput

IMAGE = np.full((3, 8, 12), 0.5, np.float32)
PATIENT = Limits(max_wait_ms=20_000)


def run(served, scenario, limits=PATIENT):
    """Run ``scenario(batcher)``; whatever hangs is an error."""

    async def whole():
        batcher = Batcher(served, limits, Metrics())
        async with asyncio.timeout(15):
            try:
                return await scenario(batcher)
            finally:
                served.go.set()
                await batcher.close()

    return asyncio.run(whole())


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 10)


def test_an_image_that_finds_the_model_idle_does_not_wait(served):
    async def scenario(batcher):
        # the patience of 20 s is longer than the scenario may last
        return await batcher.submit(IMAGE)

    answer = run(served, scenario)
    assert served.batches == [1]
    np.testing.assert_allclose(answer.logits, [5, 5, 5], rtol=1e-6)
    np.testing.assert_allclose(answer.probabilities, np.full(3, 1 / 3), rtol=1e-6)


def test_images_gather_while_the_model_runs_and_keep_their_answers(served):
    async def scenario(batcher):
        served.go.clear()
        first = asyncio.create_task(batcher.submit(IMAGE * 0))
        await until(served.started)
        rest = [asyncio.create_task(batcher.submit(IMAGE * i / 10)) for i in range(1, 10)]
        await asyncio.sleep(0)
        served.go.set()
        return [a.logits[0] for a in await asyncio.gather(first, *rest)]

    logits = run(served, scenario)
    assert served.batches == [1, 4, 4, 1]
    np.testing.assert_allclose(logits, np.arange(10) / 2, rtol=1e-5)


def test_it_waits_for_an_image_that_is_being_decoded(served):
    async def scenario(batcher):
        decoded = threading.Event()

        async def other():
            await batcher.decode(decoded.wait, 10)
            await batcher.submit(IMAGE)

        later = asyncio.create_task(other())
        await asyncio.sleep(0)
        first = asyncio.create_task(batcher.submit(IMAGE))
        await asyncio.sleep(0)
        decoded.set()
        await asyncio.gather(first, later)

    run(served, scenario)
    assert served.batches == [2]


def test_it_waits_no_longer_than_it_may(served):
    async def scenario(batcher):
        decoded = threading.Event()
        decoding = asyncio.create_task(batcher.decode(decoded.wait, 10))
        await asyncio.sleep(0)
        await batcher.submit(IMAGE)
        assert not decoding.done()
        decoded.set()
        await decoding

    run(served, scenario, Limits(max_wait_ms=1))
    assert served.batches == [1]


def test_a_failed_decoding_ends_the_wait(served):
    async def scenario(batcher):
        decoded = threading.Event()

        def fails():
            decoded.wait(10)
            raise BadInput("no image.")

        decoding = asyncio.create_task(batcher.decode(fails))
        await asyncio.sleep(0)
        first = asyncio.create_task(batcher.submit(IMAGE))
        await asyncio.sleep(0)
        decoded.set()
        with pytest.raises(BadInput):
            await decoding
        await first

    run(served, scenario)


def test_what_nobody_waits_for_is_not_run(served):
    async def scenario(batcher):
        served.go.clear()
        tasks = [asyncio.create_task(batcher.submit(IMAGE))]
        await until(served.started)
        tasks += [asyncio.create_task(batcher.submit(IMAGE)) for _ in range(4)]
        await asyncio.sleep(0)
        for task in tasks[1:4]:
            task.cancel()
        await asyncio.sleep(0)
        assert len(batcher._waiting) == 1
        served.go.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(served, scenario)
    assert served.batches == [1, 1]


def test_work_that_nobody_waits_for_leaves_nothing_behind(served):
    async def scenario(batcher):
        go, done = threading.Event(), []
        threads = batcher._decoders._max_workers
        tasks = [asyncio.create_task(batcher.aside(go.wait, 10)) for _ in range(threads)]
        tasks += [asyncio.create_task(batcher.aside(done.append, i)) for i in range(100)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert batcher._decoders._work_queue.qsize() == 0
        go.set()
        assert await batcher.aside(lambda: "next") == "next"
        return done

    assert run(served, scenario) == []


def test_one_thing_at_a_time_runs_in_the_model_thread(served):
    async def scenario(batcher):
        go, begun, names = threading.Event(), threading.Event(), []

        def slow():
            begun.set()
            names.append(threading.current_thread().name)
            go.wait(10)

        first = asyncio.create_task(batcher.call(slow))
        await until(begun)
        # nobody waits for it any more, but the thread is not free
        first.cancel()
        second = asyncio.create_task(batcher.submit(IMAGE))
        for _ in range(5):
            await asyncio.sleep(0)
        # nor is anything piled up behind it, out of reach
        assert served.batches == [] and batcher._model._work_queue.qsize() == 0
        go.set()
        await second
        assert first.cancelled()
        return names

    assert run(served, scenario)[0].startswith("vitkit-model")
    assert served.batches == [1]


def test_the_queue_is_bounded_and_says_when_to_come_again(served):
    async def scenario(batcher):
        with batcher.places(6):
            with pytest.raises(Refused) as first:
                with batcher.places(3):
                    pass
            with batcher.places(2):
                batcher._per_second = 0.5
                with pytest.raises(Refused) as second:
                    with batcher.request():
                        pass
        with batcher.places(8), pytest.raises(Refused) as third:
            batcher._per_second = 0.01
            with batcher.places(1):
                pass
        assert batcher._places == 0
        return first.value, second.value, third.value

    found = run(served, scenario, Limits(queue=8, max_images=8))
    assert [e.status for e in found] == [429] * 3
    # no rate yet; 8 images at one in 2 s; never more than a minute
    assert [e.headers["Retry-After"] for e in found] == ["1", "16", "60"]


def test_wrong_number_of_outputs_is_an_error_not_a_mix_up(served):
    served.run = lambda images: np.zeros((1, 3))

    async def scenario(batcher):
        served.go.clear()
        return await asyncio.gather(*(batcher.submit(IMAGE) for _ in range(2)), return_exceptions=True)

    assert [e.status for e in run(served, scenario)] == [500, 500]


@pytest.mark.parametrize("wrong", [{"queue": 0}, {"timeout_s": -1}, {"max_images": 9, "queue": 8}])
def test_limits_that_make_no_sense(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        Limits(**wrong)
    assert Limits(max_wait_ms=0).max_wait_ms == 0
