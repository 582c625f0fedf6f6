"""The student `encoder` in process: the same answers learned and served, from a thread with a line before it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import onnxruntime
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routers.meter import TokenMeter
from serving.closed_answers import ANSWERS_FILE, AnswerSpace, KnownAnswer, TextTooLong, TokenEstimate
from serving.closed_students import load_closed_student
from serving.embedded import EmbeddedLinear
from serving.encoder import Encoder, EncoderStudent
from serving.engines import Engines
from serving.errors import DamagedRelease
from serving.exchange import StudentAnswer
from serving.guarded_student import GuardedStudent
from serving.regression import Regression
from serving.releases import Release
from serving.students import load_student
from serving.text_thread import LIMIT, StudentBusy, TextThread, UnreadableText

Files = dict[str, bytes]
T = TypeVar("T")
WORDS = {
    "lost": [9.0, 0.0, 1.0],
    "late": [0.0, 7.0, 0.5],
    "money": [0.0, 0.5, 8.0],
    "endless": [float("inf"), 0.0, 0.0],
    "boom": [0.0, 0.0, 0.0],
    "card": [1.0, 0.5, 0.0],
}
SPACE = AnswerSpace(
    [KnownAnswer(key, [{"message": {"content": key}}], 2, seen=5) for key in ("lost", "late", "refund")],
    TokenEstimate(8.0, 0.25),
)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def files(request: pytest.FixtureRequest, text_files: Callable[..., Files]) -> Files:
    model = text_files(WORDS, precision=request.param, fails_on="boom")
    tested = {"providers": ["CPUExecutionProvider"], "onnxruntime": onnxruntime.__version__}
    return {**model, ANSWERS_FILE: SPACE.dump("encoder", **tested)}


@pytest.fixture(scope="module")
def encoder(files: Files) -> Encoder:
    return Encoder.load(files, Engines())


def student_of(model: Files, kind: str) -> Files:
    """The files of a student that answers by a model's own logits, or by a regression on them."""
    engines = Engines()
    if kind == "encoder":
        return Encoder.of(SPACE, model, engines).files()
    regression = Regression(np.eye(3, dtype=np.float32), np.zeros(3, dtype=np.float32))
    return EmbeddedLinear(SPACE, regression, engines.text_model(model), model).files()


def asked(text: str) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}]}


def with_student(files: Files, use: Callable[[EncoderStudent], Coroutine[Any, Any, T]]) -> T:
    """Use a student as a gateway would, and close it."""

    async def play() -> T:
        student = EncoderStudent.load(files, Engines())
        try:
            async with asyncio.timeout(60):
                return await use(student)
        finally:
            await student.aclose()

    return asyncio.run(play())


def content(answer: StudentAnswer) -> str:
    said: str = answer.choices[0]["message"]["content"]
    return said


@contextmanager
def no_thread_to_be_had() -> Iterator[None]:
    """Whoever starts a thread meanwhile asks for a stack larger than a process has addresses for."""
    usual = threading.stack_size(2**47)
    try:
        yield
    finally:
        threading.stack_size(usual)


class TestAnswers:
    def test_what_learning_sees_is_what_is_served(self, files: Files, encoder: Encoder) -> None:
        texts = ["lost card", "late", "money card card", "something else", "", "late money"]

        async def use(student: EncoderStudent) -> list[StudentAnswer]:
            alone = [await student.answer(asked(text)) for text in texts]
            together = await asyncio.gather(*(student.answer(asked(text)) for text in texts))
            assert not student.busy
            return [*alone, *together]

        for text, answer in zip(texts * 2, with_student(files, use), strict=True):
            predicted = encoder.predict(text)
            assert content(answer) == encoder.answers[predicted.index].key
            assert answer.score == pytest.approx(predicted.score, abs=1e-5)
            assert answer.signals == pytest.approx(predicted.signals, abs=1e-5)
            assert (answer.model, (answer.usage or {})["completion_tokens"]) == ("encoder", 2)
            assert 0 < answer.took_s <= answer.latency_s

    @settings(max_examples=25, deadline=None)
    @given(
        texts=st.lists(
            st.lists(st.sampled_from(["lost", "late", "money", "card", "odd"]), max_size=32).map(" ".join),
            min_size=1,
            max_size=LIMIT,
        )
    )
    def test_whatever_is_asked_together_is_answered_as_alone(
        self, files: Files, encoder: Encoder, texts: list[str]
    ) -> None:
        async def use(student: EncoderStudent) -> list[StudentAnswer]:
            return await asyncio.gather(*(student.answer(asked(text)) for text in texts))

        for text, answer in zip(texts, with_student(files, use), strict=True):
            predicted = encoder.predict(text)
            assert answer.score == pytest.approx(predicted.score, abs=1e-4)
            if predicted.score > 1e-3:
                assert content(answer) == encoder.answers[predicted.index].key

    def test_what_it_isnt_made_for(self, files: Files) -> None:
        async def use(student: EncoderStudent) -> None:
            assert student.unsupported(asked("lost")) is None
            assert student.unsupported({**asked("lost"), "tools": [{}]}) == "tools"
            student.stream(asked("lost"))
            with pytest.raises(TextTooLong):
                await student.answer(asked("card " * 33))

        with_student(files, use)


