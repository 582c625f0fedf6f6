"""What the students of one process share: a model that several of them use is held once."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from serving.adapter_shelf import AdapterShelf
from serving.device_time import DeviceTime
from serving.errors import ConfigError, DamagedRelease
from serving.student_settings import OnnxSettings
from serving.tested_on import check_tested_on

if TYPE_CHECKING:
    from serving.pool import Pool  # the HTTP client: whoever makes one imports it
    from serving.text_model import TextModel

log = logging.getLogger("understudy.students")

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"


class Engines:
    """The models in use, by the checksum of what they were made of. Each goes with the last student that holds it.

    `pool` are the servers of `student.vllm`; None: nobody is asked there. `adapters` is where servers find those that
    they are to load; None: what they need, they have. Each model remembers what it made of so many texts as `remember`
    says: who learns asks for the same again and again. Safe to use from several threads: releases are loaded off the
    request path.
    """

    def __init__(
        self,
        *,
        pool: Pool | None = None,
        onnx: OnnxSettings | None = None,
        adapters: AdapterShelf | None = None,
        remember: int = 0,
    ) -> None:
        self.pool = pool
        self.adapters = adapters
        self._remember = remember
        self._onnx = onnx or OnnxSettings()
        self._models: WeakValueDictionary[str, TextModel] = WeakValueDictionary()
        self._devices: WeakValueDictionary[str, DeviceTime] = WeakValueDictionary()
        self._loading = threading.Lock()
        self._said: set[str] = set()  # of versions and providers, which are few

    def text_model(self, files: Mapping[str, bytes]) -> TextModel:
        """The model in the files of a release: the one that is in use already, or it is loaded.

        Who asks while another loads it waits, and gets the same. Raises DamagedRelease, also for one that was tested
        on other execution providers and isn't known to be of 32 bits, and ConfigError where what runs it isn't
        installed, or can't run where it should.
        """
        missing = [name for name in (MODEL_FILE, TOKENIZER_FILE) if name not in files]
        if missing:
            raise DamagedRelease(f"the release holds no {' and no '.join(missing)}")
        parts = [files[name] for name in (MODEL_FILE, TOKENIZER_FILE)]
        checksum = "".join(hashlib.sha256(part).hexdigest() for part in parts)
        with self._loading:
            model = self._models.get(checksum)
            if model is None:
                model = self._models[checksum] = self._load(*parts)
        remark = check_tested_on(files, model.providers, model.runtime, exact=model.batches)
        if remark is not None and remark not in self._said:
            self._said.add(remark)
            log.warning("%s", remark)
        return model

    def check_installed(self) -> None:
        """See that what runs models in process is here, before much work goes into one. Raises ConfigError."""
        with _named_if_missing():
            from serving.text_model import check_installed
        check_installed(self._onnx.providers)

    def device(self, base_url: str) -> DeviceTime:
        """The meter of a server: the same for all students that are asked there."""
        place = base_url.rstrip("/").removesuffix("/v1")
        with self._loading:
            device = self._devices.get(place)
            if device is None:
                device = self._devices[place] = DeviceTime()
            return device

    def _load(self, model: bytes, tokenizer: bytes) -> TextModel:
        with _named_if_missing():
            # Only now: both libraries are an extra, and take a moment.
            from serving.text_model import TextModel
        return TextModel(
            model,
            tokenizer,
            providers=self._onnx.providers,
            threads=self._onnx.threads,
            remember=self._remember,
        )


@contextmanager
def _named_if_missing() -> Iterator[None]:
    """Around an import that needs the extra: raises ConfigError where it isn't installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("onnxruntime", "tokenizers"):
            raise
        raise ConfigError(
            f"a student's model runs in process, and {error.name} isn't installed: "
            "pip install 'understudy[encoder]'"
        ) from None
