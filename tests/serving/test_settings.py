from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest

from serving.classify_plan import ClassifyPlan
from serving.configuration import load_settings
from serving.errors import ConfigError
from serving.lm_plan import LmPlan
from serving.settings import Settings
from serving.student_choice import StudentChoice


def written(folder: Path, text: str) -> Path:
    path = folder / "understudy.toml"
    path.write_text(text)
    return path


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(written(folder, text))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_a_file_everything_has_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings()
    assert settings.server.port == 8080
    assert settings.task == []


def test_the_file_in_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "[server]\nport = 9999\n")
    assert load_settings().server.port == 9999


def test_a_file_that_was_asked_for_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no configuration file .*missing\.toml"):
        load_settings(tmp_path / "missing.toml")


def test_a_folder_or_foreign_bytes_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        load_settings(tmp_path)
    (tmp_path / "understudy.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="isn't UTF-8"):
        load_settings(tmp_path / "understudy.toml")


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_SERVER__PORT", "7777")
    monkeypatch.setenv("UNDERSTUDY_SERVER__API_KEYS", '["one", "two"]')
    monkeypatch.setenv("UNDERSTUDY_STATE_DIR", "/var/lib/understudy")
    settings = load_settings(written(tmp_path, "[server]\nport = 9999\nworkers = 3\n"))
    assert settings.server.port == 7777
    assert settings.server.workers == 3
    assert [key.get_secret_value() for key in settings.server.api_keys] == ["one", "two"]
    assert settings.state_dir == Path("/var/lib/understudy")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[server]\nprot = 1\n", "unknown key server.prot: did you mean server.port?"),
        ("[sever]\nport = 1\n", "unknown key sever: did you mean server?"),
        ("[[tasks]]\nname = 'a'\n", "unknown key tasks: did you mean task?"),
        ("[teacher.price]\ninput = 1\noutput = 2\noutptu = 3\n", "did you mean teacher.price.output?"),
        (
            "[[task]]\nname = 'a'\n[[task]]\nname = 'b'\nmatch = {modle = 'x'}\n",
            "unknown key task[1].match.modle: did you mean task[1].match.model?",
        ),
        ("[log]\nzzzzzz = 1\n", "unknown key log.zzzzzz: log knows durability, "),
    ],
)
def test_an_unknown_key_is_named_in_full_with_the_nearest_right_one(
    tmp_path: Path, text: str, expected: str
) -> None:
    assert expected in complaint(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "key", "value", "allowed"),
    [
        ("[server]\nport = 99999\n", "server.port", "99999", "less than or equal to 65535"),
        ('[[task]]\nname = "a"\ncertainty = 95\n', "task[0].certainty", "95", "it is a share: 5 % is 0.05"),
        ('[[task]]\nname = "a"\nprove = ["x"]\n', "task[0].prove", "['x']", "a table, such as"),
        ("[server]\nworkers = 'many'\n", "server.workers", "'many'", "whole number"),
        ("[log]\ndurability = 'sometimes'\n", "log.durability", "'sometimes'", "'fsync' or 'relaxed'"),
        ("[teacher]\nbase_url = 'api.example'\n", "teacher.base_url", "'api.example'", "http:// or https://"),
        ("[task_defaults]\nmax_disagreement = 0\n", "task_defaults.max_disagreement", "0", "greater than 0"),
        ("[[task]]\nname = 'Big Task'\n", "task[0].name", "'Big Task'", "a-z 0-9"),
        ("[[task]]\nname = 'other'\n", "task", "'other'", "a name of our own"),
        (
            "[[task]]\nname = 'a'\nmatch = {system = '('}\n",
            "task[0].match.system",
            "'('",
            "regular expression",
        ),
        ("[[task]]\nname = 'a'\n[[task]]\nname = 'a'\n", "task", "'a'", "a is there more than once"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(
    tmp_path: Path, text: str, key: str, value: str, allowed: str
) -> None:
    message = complaint(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'understudy.toml'}: {key} = ")
    assert value in message
    assert allowed in message


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    message = complaint(tmp_path, "[server]\nprot = 1\nport = -1\n")
    assert "server.prot" in message
    assert "server.port = -1" in message


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert complaint(tmp_path, "[[task]]\nmatch = {model = 'x'}\n").endswith(": task[0].name is missing")


def test_a_syntax_error_says_the_line(tmp_path: Path) -> None:
    message = complaint(tmp_path, "[server]\nport = 1\nworkers = \n")
    assert "line 3" in message
    assert "understudy.toml" in message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "UNDERSTUDY_SERVER__PROT",
            "1",
            "server.prot (from UNDERSTUDY_SERVER__PROT): did you mean server.port?",
        ),
        ("UNDERSTUDY_SERVER__PORT", "x", "server.port (from UNDERSTUDY_SERVER__PORT) = 'x'"),
        ("UNDERSTUDY_SEVER__PORT", "1", "unknown environment variable UNDERSTUDY_SEVER__PORT"),
        ("UNDERSTUDY_STATEDIR", "x", "did you mean UNDERSTUDY_STATE_DIR?"),
        ("UNDERSTUDY_SERVER__API_KEYS", "plain", "UNDERSTUDY_SERVER__API_KEYS should be JSON"),
        (
            "UNDERSTUDY_TASK_DEFAULTS__ALWAYS_ESCALATE",
            "[a",
            "UNDERSTUDY_TASK_DEFAULTS__ALWAYS_ESCALATE should be",
        ),
    ],
)
def test_a_bad_variable_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(name, value)
    assert expected in complaint(tmp_path, "")


