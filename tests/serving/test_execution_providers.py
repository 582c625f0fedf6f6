"""What a model can run on. OpenVINO's tests run where it is installed:

`python -m venv v && v/bin/pip install '.[encoder]' pytest pytest-timeout hypothesis onnx httpx pyyaml`, then
`v/bin/pip uninstall -y onnxruntime && v/bin/pip install onnxruntime-openvino`, then `v/bin/pytest` this file.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from serving.engines import Engines
from serving.errors import ConfigError, DamagedRelease
from serving.execution_providers import CPU, OPENVINO, check_there, options_of
from serving.student_settings import OnnxSettings
from serving.text_model import TextModel, Tokens

Files = dict[str, bytes]
ROOT = Path(__file__).resolve().parents[2]
WORDS = {"lost": [3.0, 0.0, 1.0], "card": [1.0, 0.5, 0.0], "late": [0.0, 4.0, 0.0], "money": [0.0, 0.0, 5.0]}
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
BUILDS = "pip uninstall -y onnxruntime onnxruntime-gpu onnxruntime-openvino && pip install"


class TestWhatIsThere:
    def refusal(self, *providers: str, there: Sequence[str] = (CPU,)) -> str:
        with pytest.raises(ConfigError) as raised:
            check_there(providers, there=there, known=onnxruntime.get_all_providers())
        return str(raised.value)

    def test_what_is_there_is_taken(self) -> None:
        check_there([CPU], there=[CPU], known=[])
        check_there([OPENVINO, CPU], there=[OPENVINO, CPU], known=[])

    @pytest.mark.parametrize(
        ("provider", "package"),
        [(OPENVINO, "onnxruntime-openvino"), (CUDA, "onnxruntime-gpu"), (TENSORRT, "onnxruntime-gpu")],
    )
    def test_the_package_is_named(self, provider: str, package: str) -> None:
        said = f"this build of ONNX Runtime has no {provider}, only {CPU}: {BUILDS} {package}, or change"
        assert self.refusal(provider).startswith(said)
        assert self.refusal(provider, CPU).startswith(said)

    def test_two_of_one_package(self) -> None:
        said = self.refusal(TENSORRT, CUDA, CPU)
        assert f"has no {TENSORRT} and no {CUDA}, only {CPU}: {BUILDS} onnxruntime-gpu, or" in said

    def test_what_no_package_has_together(self) -> None:
        assert "install a build of it that has all of them" in self.refusal(CUDA, OPENVINO)
        assert "all of them" in self.refusal(CUDA, OPENVINO, there=[OPENVINO, CPU])
        assert "all of them" in self.refusal("CoreMLExecutionProvider")

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("OpenVINO", OPENVINO),
            ("openvinoexecutionprovider", OPENVINO),
            ("TensorRT", TENSORRT),
            ("cuda", CUDA),
        ],
    )
    def test_a_name_that_is_none(self, name: str, meant: str) -> None:
        assert self.refusal(name) == (
            f"ONNX Runtime knows no {name} ({meant}?), and this build has {CPU}: change student.onnx.providers"
        )

    def test_a_name_like_no_other(self) -> None:
        assert self.refusal("Abacus", CPU).startswith(
            f"ONNX Runtime knows no Abacus, and this build has {CPU}"
        )

    def test_only_openvino_is_told_more(self) -> None:
        said = {"device_type": "CPU", "precision": "FP32", "num_of_threads": "3"}
        assert options_of(OPENVINO, 3) == said
        assert options_of(CPU, 3) == options_of(CUDA, 3) == options_of(TENSORRT, 3) == {}


@pytest.mark.skipif(
    OPENVINO not in onnxruntime.get_available_providers(),
    reason="this ONNX Runtime is built without OpenVINO",
)
@pytest.mark.parametrize("providers", [[OPENVINO, CPU], [OPENVINO]], ids=["before the CPU", "alone"])
class TestOpenVino:
    def load(self, files: Files, providers: list[str], threads: int = 1) -> TextModel:
        return Engines(onnx=OnnxSettings(providers=providers, threads=threads)).text_model(files)

    def test_its_numbers_are_those_of_the_cpu(
        self, text_files: Callable[..., Files], providers: list[str]
    ) -> None:
        files = text_files(WORDS, slow=2)
        there, here = self.load(files, providers), self.load(files, [CPU])
        assert (there.width, there.longest, there.batches) == (here.width, here.longest, here.batches)
        dice = random.Random(7)
        texts = [" ".join(dice.choices([*WORDS, "odd"], k=dice.randrange(0, 33))) for _ in range(40)]
        tokens = [there.tokens(text) for text in texts]
        expected = np.vstack([here.numbers(text) for text in texts])
        np.testing.assert_allclose(np.vstack([there.numbers(text) for text in texts]), expected, atol=1e-3)
        np.testing.assert_allclose(there.read(tokens), expected, atol=1e-3)
        with ThreadPoolExecutor(3) as threads:
            at_once = np.vstack([one[0] for one in threads.map(lambda one: there.read([one]), tokens)])
        np.testing.assert_allclose(at_once, expected, atol=1e-3)

    @pytest.mark.skipif(sys.platform != "linux", reason="reads what the kernel says of each thread")
    def test_one_thread_is_one_thread(
        self, text_files: Callable[..., Files], tmp_path: Path, providers: list[str]
    ) -> None:
        for name, data in text_files(WORDS, slow=4).items():
            (tmp_path / name).write_bytes(data)
        code = f"""
