"""Secrets are hidden wherever they hide; counts and names are not."""

import pytest

from stepladder.core.redact import HIDDEN, redact


@pytest.mark.parametrize(
    "key",
    ["hf_token", "HF_TOKEN", "db-password", "API_KEY", "apiKey", "clientSecret", "aws.secret_access_key", "passwd"],
)
def test_values_of_secret_keys_are_hidden(key):
    assert redact({"env": [{key: "abc"}]}) == {"env": [{key: HIDDEN}]}


def test_counts_and_names_stay():
    plain = {
        "tokens": 10, "tokens_per_s": 5.0, "tokenizer": "byte-1", "thought_tokens": 16, "eos_token": 2, "token": 3,
        "monkey": "banana", "keys": ["a"], "api": "v1", "password": None, "secret": "", "factor": "risk-based task-x",
    }  # fmt: skip
    assert redact(plain) == plain


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghij",
        "sk-abc123def456",
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_abcdef123456",
        "github_pat_11AA22BB",
        "glpat-a1b2c3d4",
    ],
)
def test_provider_tokens_inside_text(secret):
    shown = redact(f"login with {secret}, then go on")
    assert secret not in shown
    assert shown == f"login with {HIDDEN}, then go on"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("WANDB_API_KEY=0123456789 python train.py", "0123456789"),
        ("password: 'hunter 2' # mine", "hunter 2"),
        ('{"token": "abcdef"}', "abcdef"),
        ("https://me:pa55word@host/x", "pa55word"),
        ("Authorization: Bearer abcdefghijkl", "abcdefghijkl"),
    ],
)
def test_assignments_and_logins_inside_text(text, hidden):
    assert hidden not in redact(text)
    assert HIDDEN in redact(text)


def test_prose_about_tokens_stays():
    text = "100 tokens=500, tokenizer: byte, tokens per second: 5"
    assert redact(text) == text


def test_the_argument_after_a_secret_flag():
    argv = ["train", "--hf-token", "abc", "--tokens", "500", "--name", "token"]
    assert redact(argv) == ["train", "--hf-token", HIDDEN, "--tokens", "500", "--name", "token"]