def test_variables_of_other_purposes_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_REQUIRE", "redis")
    assert load_settings(written(tmp_path, "")).server.workers == 1


@pytest.mark.parametrize(
    "text",
    [
        "[server]\napi_keys = 'sk-very-secret'\n",
        "[server]\napi_keys = ['sk-very-secret', 3]\nport = 'x'\n",
        "[teacher]\napi_key_env = 'sk-very-secret'\n",
        "[teacher]\napi_key = 'sk-very-secret'\n",
        "[teacher]\nbase_url = 'ftp://user:sk-very-secret@host'\n",
        "server = [{api_keys = ['sk-very-secret']}]\n",
    ],
)
def test_no_secret_is_repeated(tmp_path: Path, text: str) -> None:
    assert "sk-very-secret" not in complaint(tmp_path, text)


def test_a_task_takes_what_it_leaves_out_from_the_defaults(tmp_path: Path) -> None:
    settings = load_settings(
        written(
            tmp_path,
            "[task_defaults]\nmax_disagreement = 0.2\ncertainty = 0.8\n"
            "[[task]]\nname = 'a'\ncertainty = 0.95\n",
        )
    )
    assert settings.for_task("a").max_disagreement == 0.2
    assert settings.for_task("a").certainty == 0.95
    assert settings.for_task("discovered").certainty == 0.8


def test_the_teachers_key_comes_from_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(written(tmp_path, "[teacher]\napi_key_env = 'MY_KEY'\n"))
    monkeypatch.delenv("MY_KEY", raising=False)
    assert settings.teacher_key() is None
    monkeypatch.setenv("MY_KEY", "sk-1\n")
    key = settings.teacher_key()
    assert key is not None
    assert key.get_secret_value() == "sk-1"
    assert "sk-1" not in repr(key)


@pytest.mark.parametrize("key", ["sk-tëacher", "sk-1\nsk-2", "sk-1\x7f"])
def test_a_teachers_key_that_cant_be_sent_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    settings = load_settings(written(tmp_path, "[teacher]\napi_key_env = 'MY_KEY'\n"))
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ConfigError, match="the environment variable MY_KEY has characters") as caught:
        settings.teacher_key()
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ("['good', '']", "no client can send key 2 of 2"),
        ("['spaced ']", "no client can send key 1 of 1"),
        ("['kéy']", "no client can send key 1 of 1"),
        ("['sha256:secret']", "key 1 of 1 begins with sha256: and should go on with the 64 hex digits"),
    ],
)
def test_a_key_of_our_own_that_nobody_could_use_is_refused(tmp_path: Path, keys: str, what: str) -> None:
    said = complaint(tmp_path, f"[server]\napi_keys = {keys}\n")
    assert ": server.api_keys = (hidden): " in said
    assert what in said
    assert "secret" not in said


