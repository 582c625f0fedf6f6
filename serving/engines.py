"""What the students of one process share: a model that several of them use is held once."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar
from weakref import WeakValueDictionary

from serving.adapter_shelf import AdapterShelf
from serving.device_time import DeviceTime

M = TypeVar("M")


class Engines:
    """The models in use, by the checksum of what they were made of. Each goes with the last student that holds it.

    `adapters` is where servers find those that they are to load; None: what they need, they have. Safe to use from
    several threads: releases are loaded off the request path.
    """

    def __init__(self, *, adapters: AdapterShelf | None = None) -> None:
        self.adapters = adapters
        self._models: WeakValueDictionary[str, object] = WeakValueDictionary()
        self._devices: WeakValueDictionary[str, DeviceTime] = WeakValueDictionary()
        self._loading = threading.Lock()

    def model(self, kind: type[M], content: Sequence[bytes], make: Callable[[], M]) -> M:
        """The model of this content: the one that is in use already, or what `make` makes of it.

        Who asks while another makes it waits, and gets the same. Raises what `make` raises.
        """
        checksum = hashlib.sha256()
        for part in content:
            checksum.update(hashlib.sha256(part).digest())
        with self._loading:
            model = self._models.get(checksum.hexdigest())
            if not isinstance(model, kind):
                model = self._models[checksum.hexdigest()] = make()
            return model

    def device(self, base_url: str) -> DeviceTime:
        """The meter of a server: the same for all students that are asked there."""
        place = base_url.rstrip("/").removesuffix("/v1")
        with self._loading:
            device = self._devices.get(place)
            if device is None:
                device = self._devices[place] = DeviceTime()
            return device
