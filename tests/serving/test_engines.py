"""What the students of a process share."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.engines import Engines


class Model:
    """Something heavy."""


class OtherModel:
    """Something else."""


class TestEngines:
    def test_the_same_content_is_one_model(self) -> None:
        engines = Engines()
        first = engines.model(Model, [b"weights", b"words"], Model)
        assert engines.model(Model, [b"weights", b"words"], Model) is first
        assert engines.model(Model, [b"weightsw", b"ords"], Model) is not first
        assert isinstance(engines.model(OtherModel, [b"weights", b"words"], OtherModel), OtherModel)

    def test_a_model_goes_with_the_last_who_holds_it(self) -> None:
        engines = Engines()
        first = engines.model(Model, [b"weights"], Model)
        second, gone = engines.model(Model, [b"weights"], Model), weakref.ref(first)
        del first
        gc.collect()
        assert gone() is second
        del second
        gc.collect()
        assert gone() is None

    def test_who_asks_meanwhile_gets_the_same(self) -> None:
        engines, made = Engines(), []
        begun = threading.Event()

        def make() -> Model:
            begun.set()
            time.sleep(0.05)
            made.append(1)
            return Model()

        with ThreadPoolExecutor(4) as threads:
            asked = [threads.submit(engines.model, Model, [b"weights"], make) for _ in range(4)]
            assert begun.wait(10)
            assert len({id(one.result()) for one in asked}) == 1
        assert made == [1]

    def test_one_that_cant_be_made_is_tried_again(self) -> None:
        engines = Engines()

        def fails() -> Model:
            raise OSError("no memory")

        with pytest.raises(OSError, match="no memory"):
            engines.model(Model, [b"weights"], fails)
        assert isinstance(engines.model(Model, [b"weights"], Model), Model)

    def test_students_of_one_server_share_its_meter(self) -> None:
        engines = Engines()
        meter = engines.device("http://gpu:8000/v1")
        assert engines.device("http://gpu:8000/") is meter
        assert engines.device("http://other:8000/v1") is not meter