def test_a_section_and_its_key_are_parted_by_two_underscores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_TASK_DEFAULTS_CERTAINTY", "0.95")
    message = complaint(tmp_path, "")
    assert message == (
        "unknown environment variable UNDERSTUDY_TASK_DEFAULTS_CERTAINTY: "
        "did you mean UNDERSTUDY_TASK_DEFAULTS__CERTAINTY?"
    )


def test_what_kubernetes_sets_for_a_service_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("UNDERSTUDY_SERVICE_HOST", "10.0.0.1"),
        ("UNDERSTUDY_PORT", "tcp://10.0.0.1:80"),
        ("UNDERSTUDY_SERVER_PORT", "tcp://10.0.0.2:80"),
        ("UNDERSTUDY_SERVER_PORT_80_TCP_ADDR", "10.0.0.2"),
    ):
        monkeypatch.setenv(name, value)
    assert load_settings(written(tmp_path, "")).server.port == 8080


def test_each_mistake_is_said_to_be_where_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_SERVER__PORT", "many")
    message = complaint(tmp_path, "[server]\nprt = 1\n")
    assert message == (
        "server.port (from UNDERSTUDY_SERVER__PORT) = 'many': should be a whole number; "
        f"{tmp_path / 'understudy.toml'}: unknown key server.prt: did you mean server.port?"
    )


@pytest.mark.parametrize("text", ["[teacher]\napi_key = 'sk-1'\n", "[teacher]\napi_key_env = 'sk-1'\n"])
def test_who_writes_the_key_into_the_file_is_told_where_it_belongs(tmp_path: Path, text: str) -> None:
    message = complaint(tmp_path, text)
    assert "environment" in message
    assert "the key itself" in message
    assert "sk-1" not in message


def test_one_pair_of_brackets_is_not_enough_for_a_task(tmp_path: Path) -> None:
    assert "write [[task]]" in complaint(tmp_path, "[task]\nname = 'a'\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[task_defaults]\nprove = {refund = 0.06}", "prove lets 0.06 of the answers 'refund' disagree"),
        (
            "[task_defaults]\nprove = {refund = 0.04}\n[[task]]\nname = 'a'\nmax_disagreement = 0.03",
            "task a: prove lets 0.04 of the answers 'refund' disagree, but max_disagreement is 0.03",
        ),
        (
            "[[task]]\nname = 'a'\nadmission = 'e-process'\n[task.student]\nkind = 'lm'\nmodel = 'm'\n"
            "base_url = 'http://127.0.0.1:1/v1'",
            'task a: admission = "e-process" tests students of kind "linear" only',
        ),
        ("[[task]]\nname = 'a'\n[task.prove]\nrefund = 0.0", "greater than 0"),
        ("[[task]]\nname = 'a'\n[task.prove]\nrefund = 'never'", "should be a number"),
        ("[[task]]\nname = 'a'\nprove = ['refund']", "prove"),
    ],
)
def test_keys_of_a_task_that_contradict_each_other_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "understudy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert said in str(caught.value)
    assert "[{" not in str(caught.value), "the list of all tasks hides what is wrong with one"


def test_a_named_answer_may_be_held_to_what_holds_for_all(tmp_path: Path) -> None:
    path = tmp_path / "understudy.toml"
    path.write_text(
        "[task_defaults]\nmax_disagreement = 0.1\n[[task]]\nname = 'a'\n[task.prove]\n'ask a person' = 0.1\n"
    )
    assert load_settings(path).for_task("a").prove == {"ask a person": 0.1}