class TestLine:
    def test_it_has_an_end(self, files: Files) -> None:
        async def use(student: EncoderStudent) -> list[StudentAnswer | BaseException]:
            asking = [student.answer(asked("lost")) for _ in range(LIMIT + 6)]
            told = await asyncio.gather(*asking, return_exceptions=True)
            assert content(await student.answer(asked("late"))) == "late"  # there is room again
            return told

        told = with_student(files, use)
        assert [isinstance(one, StudentAnswer) for one in told] == [True] * LIMIT + [False] * 6
        assert all(isinstance(one, StudentBusy) for one in told[LIMIT:])

    def test_a_full_line_says_nothing_of_the_student(self, files: Files) -> None:
        async def use(student: EncoderStudent) -> None:
            guarded = GuardedStudent(student)
            asking = [guarded.answer(asked("lost")) for _ in range(4 * LIMIT)]
            told = await asyncio.gather(*asking, return_exceptions=True)
            assert sum(isinstance(one, StudentBusy) for one in told) == 3 * LIMIT
            for _ in range(30):
                with pytest.raises(TextTooLong):
                    await guarded.answer(asked("card " * 33))
            assert content(await guarded.answer(asked("lost"))) == "lost"

        with_student(files, use)

    def test_only_what_is_at_fault_fails(self, files: Files) -> None:
        texts = ["lost", "boom", "late", "endless", "card " * 33, "lost late boom", "money"]

        async def use(student: EncoderStudent) -> list[StudentAnswer | BaseException]:
            asking = [student.answer(asked(text)) for text in texts]
            told = await asyncio.gather(*asking, return_exceptions=True)
            assert not student.busy
            assert content(await student.answer(asked("money"))) == "refund"  # it goes on
            return told

        told = with_student(files, use)
        answered = {
            text: content(one)
            for text, one in zip(texts, told, strict=True)
            if isinstance(one, StudentAnswer)
        }
        assert answered == {"lost": "lost", "late": "late", "money": "refund"}
        assert isinstance(told[3], UnreadableText)
        assert isinstance(told[4], TextTooLong)
        assert "out of" in str(told[1])  # ONNX Runtime's own words

    def test_who_has_left_isnt_answered(self, text_files: Callable[..., Files]) -> None:
        model = text_files(WORDS, precision="int8", slow=8)
        files = {**model, ANSWERS_FILE: SPACE.dump("encoder")}

        async def use(student: EncoderStudent) -> None:
            gone = [asyncio.create_task(student.answer(asked("late"))) for _ in range(LIMIT - 1)]
            stays = asyncio.create_task(student.answer(asked("lost")))
            await asyncio.sleep(0)
            for one in gone:
                one.cancel()
            answer = await stays
            assert content(answer) == "lost"
            # Of all that had been before it, one was read at most; it would have waited for all of them.
            assert answer.latency_s < 20 * answer.took_s
            assert all(one.cancelled() for one in gone)

        with_student(files, use)

    def test_closing_ends_its_thread(self, files: Files) -> None:
        def threads() -> set[threading.Thread]:
            return {one for one in threading.enumerate() if one.name == "understudy-texts"}

        async def play() -> None:
            before = threads()
            student = EncoderStudent.load(files, Engines())
            assert threads() == before  # nobody has asked
            await student.answer(asked("lost"))
            assert len(threads() - before) == 1
            asking = [asyncio.create_task(student.answer(asked("lost"))) for _ in range(20)]
            await asyncio.sleep(0)
            await student.aclose()
            told = await asyncio.gather(*asking, return_exceptions=True)
            assert all(isinstance(one, StudentAnswer | StudentBusy) for one in told)
            assert threads() == before
            with pytest.raises(StudentBusy, match="closed"):
                await student.answer(asked("lost"))
            await student.aclose()

        asyncio.run(play())

    def test_where_no_thread_can_be_had_the_next_text_tries_again(self, files: Files) -> None:
        async def use(student: EncoderStudent) -> None:
            with no_thread_to_be_had():
                for _ in range(2):
                    with pytest.raises(RuntimeError, match="can't start new thread"):
                        await student.answer(asked("lost"))
                    assert not student.busy
            assert content(await student.answer(asked("late"))) == "late"

        with_student(files, use)

    def test_one_that_never_had_a_thread_closes(self, files: Files) -> None:
        async def use() -> None:
            student = EncoderStudent.load(files, Engines())
            with no_thread_to_be_had():
                with pytest.raises(RuntimeError, match="can't start new thread"):
                    await student.answer(asked("lost"))
                await student.aclose()

        asyncio.run(use())

    def test_an_event_loop_that_ended_doesnt_matter(self, files: Files) -> None:
        texts = TextThread(Engines().text_model(files))

        async def leave() -> None:
            task = asyncio.create_task(texts.read("lost"))
            await asyncio.sleep(0)
            task.cancel()

        async def stay() -> list[float]:
            numbers: list[float] = (await texts.read("lost")).numbers.tolist()
            await texts.aclose()
            return numbers

        asyncio.run(leave())
        assert asyncio.run(stay()) == [9.0, 0.0, 1.0]


