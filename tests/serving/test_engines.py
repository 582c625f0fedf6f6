"""What the students of a process share."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving.engines import Engines
from serving.errors import ConfigError, DamagedRelease
from serving.student_settings import OnnxSettings

Files = dict[str, bytes]
ROOT = Path(__file__).resolve().parents[2]
WORDS = {"lost": [3.0, 0.0], "late": [0.0, 4.0]}


@pytest.fixture(scope="module")
def files(text_files: Callable[..., Files]) -> Files:
    return text_files(WORDS)


class TestEngines:
    def test_the_same_files_are_one_model(self, files: Files, text_files: Callable[..., Files]) -> None:
        engines = Engines()
        first = engines.text_model(files)
        assert engines.text_model({**files, "student.json": b"{}"}) is first
        assert engines.text_model(text_files({**WORDS, "gone": [1.0, 1.0]})) is not first

    def test_a_model_goes_with_the_last_who_holds_it(self, files: Files) -> None:
        engines = Engines()
        gc.collect()
        gc.disable()  # hundreds of megabytes mustn't wait for that
        try:
            first = engines.text_model(files)
            second, gone = engines.text_model(files), weakref.ref(first)
            del first
            assert gone() is second
            del second
            assert gone() is None
        finally:
            gc.enable()

    def test_who_asks_at_the_same_time_gets_the_same(self, files: Files) -> None:
        engines = Engines()
        with ThreadPoolExecutor(4) as threads:
            models = list(threads.map(lambda _: engines.text_model(files), range(8)))
        assert len({id(model) for model in models}) == 1

    def test_one_that_cant_be_loaded_is_tried_again(self, files: Files) -> None:
        engines = Engines()
        with pytest.raises(DamagedRelease):
            engines.text_model({**files, "model.onnx": b"half"})
        assert engines.text_model(files).width == 2

    @pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
    def test_a_file_that_is_missing_is_named(self, files: Files, name: str) -> None:
        with pytest.raises(DamagedRelease, match=name):
            Engines().text_model({other: data for other, data in files.items() if other != name})

    def test_a_provider_that_isnt_there_is_named(self, files: Files) -> None:
        engines = Engines(onnx=OnnxSettings(providers=["MadeUpExecutionProvider", "CPUExecutionProvider"]))
        with pytest.raises(ConfigError, match=r"no MadeUpExecutionProvider, and .*CPUExecutionProvider"):
            engines.text_model(files)
        with pytest.raises(ConfigError, match=r"no MadeUpExecutionProvider, and .*CPUExecutionProvider"):
            engines.check_installed()
        Engines().check_installed()

    @pytest.mark.parametrize("library", ["onnxruntime", "tokenizers"])
    def test_without_the_extra_it_is_said_what_to_install(
        self, files: Files, tmp_path: Path, library: str
    ) -> None:
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        code = f"""
import sys
from pathlib import Path
sys.modules["{library}"] = None  # as if it weren't there
from serving.engines import Engines
from serving.errors import ConfigError
files = {{path.name: path.read_bytes() for path in Path({str(tmp_path)!r}).iterdir()}}
for needs_it in (lambda: Engines().text_model(files), Engines().check_installed):
    try:
        needs_it()
    except ConfigError as error:
        print(error)
"""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        said = f"a student's model runs in process, and {library} isn't installed: pip install 'understudy[encoder]'\n"
        assert done.stdout == 2 * said

    def test_students_of_one_server_share_its_meter(self) -> None:
        engines = Engines()
        meter = engines.device("http://gpu:8000/v1")
        assert engines.device("http://gpu:8000/") is meter
        assert engines.device("http://other:8000/v1") is not meter