class TestStudents:
    LM: ClassVar[dict[str, Any]] = {"kind": "lm", "base_url": "http://localhost:8000/v1", "model": "small"}

    def test_a_language_model(self) -> None:
        choice = StudentChoice(**self.LM)
        assert (choice.checkpoints, choice.commit_tokens, choice.hold_back_s) == ([8, 24, 64], 64, 1.0)
        plan = LmPlan.of(StudentChoice(**self.LM, checkpoints=[24, 8, 8], commit_tokens=32, api_key_env="K"))
        assert (plan.base_url, plan.model, plan.api_key_env) == ("http://localhost:8000/v1", "small", "K")
        assert (plan.checkpoints, plan.marks, plan.stop_below) == ((8, 24), (8, 24, 32), None)
        assert LmPlan.load(plan.files()) == plan
        with pytest.raises(ValueError, match="'linear' isn't asked over HTTP"):
            LmPlan.of(StudentChoice())

    def test_an_encoder_behind_a_server(self) -> None:
        choice = StudentChoice(**{**self.LM, "kind": "encoder"}, sees="last", timeout_s=3.0)
        plan = ClassifyPlan.of(choice)
        assert plan == ClassifyPlan("http://localhost:8000/v1", "small", timeout_s=3.0, sees="last")
        with pytest.raises(ValueError, match="'lm' isn't asked by /classify"):
            ClassifyPlan.of(StudentChoice(**self.LM))

    def test_from_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "understudy.toml"
        file.write_text(
            '[[task]]\nname = "a"\n'
            'student = { kind = "lm", base_url = "http://x/v1", model = "m", trained_until = 2026-10-01T00:00:00Z }\n'
            '[task_defaults.student]\nsees = "last"\n'
        )
        settings = load_settings(file)
        assert settings.for_task("a").student.trained_until == datetime(2026, 10, 1, tzinfo=UTC)
        assert settings.for_task("b").student.sees == "last"

    @pytest.mark.parametrize(
        ("student", "said"),
        [
            ('{ kind = "lm" }', "needs model, its name where it is served, and base_url"),
            ('{ kind = "lm", base_url = "http://x/v1" }', 'a student of kind "lm" needs model'),
            (
                '{ kind = "lm", base_url = "http://x/v1", model = "m", sees = "last" }',
                'of kind "lm" has no sees',
            ),
            (
                '{ model = "m" }',
                'a student of kind "linear" has no model: that is for students of kind "encoder" or "lm"',
            ),
            ('{ features = "embedding" }', "need each other"),
            ('{ embedder = "models/minilm" }', "need each other"),
            (
                '{ kind = "lm", base_url = "http://x", model = "m", embedder = "x" }',
                'of kind "lm" has no embedder',
            ),
            ('{ features = "pixels" }', "student.features = 'pixels'"),
            ('{ kind = "encoder" }', 'a student of kind "encoder" needs model, its name where it is served'),
            ('{ kind = "encoder" }', "or base, the folder of one to fine-tune"),
            (
                '{ kind = "encoder", base = "b", base_url = "http://x", model = "m" }',
                "fine-tuned here (base) or served elsewhere (model, base_url): base_url, model is for the other",
            ),
            (
                '{ kind = "encoder", base_url = "http://x", model = "m", precision = "int8" }',
                "precision is for the",
            ),
            ('{ kind = "encoder", base = "b", precision = "int4" }', "precision = 'int4'"),
            ('{ kind = "encoder", base = "b", train_share = 1.0 }', "train_share = 1.0"),
            ('{ base = "b" }', 'of kind "linear" has no base: that is for students of kind "encoder"'),
            (
                '{ kind = "encoder", base_url = "http://x/v1", model = "m", samples = 3 }',
                'a student of kind "encoder" has no samples: that is for students of kind "lm"',
            ),
            ('{ kind = "lm", model = "m" }', "needs base_url, where it is served, or [student.vllm]"),
            ('{ kind = "lm", model = "m", api_key_env = "K" }', "api_key_env is the key of base_url"),
            ('{ kind = "big" }', "student.kind = 'big'"),
            ('{ kind = "lm", base_url = "x", model = "m" }', "should begin with http:// or https://"),
            ('{ kind = "lm", base_url = "http://x", model = "m", checkpoints = [0] }', "each at least 1"),
            ('{ kind = "lm", base_url = "http://x", model = "m", top_logprobs = 21 }', "top_logprobs = 21"),
            (
                '{ kind = "lm", base_url = "http://x", model = "m", trained_until = 2026-10-01T00:00:00 }',
                "should name its time zone",
            ),
            ('{ kind = "lm", base_url = "http://x", modell = "m" }', "did you mean task[0].student.model?"),
        ],
    )
    def test_what_cant_be(self, tmp_path: Path, student: str, said: str) -> None:
        file = tmp_path / "understudy.toml"
        file.write_text(f'[[task]]\nname = "a"\nstudent = {student}\n')
        with pytest.raises(ConfigError) as wrong:
            load_settings(file)
        assert said in str(wrong.value)

    def test_a_key_in_the_place_of_its_variable_isnt_shown(self, tmp_path: Path) -> None:
        file = tmp_path / "understudy.toml"
        file.write_text(
            '[[task]]\nname = "a"\n'
            'student = { kind = "lm", base_url = "http://x", model = "m", api_key_env = "sk-secret-1" }\n'
        )
        with pytest.raises(ConfigError) as wrong:
            load_settings(file)
        assert "sk-secret-1" not in str(wrong.value)
        assert "such as STUDENT_API_KEY" in str(wrong.value)