import threading
from pathlib import Path
from serving.text_model import TextModel

def busy():
    return {{
        task.name: int((task / "schedstat").read_text().split()[0]) for task in Path("/proc/self/task").iterdir()
    }}

folder = Path({str(tmp_path)!r})
files = [(folder / name).read_bytes() for name in ("model.onnx", "tokenizer.json")]
model = TextModel(*files, providers={providers!r}, threads=1)
model.numbers("lost card")
before = busy()
for _ in range(5):
    model.numbers("lost card")
worked = {{task: spent - before.get(task, 0) for task, spent in busy().items()}}
own = worked.pop(str(threading.get_native_id()))
print(sum(worked.values()) / own)
"""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=True
        )
        assert float(done.stdout) < 0.05  # on two cores, each did half of it

    def test_what_its_kernels_dont_say_is_said(
        self, text_files: Callable[..., Files], providers: list[str]
    ) -> None:
        files = text_files(WORDS)
        more = text_files({**WORDS, "abroad": [1.0, 1.0, 1.0]})
        with pytest.raises(DamagedRelease, match="can't read texts of 32 tokens, of which there are 7"):
            self.load({**files, "tokenizer.json": more["tokenizer.json"]}, providers)
        # It is needed: nothing is said, and numbers come of a token that the model doesn't have.
        assert np.isfinite(self.load(files, providers).read([Tokens([6], [0])])).all()

    def test_weights_from_elsewhere_arent_read(
        self,
        text_files: Callable[..., Files],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        providers: list[str],
    ) -> None:
        files = text_files(WORDS)
        model = onnx.load_from_string(files["model.onnx"])
        table = model.graph.initializer[0]
        (tmp_path / "weights.bin").write_bytes(table.raw_data)
        onnx.external_data_helper.set_external_data(
            table, location="weights.bin", offset=0, length=len(table.raw_data)
        )
        table.ClearField("raw_data")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DamagedRelease):
            self.load({**files, "model.onnx": model.SerializeToString()}, providers)
        self.load(files, providers)
        assert [path.name for path in tmp_path.iterdir()] == ["weights.bin"]

    def test_a_model_doesnt_keep_the_bytes_it_was_made_of(
        self, text_files: Callable[..., Files], providers: list[str]
    ) -> None:
        files = text_files(WORDS)
        before = sys.getrefcount(files["model.onnx"])
        model = self.load(files, providers)
        after = sys.getrefcount(files["model.onnx"])
        assert model.numbers("card")[0] == pytest.approx(1.0)
        assert after == before