class TestReleases:
    def release(self, files: Files) -> Release:
        return Release("intents", "r0001", {"student": "encoder"}, files)

    def test_files_are_the_same_again(self, files: Files, encoder: Encoder) -> None:
        assert encoder.files() == files
        again = load_closed_student(encoder.files(), Engines())
        assert again.predict("lost card") == encoder.predict("lost card")
        assert again.sees == "message"

    @pytest.mark.parametrize("kind", ["encoder", "embedding"])
    def test_one_of_8_bits_runs_only_on_what_it_was_tested_on(
        self, text_files: Callable[..., Files], kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        for precision in ("fp32", "int8"):
            files = student_of(text_files(WORDS, precision=precision), kind)
            described = orjson.loads(files[ANSWERS_FILE])
            assert described["providers"] == ["CPUExecutionProvider"]
            described["providers"] = ["CUDAExecutionProvider", "CPUExecutionProvider"]
            elsewhere = {**files, ANSWERS_FILE: orjson.dumps(described)}
            del described["providers"]
            before = {**files, ANSWERS_FILE: orjson.dumps(described)}
            for tested_here in (files, before):
                load_closed_student(tested_here, Engines())
            assert not caplog.records
            said = (
                "tested on CUDAExecutionProvider, CPUExecutionProvider, and student.onnx.providers is "
                "CPUExecutionProvider"
            )
            if precision == "fp32":
                load_closed_student(elsewhere, Engines())
                assert said in caplog.text
                caplog.clear()
            else:
                with pytest.raises(DamagedRelease, match=said):
                    load_closed_student(elsewhere, Engines())
                card = {"student": "encoder" if kind == "encoder" else "linear"}
                with pytest.raises(DamagedRelease, match=said):
                    load_student(Release("intents", "r0001", card, elsewhere), TokenMeter, Engines())

    @pytest.mark.parametrize("kind", ["encoder", "embedding"])
    def test_another_version_of_onnx_runtime_is_told_of_once(
        self, text_files: Callable[..., Files], kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        for precision in ("fp32", "int8"):
            files = student_of(text_files(WORDS, precision=precision), kind)
            described = orjson.loads(files[ANSWERS_FILE])
            assert described["onnxruntime"] == onnxruntime.__version__
            engines = Engines()
            for version in (onnxruntime.__version__, None, "1.2.3", "1.2.3"):
                kept = {**described, "onnxruntime": version}
                if version is None:
                    del kept["onnxruntime"]  # a release of before it was kept
                student = load_closed_student({**files, ANSWERS_FILE: orjson.dumps(kept)}, engines)
                assert student.predict("lost card") == load_closed_student(files, engines).predict(
                    "lost card"
                )
            told = [one.getMessage() for one in caplog.records]
            caplog.clear()
            if precision == "fp32":
                assert told == [], "it differs by the last bits, as it does from batch to batch"
            else:
                assert told == [
                    "a student that isn't known to be of 32 bits was tested on ONNX Runtime 1.2.3, and runs on "
                    f"{onnxruntime.__version__}: it may answer some requests differently, which its audits would "
                    "show; learn anew to have it tested here"
                ]

    @pytest.mark.parametrize("version", [7, ["1.2.3"], "1" * 200])
    def test_a_version_that_is_none_is_told(self, files: Files, version: object) -> None:
        described = {**orjson.loads(files[ANSWERS_FILE]), "onnxruntime": version}
        with pytest.raises(DamagedRelease, match="names no version of ONNX Runtime"):
            load_closed_student({**files, ANSWERS_FILE: orjson.dumps(described)}, Engines())

    @pytest.mark.parametrize("providers", [7, [], [7], "CPUExecutionProvider", None])
    def test_providers_that_are_none_are_told(self, files: Files, providers: object) -> None:
        described = {**orjson.loads(files[ANSWERS_FILE]), "providers": providers}
        with pytest.raises(DamagedRelease, match="names no providers"):
            load_closed_student({**files, ANSWERS_FILE: orjson.dumps(described)}, Engines())

    def test_a_release_is_served_by_its_kind(self, files: Files) -> None:
        assert isinstance(load_student(self.release(files), TokenMeter, Engines()), EncoderStudent)

    @pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", ANSWERS_FILE])
    def test_a_file_that_is_missing_is_named(self, files: Files, name: str) -> None:
        lacking = {other: data for other, data in files.items() if other != name}
        with pytest.raises(DamagedRelease, match=name):
            Encoder.load(lacking, Engines())

    def test_another_models_answers_are_told(self, files: Files) -> None:
        answers = orjson.loads(files[ANSWERS_FILE])
        spoilt = {**files, ANSWERS_FILE: orjson.dumps({**answers, "answers": answers["answers"][1:]})}
        with pytest.raises(DamagedRelease, match=r"tells 3 answers .* has 2: one of them is another model's"):
            load_student(self.release(spoilt), TokenMeter, Engines())