class TestVllm:
    def test_students_need_no_server_of_their_own_then(self) -> None:
        task = {"name": "a", "student": {"kind": "lm", "model": "m"}}
        settings = Settings(student={"vllm": {"urls": ["http://a:8000/v1"]}}, task=[task])
        assert settings.for_task("a").student.base_url is None

    def test_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UNDERSTUDY_STUDENT__VLLM__MODEL", "some/model")
        monkeypatch.setenv("UNDERSTUDY_STUDENT__VLLM__ARGS", '["--enforce-eager"]')
        vllm = load_settings().student.vllm
        assert vllm is not None
        assert (vllm.model, vllm.args) == ("some/model", ["--enforce-eager"])

    @pytest.mark.parametrize(
        ("vllm", "said"),
        [
            ({}, "needs model, what `understudy serve --vllm` is to serve, or urls"),
            ({"urls": ["http://x"], "model": "m"}, "has urls, servers that others run, and model"),
            ({"urls": ["x"]}, "should begin with http:// or https://"),
            ({"model": "m", "api_key_env": "K"}, "gets a key of its own"),
            ({"urls": ["http://x"], "api_key_env": "sk-1"}, "should be the name of the environment variable"),
            ({"model": "m", "args": ["--port=9"]}, "should leave out --port"),
            ({"model": "m", "args": ["--api_key", "k"]}, "should leave out --api-key"),
            ({"model": "m", "max_loras": 2}, "max_loras without enable_lora"),
            ({"model": "m", "gpu_memory_utilization": 1.5}, "less than or equal to 1"),
            (
                {"model": "m", "gpu_memory_utilisation": 0.5},
                "did you mean student.vllm.gpu_memory_utilization?",
            ),
        ],
    )
    def test_what_cant_be(self, tmp_path: Path, vllm: dict[str, Any], said: str) -> None:
        file = tmp_path / "understudy.toml"
        lines = [f"{key} = {json.dumps(value)}" for key, value in vllm.items()]
        file.write_text("\n".join(["[student.vllm]", *lines]))
        with pytest.raises(ConfigError) as wrong:
            load_settings(file)
        assert said in str(wrong.value)
        assert "sk-1" not in str(wrong.value)
