"""vLLM's command line as it may be shown: what is secret in it isn't."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.vllm_command import without_secrets


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["--hf-token", "abcd1234"], ["--hf-token", "…"]),
        (["--hf-token=abcd1234"], ["--hf-token=…"]),
        (["--hf_token=abcd=1234"], ["--hf_token=…"]),
        (
            ["--ssl-keyfile-password", "abcd1234", "--seed", "1"],
            ["--ssl-keyfile-password", "…", "--seed", "1"],
        ),
        (["--s3.secretKey", "abcd1234"], ["--s3.secretKey", "…"]),
        (["--keys", "abcd1234", "efgh5678", "-q", "fp8"], ["--keys", "…", "…", "-q", "fp8"]),
        (["--more", '{"awsSecret": "abcd1234", "n": 1}'], ["--more", '{"awsSecret": "…", "n": 1}']),
        (["--more=hf_abcdefgh12345678"], ["--more=…"]),
        (["--from", "s3://me:abcd1234@host/x"], ["--from", "s3://…@host/x"]),
        (["--tokenizer", "folder", "--max-num-batched-tokens=2048"],) * 2,
        (["--enforce-eager", "--dtype", "half"],) * 2,
        (["--hf-token"],) * 2,
    ],
)
def test_what_is_secret_isnt_shown(args: list[str], shown: list[str]) -> None:
    said, secrets = without_secrets(args)
    assert said == shown
    assert (said == args) == (secrets == [])
    assert not any(secret in one for secret in secrets for one in said)


@given(
    name=st.sampled_from(["hf-token", "api_key", "my-secret", "db.password"]),
    value=st.text(st.characters(categories=["L", "N"]), min_size=8),
    joined=st.booleans(),
)
def test_a_value_after_a_secret_flag_is_never_shown(name: str, value: str, joined: bool) -> None:
    args = [f"--{name}={value}"] if joined else [f"--{name}", value]
    said, secrets = without_secrets(["--seed", "0", *args, "--dtype", "half"])
    assert secrets == [value]
    assert not any(value in one for one in said)
    assert (said[:2], said[-2:]) == (["--seed", "0"], ["--dtype", "half"])
